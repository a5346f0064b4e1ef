"""What holds for every test: one thread per worker, no network, no writing into the user's home."""
# ruff: noqa: E402

import os

# Before torch is imported anywhere. `make test` runs one worker per core, so a worker must not use them all.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import sys
import tempfile

import pytest
from hypothesis import settings

# trackio reads TRACKIO_DIR once, when it is imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

# The same examples every time, and no deadline: a shared machine may stall for a second in any test.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seed():
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


STARTING = ("tests/distributed/", "tests/end_to_end/", "tests/train/reinforcement/", "tests/test_readme.py")
"""Files that start programs: up to two minutes each. Workers take them first, or one would begin such a file when
nothing else is left and all others wait for it."""


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: not item.nodeid.startswith(STARTING))
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
