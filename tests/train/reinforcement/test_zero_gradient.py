"""Every attempt and every token has one fate, and what is off is told."""

import pytest

from tests.train.reinforcement.asked import attempt, group
from train.reinforcement.groups import Summary
from train.reinforcement.zero_gradient import FATES, TOKENS, Asked, Taught, asked_of, fates_of, off, table, table_text


def summary(*totals: float | None, status: str = "answered", problem: str | None = None, number: int = 0) -> Summary:
    from ernie_model.inference.agent import Status

    made = [attempt("7", total, status=Status(status), problem=problem) for total in totals]
    return group(number, *made).summary("digits")


def fates(one: Summary, **how: bool) -> list[str]:
    settings = {"usable": True, "accepted": True, "waiting": False, "held": {0, 1, 2, 3}, "mask_truncated": True} | how
    return fates_of(one, **settings)


@pytest.mark.parametrize(
    "expected, totals, how",
    [
        ("learned", (1.0, 0.0), {}),
        ("right", (1.0, 1.0), {"usable": False}),
        ("wrong", (0.0, 0.0), {"usable": False}),
        ("equal", (0.5, 0.5), {"usable": False}),
        ("learned", (1.0, 1.0), {"usable": True}),  # rollout.keep_equal
        ("waiting", (1.0, 0.0), {"accepted": False, "waiting": True}),
        ("surplus", (1.0, 0.0), {"accepted": False}),
        ("unscored", (None, None), {"usable": False}),
        ("left_out", (1.0, 0.0), {"held": set()}),
    ],
)
def test_fates_by_hand(expected, totals, how):
    assert fates(summary(*totals), **how) == [expected] * 2


def test_fates_of_single_attempts():
    assert fates(summary(1.0, 0.0, None)) == ["learned", "learned", "unscored"]
    assert fates(summary(1.0, 0.0, status="failed")) == ["failed", "failed"]
    assert fates(summary(1.0, 0.0, status="truncated")) == ["truncated", "truncated"]
    assert fates(summary(1.0, 0.0, status="timeout")) == ["truncated", "truncated"]
    assert fates(summary(1.0, 0.0, status="truncated"), mask_truncated=False) == ["learned", "learned"]
    assert fates(summary(1.0, 0.0, 0.0), held={0, 2}) == ["learned", "left_out", "learned"]


def asked(*groups: tuple[Summary, list[str]], **more: int) -> Asked:
    return asked_of(3, [one for one, _ in groups], [fate for _, fate in groups], **more)


def test_every_attempt_is_counted_once_and_reasons_are_told_by_how_often_they_occur():
    unscored = [summary(None, None, problem=f"reason {n % 2}", number=n) for n in range(3)]
    found = asked(
        (summary(1.0, 0.0), ["learned", "learned"]),
        *((one, ["unscored"] * 2) for one in unscored),
        stale=2,
        from_queue=1,
    )
    assert found.attempts == 8 and found.fates == {"unscored": 6, "learned": 2}
    assert sum(found.fates.values()) == found.attempts
    assert list(found.problems.items()) == [("reason 0", 4), ("reason 1", 2)]
    metrics = found.metrics()
    assert metrics["zero_attempts_learned"] == 0.25 and metrics["zero_attempts_wrong"] == 0
    assert sum(metrics[f"zero_attempts_{fate}"] for fate in FATES) == pytest.approx(1)
    assert metrics["zero_groups_stale"] == 2


METRICS = {
    "tokens_sampled": 200.0,
    "tokens_impossible": 0.0,
    "tokens_zero_advantage": 40.0,
    "tokens_dropped": 0.0,
    "tokens_masked": 10.0,
    "tokens_clipped": 50.0,
    "tokens_taught": 100.0,
    "tokens_unknown": 3.0,
    "attempt_tokens": 20.0,  # ten attempts have tokens
    "clipped_low": 0.2,
    "clipped_high": 0.05,
    "correction_low": 0.01,
    "correction_high": 0.04,
}


def test_what_is_left_of_the_gradient():
    taught = Taught.of(METRICS, nominal=40)
    assert taught is not None and sum(taught.fates.values()) == taught.sampled == 200
    assert set(taught.fates) == set(TOKENS)
    assert (taught.clipped_low, taught.clipped_high, taught.below, taught.above) == (40, 10, 2, 8)
    assert taught.left == pytest.approx(10 / 40 * 100 / 200)
    assert taught.metrics()["zero_tokens_clipped"] == 0.25 and taught.metrics()["zero_left"] == taught.left
    assert Taught.of({"loss": 1.0}, nominal=40) is None
    empty = Taught.of({"tokens_sampled": 0.0}, nominal=40)
    assert empty is not None and empty.left == 0


def test_what_is_off():
    fine = asked((summary(1.0, 0.0), ["learned"] * 2), (summary(0.0, 0.0), ["wrong"] * 2))
    healthy = Taught.of(METRICS | {"tokens_unknown": 0.0}, nominal=10)
    assert off(fine, healthy) == {}
    assert off(None, None) == {}
    assert set(off(fine, Taught.of(METRICS, nominal=10))) == {"unknown"}
    assert set(off(fine, Taught.of(METRICS | {"tokens_unknown": 0, "tokens_taught": 10.0}, nominal=10))) == {"left"}
    assert set(off(fine, Taught.of({"tokens_sampled": 0.0}, nominal=10))) == {"nothing"}
    masked = METRICS | {"tokens_unknown": 0.0, "tokens_masked": 30.0, "tokens_clipped": 30.0}
    assert set(off(fine, Taught.of(masked, nominal=10))) == {"masked"}
    assert set(off(asked((summary(0.0, 0.0), ["wrong"] * 2)), None)) == {"wrong"}
    bad = off(asked((summary(None, 1.0, 0.0, problem="the verifier hung"), ["failed", "unscored", "left_out"])), None)
    assert set(bad) == {"failed", "unscored", "left_out"} and "the verifier hung" in bad["unscored"]


def test_the_table_reads_as_it_should():
    found = asked((summary(1.0, 0.0), ["learned"] * 2), (summary(None, None, problem="no gold"), ["unscored"] * 2))
    assert table(found, None)[0] == ("attempts asked in rollout 3", 4, None)
    text = table_text(found, Taught.of(METRICS, nominal=40))
    assert "        2   50.0%  learned from" in text and "2 x no gold" in text
    assert "      100   50.0%  with a gradient" in text and "12.5%  of the nominal gradient is left" in text
