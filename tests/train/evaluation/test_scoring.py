"""Rewards of the user's own run in processes with limits: what hangs or dies costs its own attempt its score."""

import json
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.train.evaluation.conftest import Reply
from train.config import UserError
from train.evaluation.asking import read_answers
from train.inference_config import RewardLimits

MINE = "python:tests.train.reinforcement.own_rewards."


@pytest.fixture
def asked(write, tmp_path) -> str:
    """One question for each of five rewards, whose right answer is 2."""
    rewards = [MINE + name for name in ("hangs", "dies", "raises", "right")] + ["number"]
    records = [{"id": one.rpartition(".")[2], "prompt": "1 + 1 = ?", "answer": "2", "reward": one} for one in rewards]
    records[0]["answer"] = str(tmp_path / "pid")
    return write(records)


def test_no_score_is_not_0_and_the_others_have_theirs(run, asked, tmp_path, adds: Reply):
    said, begin = StringIO(), time.monotonic()
    console = Console(file=said, width=200)
    results, _ = run([asked], adds, console, rewards=RewardLimits(time_s=1.5), pictures=0)
    assert time.monotonic() - begin < 30
    answers = {one.id: one for one in read_answers(tmp_path / "out/answers.jsonl")}
    assert {id: one.score for id, one in answers.items()} == {
        "hangs": None,
        "dies": None,
        "raises": None,
        "right": 1.0,
        "number": 1.0,
    }
    whys = ("took longer than 1.5 s (rewards.time_s)", "ended its process (exit code 3)", "raised RuntimeError: broken")
    for id, why in zip(("hangs", "dies", "raises"), whys, strict=True):
        assert (unscored := answers[id].unscored) is not None and unscored.startswith(f"reward {MINE}{id} {why}")
        assert f"unscored  1 of 5 answers: {unscored}" in said.getvalue()
    assert answers["right"].unscored is None and not answers["hangs"].failed
    mine = results["tasks"]["mine"]
    assert mine["unscored"] == 3 and mine["failed"] == 0 and mine["score"]["mean"] == 1.0


def test_what_a_limit_cut_off_is_shown_to_the_reward(run, write, tmp_path):
    """As to those of the suite: an answer without an end may be right as far as it goes."""
    own = write([{"id": "a", "prompt": "?", "answer": "yes yes", "reward": MINE + "prints"}])
    run([own], lambda prompt: "yes " * 100, pictures=0)
    (answer,) = read_answers(tmp_path / "out/answers.jsonl")
    assert answer.status == "truncated" and answer.score == 1.0


def test_processes_are_started_for_rewards_of_the_users_own_alone(run, sums, adds: Reply, monkeypatch):
    monkeypatch.setattr("train.rewards.judging.Worker", None)
    results, _ = run([sums], adds, pictures=0)
    assert results["tasks"]["sums"]["score"]["mean"] == 1.0


def test_other_limits_go_on_with_what_was_asked(run, asked, tmp_path, adds: Reply):
    run([asked], adds, rewards=RewardLimits(time_s=1.5), pictures=0)
    again, engine = run([asked], adds, rewards=RewardLimits(time_s=2.5, workers=2), pictures=0)
    assert not engine.prompts and again["tasks"]["mine"]["unscored"] == 3


def test_a_limit_that_makes_no_sense():
    with pytest.raises(UserError, match=r"rewards\.time_s is 0; it must be positive"):
        RewardLimits(time_s=0)


def test_lines_of_an_earlier_release_are_read(run, sums, tmp_path: Path, adds: Reply):
    run([sums], adds, pictures=0)
    path = tmp_path / "out/answers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "unscored"}) + "\n" for one in lines))
    assert all(one.unscored is None for one in read_answers(path))
