"""Two gloo processes compute the gradient of one process, also when one of them never sees an image."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(out: Path, *rows: str, checkpointing: bool) -> dict:
    """`one_step` with one process per argument."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(rows)),
        "LOCAL_WORLD_SIZE": str(len(rows)),
    }
    mode = "checkpointing" if checkpointing else "plain"
    command = [sys.executable, "-m", "tests.distributed.one_step", str(out), mode, *rows]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(rows) > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(rows))
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    "first, second, checkpointing",
    [
        ("image,long", "short,long", False),  # rank 0 has its image in a micro-batch before the ranks meet
        ("long,short", "short,image2", True),  # rank 1 has its image in the one where they meet
        ("long,short", "short,long", False),  # nobody has an image
    ],
)
def test_two_ranks_equal_one(tmp_path, first, second, checkpointing):
    one = run(tmp_path / "one.pt", f"{first},{second}", checkpointing=checkpointing)
    two = run(tmp_path / "two.pt", first, second, checkpointing=checkpointing)
    scale = max(g.abs().max().item() for g in one["gradients"].values() if g is not None)
    for name, gradient in one["gradients"].items():
        assert (gradient is None) == (two["gradients"][name] is None), name
        if gradient is not None:
            # float64 sums of a few hundred terms in another order
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-12 * scale, msg=name)
    with_image = "image" in first + second
    assert (one["gradients"]["model.vision.patch_embed.weight"] is not None) == with_image
    for key in ("loss", "accuracy", "units", "tokens", "grad_norm", "router_text_imbalance"):
        assert math.isclose(one["metrics"][key], two["metrics"][key], rel_tol=1e-12), key
    assert two["flag"] and not one["flag"]  # what one rank is asked, all do
