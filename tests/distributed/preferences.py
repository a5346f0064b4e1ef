"""`ernie dpo` on the layouts of two ranks, next to one process; test_preferences.py compares them.

python -m tests.distributed.preferences DATA FOLDER      with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.preferences import QUICK, files
from train import checkpoint, dpo, training
from train.parallel.layout import leave

ROWS = 4
"""Of an update, over all ranks."""
STEPS = 4
LORA = ("peft=lora", "peft.rank=4", "peft.targets=[attention,text_experts,vision_experts,vision]")
KTO_PAIR, KTO = (f"objective.preference_loss_type={loss}" for loss in ("kto_pair", "kto"))
MDPO = ("objective.mdpo_conditional=1", "objective.mdpo_anchor=0.5", "objective.sft_loss_ratio=0.2")
AVERAGE = ("reference.update=ema", "reference.every=1", "reference.mix=0.3")


class Case(NamedTuple):
    settings: tuple[str, ...] = ()
    zero: int = 0
    expert: int = 1
    sequence: int = 1
    same: tuple[str, ...] = ()
    """Settings that change nothing but roundings; one process goes without."""

    @property
    def alone(self) -> "Case":
        return Case(self.settings)

    def words(self, data: Path, folder: Path, ranks: int) -> list[str]:
        groups = ranks // self.sequence
        return [
            *(f"model.checkpoint={data / 'model'}", *files(data, "labelled-" if KTO in self.settings else "")),
            *(*QUICK, f"run.folder='{folder}'", f"run.steps={STEPS}", "run.save_every=2", "evaluate.every=2"),
            *("evaluate.sheet=0", f"data.accumulation={ROWS // groups}", *self.settings, *self.same),
            *(f"parallel.{key}={getattr(self, key)}" for key in ("zero", "expert", "sequence")),
        ]


CACHE, COPY = ("reference.kind=cache",), ("reference.kind=copy",)
CASES = {
    "copy, DDP": Case((KTO_PAIR,)),
    "copy, experts and ZeRO-3": Case((KTO_PAIR,), zero=3, expert=2),
    "average, ZeRO-1": Case((*AVERAGE, KTO_PAIR), zero=1),
    "copy, ZeRO-3": Case(MDPO, zero=3),
    "cache, experts": Case(MDPO, expert=2, same=CACHE),
    "labelled, copy, ZeRO-2": Case((KTO,), zero=2),
    "labelled, cache, shared rows, experts": Case((KTO,), sequence=2, expert=2, zero=1, same=CACHE),
    "adapters off, experts and ZeRO-2": Case(LORA, zero=2, expert=2, same=("model.recompute=layers_and_vision",)),
    "cache beside adapters, ZeRO-3": Case(LORA, zero=3, same=CACHE),
    "copy beside adapters, shared rows": Case(LORA, sequence=2, same=COPY),
}
RESUMED = {
    "average, from ZeRO-1 to experts and ZeRO-3": ("average, ZeRO-1", Case((*AVERAGE, KTO_PAIR), zero=3, expert=2)),
    "cache beside adapters, from ZeRO-3 to DDP": ("cache beside adapters, ZeRO-3", Case(LORA, same=CACHE)),
}
"""From the checkpoint in the middle of a run, by name, to another layout, in another folder."""
MIDDLE = 2


def middle(folder: Path) -> Path:
    return checkpoint.folder_of(folder / "checkpoints", MIDDLE)


def run(case: Case, data: Path, folder: Path, ranks: int, *also: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ernie dpo", *case.words(data, folder, ranks), *also])
        patch.setattr(training, "leave", lambda: None)  # the ranks meet once, for all runs
        dpo.main()


def main(data: Path, folder: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        run(case, data, folder / name, 2)
    for name, (source, case) in RESUMED.items():
        run(case, data, folder / name, 2, f"run.resume='{middle(folder / source)}'")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
