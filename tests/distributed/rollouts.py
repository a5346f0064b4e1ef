"""`ernie rl` on the layouts of two ranks, next to one process; test_rollouts.py compares them.

python -m tests.distributed.rollouts DATA FOLDER      with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.rollouts import QUICK, files
from train import checkpoint, rl, training
from train.parallel.layout import leave
from train.parallel.settings import deepspeed_config

STEPS, MIDDLE = 4, 3
"""Two rollouts of two updates; a checkpoint in the middle of the second."""
LORA = ("peft=lora", "peft.rank=4", "peft.targets=[attention,text_experts,vision_experts,vision]", "optim.freeze=[]")
QUEUE = ("sampler.margin=2", "rollout.max_lag=2")


class Case(NamedTuple):
    settings: tuple[str, ...] = QUEUE
    zero: int = 0
    expert: int = 1

    @property
    def alone(self) -> "Case":
        return Case(self.settings)

    def words(self, data: Path, folder: Path) -> list[str]:
        return [
            *(*files(data), *QUICK, f"run.folder='{folder}'", f"run.steps={STEPS}", f"run.save_every={MIDDLE}"),
            *("evaluate.every=2", *self.settings),
            *(f"parallel.{key}={getattr(self, key)}" for key in ("zero", "expert")),
        ]


CASES = {
    "DDP": Case(),
    "ZeRO-2, a reference": Case(
        ("objective.ratio=token", "objective.kl=0.1", "optim.lr=2e-5", "sampler.kind=uniform"), zero=2
    ),
    "ZeRO-3": Case(zero=3),
    "experts and ZeRO-1, replayed": Case((*QUEUE, "rollout.replay_experts=true"), zero=1, expert=2),
    "experts and ZeRO-3": Case(zero=3, expert=2),
    "adapters, experts": Case(LORA, expert=2),
    "adapters, ZeRO-3": Case(LORA, zero=3),
}
RESUMED = {
    "from DDP to experts": ("DDP", Case(expert=2)),
    "from ZeRO-3 to DDP": ("ZeRO-3", Case()),
}
"""From the checkpoint in the middle of a rollout, by name, to another layout, in another folder."""


def middle(folder: Path) -> Path:
    return checkpoint.folder_of(folder / "checkpoints", MIDDLE)


def as_of_a_large_model(*args: Any, **options: Any) -> dict[str, Any]:
    """ZeRO-3 keeps weights that are needed again within 10^9 elements, which is a layer of a large model, and 2500
    forward passes of this one: it would look through all of them whenever a module is done."""
    settings = deepspeed_config(*args, **options)
    return settings | {"zero_optimization": settings["zero_optimization"] | {"stage3_max_reuse_distance": 10**5}}


def run(case: Case, data: Path, folder: Path, *also: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ernie rl", *case.words(data, folder), *also])
        if case.zero == 3:
            patch.setattr(training, "deepspeed_config", as_of_a_large_model)
        patch.setattr(training, "leave", lambda: None)  # the ranks meet once, for all runs
        rl.main()


def main(data: Path, folder: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        run(case, data, folder / name)
    for name, (source, case) in RESUMED.items():
        run(case, data, folder / name, f"run.resume='{middle(folder / source)}'")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
