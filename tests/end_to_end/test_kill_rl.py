"""`ernie rl`, killed while it samples, while it learns and while it saves, ends as if it never had been: the same
rollouts, metrics, records and weights, to the last bit. A checkpoint falls between the updates of one rollout, and
groups wait in the queue."""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.test_kill import check_equal, kill_again_and_again, lines_of_starts
from tests.rollouts import QUICK, files, write_prompts
from train import checkpoint, rl

KINDS = {
    "difficulty": ["sampler.margin=2", "rollout.max_lag=2"],
    "uniform": ["sampler.kind=uniform", "objective.ratio=token", "objective.kl=0.1", "optim.lr=2e-5"],
    "lora": ["peft=lora", "peft.rank=4", "peft.targets=[attention,vision]"],
}


def settings(folder: Path, steps: int) -> list[str]:
    name, data = folder.name.partition(".")[0], folder.parent / "data"
    if not data.exists():
        write_prompts(data)
    often = [f"run.steps={steps}", "record.every=2", "run.save_every=3", "evaluate.every=6", f"run.folder={folder}"]
    return [*KINDS[name], *files(data), *QUICK, *often]


def finish(monkeypatch, folder: Path, steps: int) -> None:
    monkeypatch.setattr(sys, "argv", ["ernie rl", *settings(folder, steps)])
    rl.main()


def kill_and_compare(tmp_path: Path, monkeypatch, name: str, steps: int, kinds: Sequence[str], seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    whole, broken = tmp_path / f"{name}.whole", tmp_path / f"{name}.broken"
    finish(monkeypatch, whole, steps)
    program = ["-m", "train.rl", *settings(broken, steps)]
    done = kill_again_and_again(program, broken, steps, kinds, random.Random(seed))
    finish(monkeypatch, broken, steps)
    check_equal(broken, whole, steps)
    for file in ("rollouts.jsonl", "learned.jsonl", "zero_gradient.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
    assert len(lines_of_starts(broken)) == len(done) + 1


@pytest.mark.timeout(900)
def test_kills(tmp_path, monkeypatch):
    kill_and_compare(tmp_path, monkeypatch, "difficulty", 18, ["SIGKILL", "in a save"], seed=3)
    (state,) = (
        checkpoint.read_state(path) for path in checkpoint.complete(tmp_path / "difficulty.whole/checkpoints")[:1]
    )
    assert state["source"]["updates"] % 2 == 1  # there was something of a rollout to keep
    assert state["source"]["waiting"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_eight_kills(tmp_path, monkeypatch, name):
    kinds = ["SIGKILL", "in a save", "SIGTERM", "SIGKILL"] * 2
    kill_and_compare(tmp_path, monkeypatch, name, 80, kinds, seed=8)
