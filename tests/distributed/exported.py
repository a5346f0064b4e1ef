"""What every layout publishes of one training state; test_exported.py compares it with what one process publishes.

python -m tests.distributed.exported FOLDER      with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_model.checkpoint import write_tensors
from tests.distributed.reshard import LAYOUTS, ROWS, Trained, What
from train import checkpoint
from train import run as run_folder
from train.config import TARGETS, PeftConfig, PeftKind, UserError
from train.lora import adapt
from train.lora.files import WEIGHTS
from train.parallel.layout import leave

PROCESSOR: Any = SimpleNamespace(save=lambda folder: None)
UPDATES = 2
LORA = PeftConfig(kind=PeftKind.lora, targets=list(TARGETS), rank=3, merge=True)
WHAT = {"all": What(), "bfloat16": What(dtype=torch.bfloat16), "adapters": What(LORA)}
STATE_OF = {"all": "all", "bfloat16": "all", "adapters": "adapters"}
"""Rounded weights go on from the exact ones, and so are published as these."""
CASES = [
    *((what, layout) for what in ("all", "adapters") for layout in LAYOUTS if layout.endswith("x2")),
    ("bfloat16", "zero2 x2"),
    ("bfloat16", "ep2 zero2 x2"),
]
SHARD = 20_000
"""Bytes: many files, so that every rank has some to write."""


def publish(run: Trained, folder: Path) -> None:
    run.weights.publish(folder, "export", PROCESSOR, run.updates.optimizer)


def write(folder: Path, state: str) -> None:
    """One process trains, saves and publishes."""
    run = Trained(LAYOUTS["x1"], WHAT[state], seed=0)
    if state == "all":
        run.turn_biases(1)
    run.losses(ROWS[:UPDATES])
    run.save(folder / state, UPDATES)
    publish(run, folder / state)


def read(folder: Path, what: str, layout: str) -> Trained:
    run = Trained(LAYOUTS[layout], WHAT[what], seed=1)
    run.load(checkpoint.folder_of(folder / STATE_OF[what], UPDATES))
    publish(run, folder / what / layout)
    return run


def lose_an_expert(run: Trained, folder: Path) -> str:
    """The adapter of the last expert, which the last rank holds, is zero in the file: what every rank is told."""
    right = adapt.write_adapter

    def wrong(folder: Path, *rest) -> None:
        right(folder, *rest)
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("vision_moe.experts.lora_A.weight"))
        tensors[name][-LORA.rank :] = 0
        save_file(tensors, folder / WEIGHTS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "write_adapter", wrong)
        try:
            publish(run, folder)
        except UserError as error:
            return str(error)
    return "nothing"


def in_many_files() -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(run_folder, "write_tensors", functools.partial(write_tensors, max_shard_bytes=SHARD))
    return patch


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_many_files()
    folder = Path(sys.argv[1])
    for what, layout in CASES:
        run = read(folder, what, layout)
        if (what, layout) in (("adapters", "ep2 x2"), ("adapters", "zero3 x2")):
            told = checkpoint.everyones(lose_an_expert(run, folder / "lost" / layout))
            if run.rank == 0:
                (folder / "lost" / f"{layout}.txt").write_text("\n".join(told))
    leave()
