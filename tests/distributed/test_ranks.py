"""Two gloo processes compute the gradient of one process, also when one of them never sees an image."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.one_step import CASES, one_step
from tests.train import small

ROOT = Path(__file__).resolve().parents[2]


def launch(world: int, *arguments: str) -> None:
    """Run a Python program as `world` ranks, as `accelerate launch` would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    launch(2, "-m", "tests.distributed.one_step", str(out))
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks, case):
    first, second, checkpointing = CASES[case]
    one = one_step(small.accelerator(), first + second, checkpointing=checkpointing)
    two = two_ranks[case]
    scale = max(g.abs().max().item() for g in one["gradients"].values() if g is not None)
    for name, gradient in one["gradients"].items():
        assert (gradient is None) == (two["gradients"][name] is None), name
        if gradient is not None:
            # float64 sums of a few hundred terms in another order
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-12 * scale, msg=name)
    with_image = any(name.startswith("image") for name in first + second)
    assert (one["gradients"]["model.vision.patch_embed.weight"] is not None) == with_image
    for key in ("loss", "accuracy", "units", "tokens", "grad_norm", "router_text_imbalance"):
        assert math.isclose(one["metrics"][key], two["metrics"][key], rel_tol=1e-12), key
    assert two["flag"] and not one["flag"]  # what one rank is asked, all do
