"""`ernie dpo`, killed while its cache is made, while it trains and while it saves, ends as if it never had been: the
same metrics, records and weights, to the last bit, whatever the reference."""

import json
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.test_kill import Started, check_equal, kill_again_and_again, lines_of_starts
from tests.preferences import QUICK, files, write_preferences
from train import dpo, reference

LORA = ["peft=lora", "peft.rank=4", "peft.targets=[attention,vision]", "peft.dropout=0.1"]
KINDS = {
    "average": ["reference.update=ema", "reference.every=3", "reference.mix=0.3"],
    "cache-lora": [*LORA, "reference.kind=cache"],
    "adapters-off": [*LORA, "reference.kind=adapters_off", "objective.mdpo_conditional=1"],
    "copy": ["reference.kind=copy", "objective.preference_loss_type=kto_pair"],
    "cache": ["reference.kind=cache", "objective.preference_loss_type=kto"],
}
FLUSH = "import train.reference; train.reference.FLUSH_ROWS = 1; from train.dpo import main; main()"
"""A program that writes log-probabilities row by row, as one with more rows would."""


def settings(folder: Path, steps: int) -> list[str]:
    name, data = folder.name.partition(".")[0], folder.parent / "data"
    if not data.exists():
        write_preferences(data)
    kind = files(data, "labelled-" if "objective.preference_loss_type=kto" in KINDS[name] else "")
    often = [f"run.steps={steps}", "run.save_every=4", "evaluate.every=6", "evaluate.sheet=0"]
    own = [*QUICK, "data.accumulation=2", "data.workers=2", "run.spike=3", f"run.folder={folder}"]
    return [f"model.checkpoint={data / 'model'}", *kind, *own, *often, *KINDS[name]]


def finish(monkeypatch, folder: Path, steps: int) -> None:
    monkeypatch.setattr(sys, "argv", ["ernie dpo", *settings(folder, steps)])
    dpo.main()


def stored(folder: Path) -> list[Path]:
    return list((folder / "reference").rglob("*.safetensors"))


def break_the_cache(program: Sequence[str], folder: Path) -> None:
    """Kill it between the first rows' log-probabilities and the last ones'."""
    started = Started(program, folder)
    started.wait(lambda: len(stored(folder)) >= 2)
    assert started.end(signal.SIGKILL) == -signal.SIGKILL
    assert not list((folder / "reference").rglob("all-*.json")) and not (folder / "metrics.jsonl").exists()


def kill_and_compare(tmp_path: Path, monkeypatch, name: str, steps: int, kinds: Sequence[str], seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "FLUSH_ROWS", 1)
    whole, broken = tmp_path / f"{name}.whole", tmp_path / f"{name}.broken"
    finish(monkeypatch, whole, steps)
    program = ["-c", FLUSH, *settings(broken, steps)]
    if cached := "reference.kind=cache" in KINDS[name]:
        break_the_cache(program, broken)
        before = {path.name for path in stored(broken)}
    done = kill_again_and_again(program, broken, steps, kinds, random.Random(seed))
    finish(monkeypatch, broken, steps)
    check_equal(broken, whole, steps)
    assert len(lines_of_starts(broken)) == len(done) + 1
    if cached:  # what was there was not computed again, and with it the cache is that of the other run
        noted = [json.loads(path.read_text()) for path in (broken / "reference").rglob("all-*.json")]
        trained = max(noted, key=lambda about: about["records"])
        assert len(noted) == 2 and 0 < trained["computed"] < trained["records"]
        assert before <= {path.name for path in stored(broken)} == {path.name for path in stored(whole)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "kinds"), [("average", ["SIGKILL", "SIGTERM"]), ("cache-lora", ["in a save"])], ids=["average", "cache"]
)
def test_kills(tmp_path, monkeypatch, name, kinds):
    kill_and_compare(tmp_path, monkeypatch, name, 16, kinds, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_eight_kills(tmp_path, monkeypatch, name):
    kinds = ["SIGKILL", "in a save", "SIGTERM", "SIGKILL"] * 2
    kill_and_compare(tmp_path, monkeypatch, name, 80, kinds, seed=8)
