"""How far engine and trainer disagree: the numbers of reference 10, by what attempts saw, over ranks, and limits."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batch import PackedBatch
from data.pack import filler
from tests.test_configs import load
from tests.train import small
from tests.train.objectives.attempts import Attempt, row, settings
from train.compose import differences, plain
from train.config import UserError
from train.policy import PolicyOutput
from train.reinforcement.mismatch import WINDOW, Mismatch
from train.rl_config import MismatchConfig

TRAINER = [math.log(p) for p in (0.50, 0.20, 0.90, 0.05)]
ENGINE = [math.log(p) for p in (0.45, 0.30, 0.90, 0.009)]
GIVEN = {  # IcePop.4
    "mean": 0.556406013,
    "max": 1.714798428,
    "p_mean": (0.05 + 0.1 + 0.041) / 4,
    "p_max": 0.1,
    "k1": -0.3536734589,
    "k3": 0.7296598744,
    "chi2": 7.385802469,
    "ess": 0.5175745307,
    "ppl": math.exp(-0.3536734589),
    "low": 0.0,
    "high": 0.25,
    "masked": 0.25,
    "unknown": 0.0,
}


def on_rank(rank: int, ranks: int) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=ranks)


def build(accelerator: Any = None, **keys: Any) -> Mismatch:
    return Mismatch(MismatchConfig(**keys), settings(), small.CONFIG, accelerator or small.accelerator())


def see(mismatch: Mismatch, *rows: tuple[torch.Tensor, PackedBatch]) -> None:
    mismatch.before([])
    for logprob_T, batch in rows:
        mismatch.terms(batch, PolicyOutput(logprob_T, torch.zeros_like(logprob_T, dtype=torch.bool), None))


def report(mismatch: Mismatch, *rows: tuple[torch.Tensor, PackedBatch]) -> dict[str, float]:
    see(mismatch, *rows)
    return mismatch.report(mismatch.sums())


def attempt(engine: list[float] = ENGINE, old: list[float] | None = None) -> Attempt:
    return Attempt(TRAINER, old, 1.0, engine=engine)


def test_numbers():
    found = report(build(), row([attempt()], junk=math.nan))
    assert found == {f"mismatch_{name}": pytest.approx(value, rel=1e-8, abs=1e-12) for name, value in GIVEN.items()}


def test_it_is_of_the_policy_that_sampled_and_of_sampled_tokens():
    moved = Attempt(
        [p - 0.5 for p in TRAINER] + [-9.0], [*TRAINER, -1.0], 1.0, [*ENGINE, -5.0], None, [True] * 4 + [False]
    )
    assert report(build(), row([moved])) == report(build(), row([attempt()]))


def test_unknown_tokens_are_counted_and_left_out():
    found = report(build(), row([attempt([*ENGINE[:2], math.nan, ENGINE[3]])]))
    assert found["mismatch_unknown"] == 0.25
    assert found["mismatch_mean"] == pytest.approx(0.556406013 * 4 / 3)
    assert report(build(), row([attempt([math.nan] * 4)])) == {"mismatch_unknown": 1.0}


def test_infinite_differences_stay_finite():
    found = report(build(), row([attempt([-math.inf, math.inf, -1.0, -1.0])]))
    assert all(map(math.isfinite, found.values())) and found["mismatch_max"] == 20


def test_engine_and_trainer_that_agree_differ_by_nothing():
    found = report(build(), row([attempt(TRAINER)]))
    zero = {"mean", "max", "p_mean", "p_max", "k1", "k3", "chi2", "low", "high", "masked", "unknown"}
    assert all(found[f"mismatch_{name}"] == 0 for name in zero)
    assert found["mismatch_ess"] == found["mismatch_ppl"] == 1


def with_media(
    rows: tuple[torch.Tensor, PackedBatch], place: int, token: int | None
) -> tuple[torch.Tensor, PackedBatch]:
    token_T = torch.zeros_like(rows[1].token_T)
    if token is not None:
        token_T[place] = token
    return rows[0], dataclasses.replace(rows[1], token_T=token_T)


def test_by_what_an_attempt_saw():
    """An image in the prompt is every attempt's (place 0); one from a tool (place 3) is that attempt's alone."""
    config = small.CONFIG
    worse, same = row([attempt(), attempt(TRAINER)]), row([attempt(TRAINER)])
    text = with_media(same, 0, None)
    found = report(build(), text, with_media(worse, 0, config.image_token_id))
    assert found["mismatch_mean_text"] == 0
    assert found["mismatch_mean_image"] == pytest.approx(GIVEN["mean"] / 2)
    assert found["mismatch_mean"] == pytest.approx(GIVEN["mean"] / 3)
    assert found["mismatch_max_image"] == found["mismatch_max"] and found["mismatch_max_text"] == 0
    assert "mismatch_mean_video" not in found
    found = report(build(), with_media(worse, 3, config.image_token_id))
    assert found["mismatch_mean_image"] == pytest.approx(GIVEN["mean"]) and found["mismatch_mean_text"] == 0
    found = report(build(), text, with_media(worse, 0, config.video_token_id))
    assert found["mismatch_mean_video"] == pytest.approx(GIVEN["mean"] / 2)
    assert not any(name.endswith("_text") for name in report(build(), text))  # it would repeat the whole


def test_limits_go_by_attempts_of_this_rollout():
    """Those of the queue are told apart: older weights sampled them."""
    older, fresh = row([attempt()]), row([attempt(TRAINER)])
    older = older[0], dataclasses.replace(older[1], waited=(1,) * older[1].num_segments)
    mismatch = build(warn={"mean": 0.1}, stop={"mean": 0.2}, patience=1)
    found = report(mismatch, older, fresh)
    assert found["mismatch_mean"] == found["mismatch_max"] == found["mismatch_masked"] == 0
    assert found["mismatch_mean_queued"] == pytest.approx(GIVEN["mean"]) and found["mismatch_masked_queued"] == 0.25
    assert "mismatch_mean_text" not in found
    assert mismatch.warnings(found) == []
    found = report(mismatch, older)
    assert "mismatch_mean" not in found and found["mismatch_mean_queued"] == pytest.approx(GIVEN["mean"])
    assert mismatch.warnings(found) == [] and not report(mismatch, fresh).get("mismatch_mean")


def test_several_ranks_report_what_one_does():
    rows = [row([attempt()]), row([attempt(TRAINER), attempt([-1.0, -2.0, -3.0, math.nan])])]
    sums = []
    for rank, mine in enumerate(([rows[0]], [rows[1]], [(torch.zeros(2), filler(0))])):
        mismatch = build(on_rank(rank, 3))
        see(mismatch, *mine)
        sums.append(mismatch.sums())
    assert mismatch.report(torch.stack(sums).sum(0)) == pytest.approx(report(build(), *rows), rel=1e-12)


def test_it_warns_once_and_stops_when_it_stays_too_far():
    mismatch = build(warn={"mean": 0.5}, stop={"mean": 0.55}, patience=2)
    bad, good = row([attempt()]), row([attempt(TRAINER)])
    said = [mismatch.warnings(report(mismatch, rows)) for rows in (bad, good, bad)]
    assert [len(one) for one in said] == [1, 0, 1]
    assert "mismatch_mean is 0.556, and mismatch.warn.mean 0.5. The run stops" in said[0][0]
    state = json.loads(json.dumps(mismatch.state_dict()))
    mismatch = build(warn={"mean": 0.5}, stop={"mean": 0.55}, patience=2)
    mismatch.load_state_dict(state)
    assert mismatch.warnings(report(mismatch, bad)) == []  # told already
    with pytest.raises(
        UserError, match=r"mismatch_mean was 0.556, 0.556 in the last 2 updates, and mismatch.stop.mean"
    ):
        mismatch.before([])


@pytest.mark.parametrize("stop", [{"mean": 0.6}, {}])
def test_a_run_that_it_ended_goes_on_with_a_larger_limit(stop):
    mismatch = build(warn={}, stop={"mean": 0.5}, patience=1)
    report(mismatch, row([attempt()]))
    later = build(warn={}, stop=stop, patience=1)
    later.load_state_dict(json.loads(json.dumps(mismatch.state_dict())))
    later.before([])
    with pytest.raises(UserError, match="mismatch.stop.mean allows 0.5"):
        mismatch.before([])
    limits = [plain(load("data=files", "data.path=-", *given, entry="rl")) for given in ((), ("mismatch.stop.mean=2",))]
    assert not differences(*limits)


def test_it_tells_of_a_slow_rise():
    mismatch = build(warn={}, stop={})
    told = []
    for update in range(2 * WINDOW + 3):
        drift = 0.02 if update < WINDOW else 0.05
        told += mismatch.warnings(report(mismatch, row([attempt([p - drift for p in TRAINER])])))
    assert len(told) == 1 and "mismatch_mean was 0.02 over 20 updates and 0.05" in told[0]
