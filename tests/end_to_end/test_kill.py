"""A run that is killed again and again, and one that never is: the same losses, records, learning rates and weights.

    whole    ───────────────────────────────────────────►  weights
    broken   ────X   ──SIGKILL in a save──X   ──SIGTERM─┤   ──X   ...  ──►  the same weights, bit for bit

Packing, a mixture, accumulation, workers, prefetch, evaluation and LoRA with dropout are on, and the trackers of this
machine must show one run with every step once. The moments of the kills are random, from a fixed seed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from data.records import write_jsonl
from tests.programs import Program
from train import checkpoint, sft

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "experiment=digits",
    "data=files",
    "tracker=[trackio,tensorboard]",
    "tracker.project=kill",
    "optim.warmup_steps=3",
    "data.max_tokens=128",
    "data.accumulation=2",
    "data.workers=2",
    "data.lookahead=8",
    "evaluate.max_examples=6",
    "evaluate.sheet=2",
    "evaluate.max_new_tokens=2",
    "model.config.text_config.num_hidden_layers=2",
    "model.config.text_config.mlp_layer_types=[dense,sparse]",
    "objective.neftune_alpha=5",
    "run.spike=3",
]


LORA = ["peft=lora", "peft.targets=[attention,shared,vision]", "peft.rank=4", "peft.dropout=0.1"]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def settings(folder: Path, steps: int) -> list[str]:
    often = [f"run.steps={steps}", "run.save_every=4", "evaluate.every=6"]
    peft = LORA if "lora" in folder.name else []
    chats = folder.parent / "chats.jsonl"
    if not chats.exists():
        write_jsonl(chats, [{"messages": [turn("user", f"{n}?"), turn("assistant", f"{n}!")]} for n in range(20)])
    mixture = f"data.sets={{digits: {{task: digits, weight: 3}}, chats: {{path: '{chats}', weight: 1}}}}"
    return [*SETTINGS, *peft, *often, mixture, f"run.folder={folder}", f"run.name={folder.parent.name}-{folder.name}"]


def program(folder: Path, steps: int) -> list[str]:
    return ["-m", "train.sft", *settings(folder, steps)]


def finish(monkeypatch, folder: Path, steps: int) -> None:
    monkeypatch.setattr(sys, "argv", ["ernie sft", *settings(folder, steps)])
    sft.main()


class Started:
    """A training program as a process of its own.

    Args:
        program: what follows `python`.
        folder: of the run.
        environment: what a launcher would set.
    """

    def __init__(self, program: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None):
        self.folder = folder
        self.log = (folder.parent / "log.txt").open("a")
        self.said_before = self.log.tell()
        self.process = Program(
            program,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait_for_step(self, step: int) -> None:
        """Returns soon after update `step`, or when the process has ended."""
        # First let it begin: what an earlier start wrote about this step is still there until then.
        self.wait(lambda: any(word in self._said() for word in ("step 0: held out", "resuming from")))
        seen = self.folder / "data" / "rank-0.jsonl"
        self.wait(lambda: seen.exists() and f'"step": {step},' in seen.read_text())

    def wait_for_save(self) -> None:
        self.wait(lambda: any((self.folder / "checkpoints").glob(".step-*.partial")))

    def _said(self) -> str:
        with Path(self.log.name).open() as file:
            file.seek(self.said_before)
            return file.read()

    def wait(self, happened) -> None:
        deadline = time.monotonic() + 200
        while self.process.poll() is None and not happened():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(200)
        self.log.close()
        return code


def kill_again_and_again(
    program: Sequence[str], folder: Path, steps: int, kinds: Sequence[str], rng: random.Random
) -> list[str]:
    """Kill a run at random moments until `kinds` is used up; returns what was done. It is never let finish."""
    done = []
    for number, kind in enumerate(kinds, start=1):
        saved = checkpoint.complete(folder / "checkpoints")
        step = int(saved[-1].name[5:]) if saved else 0
        # Room for the kills that follow: none may find the run at its end.
        furthest = max(step + 1, steps - 5 * (len(kinds) - number) - 6)
        started = Started(program, folder)
        target = min(step + rng.randint(1, 6), furthest)
        started.wait_for_step(target)
        if kind == "in a save":
            started.wait_for_save()
        time.sleep(rng.uniform(0, 0.02))
        code = started.end(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        assert code == (0 if kind == "SIGTERM" else -signal.SIGKILL), (folder.parent / "log.txt").read_text()
        done.append(f"{kind} after step {target}")
    return done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What depends on the clock and the machine; everything else must be equal to the last bit.
OF_THE_CLOCK = {"time", "step_s", "data_wait", "eta_s", "memory_gb", "mfu"}


def numbers(folder: Path) -> list[dict]:
    """metrics.jsonl less what the clock decides. Every line is there once, and in the same order."""
    out = []
    for line in lines(folder / "metrics.jsonl"):
        timed = {key for key in line if key in OF_THE_CLOCK or key.endswith("_per_s") or key.startswith("seconds_")}
        out.append({key: value for key, value in line.items() if key not in timed})
    return out


def trackio_losses(name: str) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [(log["step"], log["loss"]) for log in SQLiteStorage.get_logs("kill", name) if "loss" in log]


def tensorboard_losses(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def check_equal(broken: Path, whole: Path, steps: int) -> None:
    """All that two runs have written: the numbers, records and weights, to the last bit."""
    assert [line["step"] for line in numbers(whole) if "loss" in line] == list(range(1, steps + 1))
    assert numbers(broken) == numbers(whole)  # losses, gradient norms, learning rates, evaluations, the answers' line
    assert lines(broken / "data" / "rank-0.jsonl") == lines(whole / "data" / "rank-0.jsonl")
    for file in ("spikes.jsonl", "nonfinite.jsonl"):
        assert (broken / file).exists() == (whole / file).exists()
        if (whole / file).exists():
            assert (broken / file).read_text() == (whole / file).read_text()
    # every tensor that was written: the last two checkpoints with optimizer and generators, what is exported, the best
    written = [sorted(path.relative_to(folder) for path in tensors(folder)) for folder in (broken, whole)]
    assert written[0] == written[1] and len(written[0]) >= 2 * 2 + 2
    for path in written[0]:
        assert (broken / path).read_bytes() == (whole / path).read_bytes(), path
    # nothing half written was left
    assert not list(broken.rglob(".*.partial")) and not list(broken.rglob("*.damaged"))


def tensors(folder: Path) -> list[Path]:
    """Less the log-probabilities of a reference: how many lie in a file depends on when it was broken off."""
    return [path for path in folder.rglob("*.safetensors") if "reference" not in path.relative_to(folder).parts]


def check_trackers(broken: Path, whole: Path, steps: int) -> None:
    """One run in each, every step once."""
    from trackio.sqlite_storage import SQLiteStorage

    names = [f"{folder.parent.name}-{folder.name}" for folder in (broken, whole)]
    started = [run for run in SQLiteStorage.get_runs("kill") if str(run).startswith(names[0])]
    assert started == [names[0]]
    assert trackio_losses(names[0]) == trackio_losses(names[1])
    assert tensorboard_losses(broken) == tensorboard_losses(whole)
    assert len(tensorboard_losses(whole)) == steps


@pytest.mark.timeout(900)  # five starts of Python and PyTorch
def test_three_kills(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, broken, steps = tmp_path / "lora-whole", tmp_path / "lora-broken", 24
    finish(monkeypatch, whole, steps)
    kinds = ["SIGKILL", "in a save", "SIGTERM"]
    done = kill_again_and_again(program(broken, steps), broken, steps, kinds, random.Random(5))
    finish(monkeypatch, broken, steps)
    check_equal(broken, whole, steps)
    check_trackers(broken, whole, steps)
    assert len(lines_of_starts(broken)) == len(done) + 1
    finish(monkeypatch, broken, steps)  # finished already: says the same again, and nothing twice
    check_equal(broken, whole, steps)
    check_trackers(broken, whole, steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("peft", ["all", "lora"])
def test_twenty_kills(tmp_path, monkeypatch, peft):
    monkeypatch.chdir(tmp_path)
    whole, broken, steps = tmp_path / f"{peft}-whole", tmp_path / f"{peft}-broken", 160
    finish(monkeypatch, whole, steps)
    rng = random.Random(20)
    kinds = [rng.choice(["SIGKILL", "SIGKILL", "in a save", "SIGTERM"]) for _ in range(20)]
    done = kill_again_and_again(program(broken, steps), broken, steps, kinds, rng)
    finish(monkeypatch, broken, steps)
    check_equal(broken, whole, steps)
    check_trackers(broken, whole, steps)
    assert len(lines_of_starts(broken)) == len(done) + 1
    print(*done, sep="\n")


def lines_of_starts(folder: Path) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["starts"]
