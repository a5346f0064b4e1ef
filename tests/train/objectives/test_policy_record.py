"""What an update reports: by hand, over several ranks, and the entropy bonus."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batch import PackedBatch
from data.pack import filler
from tests.train import small
from tests.train.objectives.attempts import Attempt, moved, row, settings
from train.objectives.policy_gradient import build
from train.objectives.policy_record import PolicyRecord
from train.policy import PolicyOutput
from train.rl_config import Aggregate, Correction, PolicyLoss, Ratio

NAN, INF = math.nan, math.inf


def output(logprob_T: torch.Tensor, entropy_T: torch.Tensor | None = None) -> PolicyOutput:
    return PolicyOutput(logprob_T, torch.zeros_like(logprob_T, dtype=torch.bool), None, entropy_T=entropy_T)


def on_rank(rank: int, ranks: int) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=ranks)


def report(*rows: list[Attempt], accelerator: Any = None, **keys: Any) -> dict[str, float]:
    record = PolicyRecord(settings(**keys), accelerator or small.accelerator(), attempts_per_update=8)
    record.before([])
    for attempts in rows:
        logprob_T, batch = row(attempts)
        record.terms(batch, output(logprob_T))
    return record.report(record.sums())


def ks(*k: float) -> list[float]:
    """log p_engine of tokens whose log p_old is -1."""
    return [-1.0 - math.log(one) for one in k]


def test_every_token_has_one_reason():
    attempts = [
        moved([-1.0] * 3, [0.5, 0.5, 0.0], advantage=1.0, engine=ks(1.0, 9.0, 1.0)),  # clipped, masked, taught
        moved([-1.0] * 2, [0.1, 0.2], advantage=0.0, engine=ks(1.0, 9.0)),  # no advantage
        moved([-1.0] * 2, [-0.5, -0.4], advantage=-1.0),  # became too unlikely, and must not
        Attempt([-INF, -1.0, -1.0], [-1.0] * 3, 1.0, engine=[-1.0, NAN, -1.0], sampled=[True, True, False]),
        moved([-1.0] * 2, [9.0, 9.0], sampled=[False] * 2),
    ]
    found = report(attempts, ratio=Ratio.token, opsm_delta=0.3)
    tokens = {name.removeprefix("tokens_"): int(value) for name, value in found.items() if name.startswith("tokens_")}
    expected = {
        "sampled": 9,
        "impossible": 1,
        "zero_advantage": 2,
        "dropped": 2,
        "masked": 1,
        "clipped": 1,
        "taught": 2,
    }
    assert tokens == {**expected, "unknown": 1}
    assert sum(expected.values()) == 2 * expected["sampled"]
    assert found["attempts_silent"] == 1


def test_numbers_of_the_ratio():
    """GSPO.1: one attempt of two is clipped, and with it 4 of 6 tokens."""
    attempts = [
        moved([-1.0, -0.7], [0.0020, -0.0014], advantage=1.0),
        moved([-0.3, -2.0, -1.2, -0.9], [0.0010, -0.0030, 0.0006, -0.0006], advantage=-1.0),
    ]
    found = report(attempts)
    s = (math.exp(0.0003), math.exp(-0.0005))
    assert found["ratio_mean"] == pytest.approx(sum(s) / 2, rel=1e-14)
    assert found["ratio_std"] == pytest.approx((s[0] - s[1]) / 2, rel=1e-6)  # from squares: digits cancel
    assert (found["ratio_min"], found["ratio_max"]) == pytest.approx((s[1], s[0]), rel=1e-14)
    assert (found["clipped_attempts_low"], found["clipped_attempts_high"]) == (0.5, 0.0)
    assert (found["clipped_low"], found["clipped_high"]) == (pytest.approx(4 / 6), 0.0)
    by = (0.0020, -0.0014, 0.0010, -0.0030, 0.0006, -0.0006)
    assert found["kl_old_k1"] == pytest.approx(-sum(by) / 6, rel=1e-9)
    assert found["kl_old_k3"] == pytest.approx(sum(math.exp(d) - 1 - d for d in by) / 6, rel=1e-9)
    assert (found["attempt_tokens"], found["attempt_tokens_positive"], found["attempt_tokens_negative"]) == (3, 2, 4)
    assert found["zero_advantage"] == 0
    token = report(attempts, ratio=Ratio.token, clip_low=0.002, clip_high=0.0015)
    assert token["ratio_mean"] == pytest.approx(sum(map(math.exp, by)) / 6, rel=1e-14)
    assert (token["ratio_min"], token["ratio_max"]) == pytest.approx((math.exp(-0.003), math.exp(0.002)), rel=1e-14)
    assert (token["clipped_low"], token["clipped_high"]) == pytest.approx((1 / 6, 1 / 6))
    assert "clipped_attempts_low" not in token


def test_numbers_of_the_correction():
    attempts = [
        moved([-1.0] * 5, [0.0] * 5, advantage=1.0, engine=ks(1.0, 0.4, 4.9, 5.5, 0.51)),
        moved([-1.0] * 3, [0.0] * 3, advantage=-1.0, engine=ks(1.0, 1.0, 0.1)),
        moved([-1.0] * 2, [0.0] * 2, advantage=0.0),
    ]
    found = report(attempts)
    assert found["correction_mean"] == pytest.approx((1 + 4.9 + 0.51 + 2 + 2) / 10)
    assert (found["correction_low"], found["correction_high"], found["masked"]) == pytest.approx((0.2, 0.1, 0.3))
    assert (found["masked_positive"], found["masked_negative"]) == pytest.approx((2 / 5, 1 / 3))
    assert found["masked_attempts"] == pytest.approx(2 / 3)
    assert found["zero_advantage"] == pytest.approx(1 / 3)
    truncated = report(attempts, correction=Correction.tis)
    assert truncated["masked"] == 0 and truncated["correction_high"] == pytest.approx(0.2)


def test_dual_clip_and_caps():
    attempts = [moved([-1.0] * 2, [0.1, 2.0], advantage=-1.0), moved([-1.0] * 2, [0.1, 2.0], advantage=1.0)]
    assert report(attempts, ratio=Ratio.token, dual_clip=3.0)["clipped_dual"] == 0.25
    capped = report(attempts, ratio=Ratio.token, loss=PolicyLoss.cispo)
    assert capped["clipped_high"] == 0.5 and capped["tokens_taught"] == 4


def test_several_ranks_and_rows_report_what_one_row_does():
    attempts = [
        moved([-1.0] * 3, [0.5, 0.1, -0.2], advantage=1.0, engine=ks(1.0, 9.0, 2.0)),
        moved([-1.0] * 2, [-0.6, 0.2], advantage=-1.0, engine=[NAN, -1.0]),
        moved([-1.0] * 4, [0.1, 0.2, 0.3, -0.3], advantage=0.0),
    ]
    for keys in ({"clip_low": 0.1, "clip_high": 0.1}, {"ratio": Ratio.token}):
        whole = report(attempts, **keys)
        assert report(*[[one] for one in attempts], **keys) == pytest.approx(whole, rel=1e-12, abs=1e-15)
        sums = []
        for rank, share in enumerate((attempts[:1], attempts[1:], [])):
            record = PolicyRecord(settings(**keys), on_rank(rank, 3), attempts_per_update=8)
            record.before([])
            for batch in [row(share)] if share else [(torch.zeros(2), filler(0))]:
                record.terms(batch[1], output(batch[0]))
            sums.append(record.sums())
        assert record.report(torch.stack(sums).sum(0)) == pytest.approx(whole, rel=1e-12, abs=1e-15)
    # a rank without a row at all
    idle = PolicyRecord(settings(), on_rank(1, 2), attempts_per_update=8)
    idle.before([])
    first = PolicyRecord(settings(), on_rank(0, 2), attempts_per_update=8)
    first.before([])
    logprob_T, batch = row(attempts)
    first.terms(batch, output(logprob_T))
    assert first.report(first.sums() + idle.sums()) == pytest.approx(report(attempts), rel=1e-12)


def test_ranks_that_share_a_row_count_it_once():
    logprob_T, batch = row([moved([-1.0] * 3, [0.1] * 3)])
    sums = []
    for rank in (0, 1):
        record = PolicyRecord(settings(), on_rank(rank, 2), attempts_per_update=8, sequence=2)
        record.before([])
        record.terms(batch, output(logprob_T))
        sums.append(record.sums())
    assert record.report(sums[0] + sums[1])["tokens_sampled"] == 3


def test_an_update_without_a_sampled_token():
    found = report([moved([-1.0], [0.0], sampled=[False])])
    assert found["attempts_silent"] == 1 and found["tokens_sampled"] == 0 and "ratio_mean" not in found


def entropies(batch: PackedBatch) -> torch.Tensor:
    return torch.arange(1.0, batch.num_tokens + 1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("aggregate", Aggregate)
def test_the_entropy_bonus_is_a_mean_as_the_loss_is(aggregate):
    """An entropy H at every token is a loss of - weight * H * what the policy's term would be with J = 1."""
    longest = 9 if aggregate is Aggregate.length else None
    config = settings(ratio=Ratio.token, aggregate=aggregate, max_length=longest, entropy=0.5)
    attempts = [Attempt([-1.0] * 4, None, 1.0, sampled=[True, False, True, True]), Attempt([-1.0], None, 1.0)]
    logprob_T, batch = row(attempts)
    record = PolicyRecord(config, small.accelerator(), attempts_per_update=8)
    record.before([batch])
    entropy_T = entropies(batch)
    bonus = record.terms(batch, output(logprob_T, entropy_T))
    assert isinstance(bonus, torch.Tensor)
    bonus.backward()
    objective = build(config, attempts_per_update=8)
    objective.loss(logprob_T, batch).total.backward()  # with A = r = 1, d loss / d log p is - the share of a token
    assert logprob_T.grad is not None and entropy_T.grad is not None
    divisor = objective.divisor or float(objective.count(batch))
    torch.testing.assert_close(entropy_T.grad, 0.5 * logprob_T.grad / divisor, rtol=1e-12, atol=0)
    mean = (entropy_T.detach() * batch.weight_T).sum() / 4
    assert record.report(record.sums())["entropy"] == pytest.approx(mean.item())


def test_masked_tokens_have_an_entropy_of_their_own():
    """Tokens with k = 1, 9, 0.1 and one that nobody sampled; the entropy at each is its place in the row, from 1."""
    attempts = [moved([-1.0] * 4, [0.0] * 4, engine=[*ks(1.0, 9.0, 0.1), 0.0], sampled=[True, True, True, False])]
    logprob_T, batch = row(attempts)
    record = PolicyRecord(settings(), small.accelerator(), attempts_per_update=8)
    record.before([batch])
    record.terms(batch, output(logprob_T, entropies(batch)))
    found = record.report(record.sums())
    first = batch.lengths[0] + 1.0
    assert found["masked"] == pytest.approx(2 / 3)
    assert found["entropy"] == pytest.approx(first + 1) and found["entropy_masked"] == pytest.approx(first + 1.5)
    alike = [moved([-1.0], [0.0], engine=ks(1.0))]
    logprob_T, batch = row(alike)
    record.before([batch])
    record.terms(batch, output(logprob_T, entropies(batch)))
    assert "entropy_masked" not in record.report(record.sums())
