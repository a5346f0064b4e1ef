"""Saving and loading take one block of memory beside the training state, on every rank; the kernel counts it."""

import json
from pathlib import Path

import pytest

from tests.distributed.saving_memory import NAMES
from tests.distributed.test_ranks import launch
from train.pieces import BLOCK

MIB = 2**20
SLACK = 4 * MIB
"""Python's and the allocator's own pages. The largest tensor of the model has 32 MiB, a rank's share 154 MiB."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak counter is Linux only")
def test_peak_is_one_block(tmp_path):
    launch(2, "-m", "tests.distributed.saving_memory", str(tmp_path), fresh=True)
    ranks = json.loads((tmp_path / "found.json").read_text())
    for rank in ranks:
        for name in NAMES:
            assert rank[name]["share"] > 150 * MIB, (name, rank)  # half of everything
            assert rank[name]["saving"] <= BLOCK + SLACK and rank[name]["loading"] <= BLOCK + SLACK, (name, rank)
