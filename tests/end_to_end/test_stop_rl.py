"""SIGTERM in the middle of a rollout drops it and saves; the run goes on as if it had never been stopped.

A reward waits in the second rollout, so that it does not end by itself.
"""

import signal
import sys
import time
from pathlib import Path

import pytest

from data.records import write_jsonl
from tests.distributed.gloo import environments
from tests.end_to_end.test_kill import Started, check_equal, lines
from tests.rollouts import OWN, QUICK, files, write_prompts
from train import checkpoint, rl

STEPS, BOUNDARY = 6, 2
"""Three rollouts of two updates; what is done when the second rollout begins."""
AT_ONCE_S = 30.0
"""Less than rewards.time_s, after which the rollout would end."""
QUEUE = ["sampler.margin=2", "rollout.max_lag=2"]


def settings(folder: Path, *more: str) -> list[str]:
    data = folder.parent / "data"
    often = [f"run.steps={STEPS}", "run.save_every=4", "record.every=1", "evaluate.every=4", f"run.folder={folder}"]
    own = ["rewards.workers=1", "rewards.time_s=120", "tracker=tensorboard"]
    return [*files(data), *[word for word in QUICK if word != "tracker=none"], *often, *own, *more]


def write_data(folder: Path, name: str = "prompts") -> Path:
    """Prompts, or held-out questions, of which the 21st attempt waits; returns the file that counts what was judged."""
    write_prompts(data := folder / "data")
    judged = folder / "judged"
    prompts = lines(data / f"{name}.jsonl")
    own = {"answer": str(judged), "reward": f"python:{OWN}.even_until"}
    write_jsonl(data / f"{name}.jsonl", [{**one, **own} for one in prompts])
    return judged


def waits(judged: Path) -> bool:
    return judged.exists() and judged.stat().st_size > 20


@pytest.mark.timeout(300)
def test_the_rollout_is_dropped_and_asked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, broken, judged = tmp_path / "whole", tmp_path / "broken", write_data(tmp_path)
    go = judged.with_name("judged.go")

    def finish(folder: Path) -> None:
        go.touch()
        monkeypatch.setattr(sys, "argv", ["ernie rl", *settings(folder, *QUEUE)])
        rl.main()
        go.unlink()

    finish(whole)
    judged.unlink()
    started = Started(["-m", "train.rl", *settings(broken, *QUEUE)], broken)
    started.wait(lambda: waits(judged))
    begin = time.monotonic()
    assert started.end(signal.SIGTERM) == 0, (tmp_path / "log.txt").read_text()
    assert time.monotonic() - begin < AT_ONCE_S
    (saved,) = checkpoint.complete(broken / "checkpoints")
    assert saved == checkpoint.folder_of(broken / "checkpoints", BOUNDARY)
    assert f"stopped after step {BOUNDARY} of {STEPS}; the same command goes on" in (tmp_path / "log.txt").read_text()
    finish(broken)
    check_equal(broken, whole, STEPS)
    for file in ("rollouts.jsonl", "learned.jsonl", "zero_gradient.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.timeout(300)
def test_before_the_first_update_there_is_nothing_to_save(tmp_path):
    """The next start begins anew."""
    judged = write_data(tmp_path)
    judged.write_text("." * 21)
    folder = tmp_path / "run"
    started = Started(["-m", "train.rl", *settings(folder)], folder)
    started.wait(lambda: judged.stat().st_size > 21)
    assert started.end(signal.SIGTERM) == 0
    assert "stopped before the first update; the same command begins anew" in (tmp_path / "log.txt").read_text()
    assert not checkpoint.complete(folder / "checkpoints")


@pytest.mark.timeout(300)
def test_held_out_questions_are_dropped_and_asked_by_the_next_start(tmp_path, monkeypatch):
    """Of the start weights no answer ends, so that none is judged: the evaluation of step 4 or 6 waits."""
    monkeypatch.chdir(tmp_path)
    judged, folder = write_data(tmp_path, "heldout"), tmp_path / "run"
    judged.write_text("." * 21)
    started = Started(["-m", "train.rl", *settings(folder)], folder)
    started.wait(lambda: judged.stat().st_size > 21)
    begin = time.monotonic()
    assert started.end(signal.SIGTERM) == 0, (tmp_path / "log.txt").read_text()
    assert time.monotonic() - begin < AT_ONCE_S
    state = checkpoint.read_state(checkpoint.complete(folder / "checkpoints")[-1])
    step = state["loop"]["step"]
    assert step in (4, 6) and step not in [one["step"] for one in state["loop"]["evaluations"]]
    judged.with_name("judged.go").touch()
    monkeypatch.setattr(sys, "argv", ["ernie rl", *settings(folder)])
    rl.main()
    evaluated = [one["step"] for one in lines(folder / "metrics.jsonl") if "eval_perfect" in one]
    assert evaluated == [0, 4, 6]


@pytest.mark.timeout(300)
def test_one_that_is_sampled_ahead(tmp_path):
    judged, folder = write_data(tmp_path), tmp_path / "run"
    started = Started(["-m", "train.rl", *settings(folder, "rollout.ahead=1")], folder)
    started.wait(lambda: waits(judged))
    begin = time.monotonic()
    assert started.end(signal.SIGTERM) == 0, (tmp_path / "log.txt").read_text()
    assert time.monotonic() - begin < AT_ONCE_S
    assert checkpoint.complete(folder / "checkpoints")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["parallel.zero=0", "parallel.zero=3"])
def test_all_ranks_leave_when_one_is_told(tmp_path, layout):
    """Without a rank that is told the other one would wait for its rollout; with ZeRO-3 they step together."""
    judged, folder = write_data(tmp_path), tmp_path / "run"
    words = ["-m", "train.rl", *settings(folder, layout)]
    ranks = [Started(words, folder, environment) for environment in environments(2)]
    ranks[0].wait(lambda: waits(judged))
    begin = time.monotonic()
    codes = [ranks[1].end(signal.SIGTERM), ranks[0].ended()]
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()
    assert time.monotonic() - begin < AT_ONCE_S
    (saved,) = checkpoint.complete(folder / "checkpoints")
    assert saved == checkpoint.folder_of(folder / "checkpoints", BOUNDARY) and checkpoint.damage(saved) is None
