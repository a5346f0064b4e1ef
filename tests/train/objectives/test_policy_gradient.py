"""Policy gradients by the numbers of reference 10, and by the mistakes of its section 0 that are easy to make."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from data.batch import Role
from data.pack import filler
from tests.train.objectives.attempts import Attempt, moved, row, settings, update
from train.objectives.policy_gradient import build
from train.rl_config import Aggregate, Correction, KLEstimator, PolicyLoss, Ratio

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def engine(old: list[float], k: tuple[float, ...]) -> list[float]:
    """The engine's log-probabilities, so that p_old / p_engine is k."""
    return [at - math.log(one) for at, one in zip(old, k, strict=True)]


PAPER = [  # GSPO.1
    moved([-1.0, -0.7], [0.0020, -0.0014], advantage=1.0),
    moved([-0.3, -2.0, -1.2, -0.9], [0.0010, -0.0030, 0.0006, -0.0006], advantage=-1.0),
]
WIDE = [  # GSPO.2
    Attempt(logs(0.55, 0.25), logs(0.5, 0.25), advantage=2.0),
    Attempt(logs(0.1, 0.4, 0.5, 0.2), logs(0.2, 0.4, 0.5, 0.1), advantage=-1.0),
]
K = (1.0, 0.4, 4.9, 5.5, 0.51)
ONES = [-1.0] * 5
ICEPOP = [Attempt(ONES, None, advantage=1.0, engine=engine(ONES, K))]  # IcePop.2


def close(ours: object, expected: object, digits: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=digits,
        atol=digits,
    )


@dataclass(frozen=True)
class Case:
    block: str
    """Of the reference's numbers."""
    keys: dict[str, Any]
    attempts: list[Attempt]
    loss: float


OLD = [-1.0] * 4
MIXED = [moved(OLD, [0.02, -0.01, 0.03, 0.0], engine=engine(OLD, K[:4]))]  # IcePop.3
RATIOS = (-0.7, 0.0, 0.5, 2.0)
OTHER = [Attempt([-1.0, -2.0, -0.5, -0.1], [-0.3, -2.0, -1.0, -2.1])]
WORSE = [moved(OLD, RATIOS, advantage=-1.0)]
TOKEN = {"ratio": Ratio.token}
NONE = {"correction": Correction.none}
NUMBERS = [
    Case("GSPO.1", NONE, PAPER, -0.0003000225023),
    Case("GSPO.1", {**NONE, **TOKEN, "clip_high": 0.27}, PAPER, -0.0004000757604),
    Case("GSPO.2", {**NONE, **CLIP}, WIDE, -0.5488088482),
    Case("GSPO.2", {**NONE, **TOKEN}, WIDE, -0.45),
    Case("IcePop.2", TOKEN, ICEPOP, -1.282),
    Case("IcePop.2", {**TOKEN, "correction": Correction.icepop_mask}, ICEPOP, -0.6),
    Case("IcePop.2", {**TOKEN, "correction": Correction.tis}, ICEPOP, -1.182),
    Case("IcePop.2", {**TOKEN, "correction": Correction.mis}, ICEPOP, -1.91 / 5),
    Case("IcePop.2", {**TOKEN, "band": [0.0, math.inf]}, ICEPOP, -2.462),
    Case("IcePop.2", {**TOKEN, **NONE}, ICEPOP, -1.0),
    Case("IcePop.3", CLIP, MIXED, -1.489823996),
    Case("IcePop.3", {**CLIP, "correction": Correction.icepop_sequence}, MIXED, -1.830196140),
    Case("OTHER", {**NONE, **TOKEN}, WORSE, (0.8 + 1 + 1.648721271 + 7.389056099) / 4),
    Case("OTHER", {**NONE, **TOKEN, "dual_clip": 3.0}, WORSE, (0.8 + 1 + 1.648721271 + 3) / 4),
    Case("OTHER", {**NONE, **TOKEN, "dual_clip": 2.0}, WORSE, (0.8 + 1 + 1.648721271 + 2) / 4),
    Case(
        "OTHER",
        {**NONE, **TOKEN, "loss": PolicyLoss.cispo, "aggregate": Aggregate.token, "cispo_cap": 1.28},
        OTHER,
        0.8161463259,
    ),
    Case(
        "OTHER",
        {**NONE, **TOKEN, "loss": PolicyLoss.sapo},
        WORSE,
        (1.412749997 + 1.904761905 + 2.529512204 + 3.80488002) / 4,
    ),
    Case("OTHER", {**NONE, "loss": PolicyLoss.gmpo}, WORSE, 1.690458848),
    Case("OTHER", {**NONE, "loss": PolicyLoss.gmpo}, [moved(OLD, RATIOS)], -1.025315121),
]


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case.block)
def test_numbers(case):
    close(update(settings(**case.keys), case.attempts).loss, case.loss)


def test_gspo_in_the_clip_range_of_the_paper():
    """GSPO.1. A product in place of the mean gives -.00035, a padded width another ratio, a token mean +.333."""
    learned = update(settings(), PAPER)
    close(learned.loss, -0.0003000225023)
    close(learned.metrics["loss"], learned.loss)
    close(learned.gradients[0], [-0.2500750113] * 2)
    assert learned.gradients[1] == [0.0] * 4


def test_gspo_and_grpo_where_little_is_clipped():
    """GSPO.2"""
    gspo = update(settings(**CLIP), WIDE)
    close(gspo.loss, -0.5488088482)
    close(gspo.gradients[0], [-0.5244044241] * 2)
    close(gspo.gradients[1], [0.125] * 4)
    grpo = update(settings(ratio=Ratio.token), WIDE)
    close(grpo.loss, -0.45)
    close(grpo.gradients[0], [-0.55, -0.5])
    close(grpo.gradients[1], [0.0, 0.125, 0.125, 0.25])


def test_observations_are_in_neither_ratio_nor_length():
    """GSPO.3: two tokens of a tool, with log-ratios of 5 and whatever else in their streams."""
    tool = [True, False, False, True]
    attempt = moved([-1.0] * 4, [0.002, 5.0, 5.0, -0.0014], sampled=tool)
    for junk in (0.0, 7.0, math.nan, math.inf):
        learned = update(settings(**CLIP), [attempt], junk=junk)
        close(learned.loss, -1.000300045)
        close(learned.gradients[0], [-0.5001500225, 0.0, 0.0, -0.5001500225])


def policy_logprobs(logits_V: torch.Tensor, written: list[list[int]]) -> list[torch.Tensor]:
    logprob_V = logits_V.log_softmax(0)
    return [logprob_V[torch.tensor(tokens)] for tokens in written]


@pytest.mark.parametrize("ratio", Ratio)
def test_the_gradient_of_a_softmax_policy(ratio):
    """GSPO.4: equation 10 of the paper, and REINFORCE on the first update, where every ratio is 1."""
    written, advantages = [[0, 1], [2, 0, 3, 0]], (1.0, -1.0)
    old_V = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    new_V = torch.tensor([0.3, -0.1, 0.2, -0.2], dtype=torch.float64)

    def gradient(old_V: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        logits_V = new_V.clone().requires_grad_()
        new = policy_logprobs(logits_V, written)
        old = None if old_V is None else policy_logprobs(old_V, written)
        attempts = [
            Attempt(new[i].tolist(), None if old is None else old[i].tolist(), advantage=advantages[i]) for i in (0, 1)
        ]
        learned = update(settings(ratio=ratio, clip_low=0.3, clip_high=0.3), attempts)
        torch.autograd.backward(new, [torch.tensor(one, dtype=torch.float64) for one in learned.gradients])
        assert logits_V.grad is not None
        return learned.loss, logits_V.grad

    if ratio is Ratio.sequence:
        loss, gradient_V = gradient(old_V)
        close(loss, -0.06792469839)
        close(gradient_V.tolist(), [-0.01261371421, -0.2747232326, 0.1468526944, 0.1404842523])
    loss, gradient_V = gradient(None)
    close(loss, 0.0)  # - mean of A
    close(gradient_V.tolist(), [0.0, -0.25, 0.125, 0.125])


@pytest.mark.parametrize(
    "aggregate, expected",
    [(Aggregate.sequence, 1.5), (Aggregate.token, 8 / 6), (Aggregate.length, 0.4), (Aggregate.sequence_sum, 4.0)],
)
def test_aggregates(aggregate, expected):
    """AGG: losses of (1, 3) and (1, 1, 1, 1); longest attempt 10."""
    attempts = [
        Attempt([-1.0] * 2, None, advantage=[-1.0, -3.0]),
        Attempt([-1.0] * 4, None, advantage=[-1.0] * 4),
    ]
    longest = 10 if aggregate is Aggregate.length else None
    learned = update(settings(ratio=Ratio.token, aggregate=aggregate, max_length=longest), attempts)
    close(learned.loss, expected)
    close(learned.metrics["loss"], expected)


@pytest.mark.parametrize(
    "correction, band, weights",
    [
        (Correction.none, None, [1] * 5),
        (Correction.icepop, [0.5, 5.0], [1, 0, 4.9, 0, 0.51]),
        (Correction.icepop, [0.0, math.inf], list(K)),
        (Correction.icepop_mask, [0.5, 5.0], [1, 0, 1, 0, 1]),
        (Correction.icepop_mask, [0.0, math.inf], [1] * 5),
        (Correction.tis, None, [1, 0.4, 2, 2, 0.51]),
        (Correction.mis, None, [1, 0.4, 0, 0, 0.51]),
        (Correction.icepop_sequence, [0.5, 5.0], [5.4978 ** (1 / 5)] * 5),
        (Correction.icepop_sequence, [0.5, 1.4], [0] * 5),
        (Correction.icepop_mask_sequence, [0.5, 1.5], [1] * 5),
        (Correction.icepop_mask_sequence, [0.5, 1.4], [0] * 5),
        (Correction.mis_product, [0.0, 6.0], [5.4978] * 5),
        (Correction.mis_product, None, [0] * 5),
        (Correction.tis_product, None, [2] * 5),
        (Correction.icepop_mask_product, [0.5, 6.0], [1] * 5),
        (Correction.icepop_mask_product, [0.5, 5.0], [0] * 5),
    ],
)
def test_corrections(correction, band, weights):
    """IcePop.1 and .2, on the first update, where every ratio is 1 and A is 1: the loss is - mean of the weights."""
    for ratio in Ratio:
        learned = update(settings(ratio=ratio, correction=correction, band=band), ICEPOP)
        close(learned.loss, -sum(weights) / 5)
        close(learned.gradients[0], [-weight / 5 for weight in weights])
        assert all(slope == 0 for slope, weight in zip(learned.gradients[0], weights, strict=True) if weight == 0)
    if band == [0.5, 5.0] and correction is Correction.icepop:
        close(learned.loss, -1.282)


def test_icepop_and_gspo():
    """IcePop.3: what a token's weight leaves out has no gradient at all, and the ratio is over all tokens. Were the
    gradient to go through the attempt's ratio, every token would have -.37246."""
    old = [-1.0] * 4
    attempt = moved(old, [0.02, -0.01, 0.03, 0.0], engine=engine(old, K[:4]))
    learned = update(settings(**CLIP), [attempt])
    close(learned.loss, -1.489823996)
    close(learned.gradients[0], [-1.010050167 / 4, 0, -1.010050167 * 4.9 / 4, 0])
    assert learned.gradients[0][1] == learned.gradients[0][3] == 0
    close(sum(learned.gradients[0]), -0.3724559991 * 4)
    whole = update(settings(**CLIP, correction=Correction.icepop_sequence), [attempt])
    close(whole.loss, -1.830196140)
    close(whole.gradients[0], [-1.830196140 / 4] * 4)


def test_agreement_corrects_nothing():
    for correction in Correction:
        for attempts in (PAPER, WIDE):
            assert update(settings(correction=correction), attempts) == update(
                settings(correction=Correction.none), attempts
            )


def test_off_policy_attempts_are_left_out():
    """OPSM: of three attempts sampled at log p = -1 the second has a negative advantage and is .25 > .1 away from where
    it was sampled, although only .05 from p_old."""
    sampled = [-1.0, -1.0]
    attempts = [
        Attempt([-1.2, -1.3], [-1.1, -1.1], advantage=1.0, engine=sampled),
        Attempt([-1.2, -1.3], [-1.2, -1.2], advantage=-1.0, engine=sampled),
        Attempt([-1.0, -1.1], [-1.1, -1.1], advantage=-1.0, engine=sampled),
    ]
    learned = update(settings(opsm_delta=0.1, ratio=Ratio.token, clip_low=0.5), attempts)
    assert [any(slopes) for slopes in learned.gradients] == [True, False, True]


E_ = math.exp


@pytest.mark.parametrize(
    "keys, advantage, values",
    [
        (CLIP, -1.0, (0.8, 1, 1.648721271, 7.389056099)),
        ({**CLIP, "dual_clip": 3.0}, -1.0, (0.8, 1, 1.648721271, 3)),
        ({**CLIP, "dual_clip": 2.0}, -1.0, (0.8, 1, 1.648721271, 2)),  # TRL's delta
        ({**CLIP, "dual_clip": 3.0}, 1.0, (-E_(-0.7), -1, -1.2, -1.2)),
        ({"loss": PolicyLoss.sapo}, 1.0, (-1.506954155, -2, -2.626888984, -3.993291904)),
        ({"loss": PolicyLoss.sapo}, -1.0, (1.412749997, 1.904761905, 2.529512204, 3.80488002)),
    ],
)
def test_losses_by_token(keys, advantage, values):
    """OTHER"""
    for log_ratio, value in zip(RATIOS, values, strict=True):
        learned = update(settings(ratio=Ratio.token, **keys), [moved([-1.0], [log_ratio], advantage=advantage)])
        close(learned.loss, value, 1e-8)


def test_cispo():
    """OTHER: capped at 1.28, every token has a gradient."""
    attempt = Attempt([-1.0, -2.0, -0.5, -0.1], [-1.0 + 0.7, -2.0, -0.5 - 0.5, -0.1 - 2.0])
    learned = update(settings(loss=PolicyLoss.cispo, ratio=Ratio.token, cispo_cap=1.28), [attempt])
    close(learned.loss, 0.8161463259)
    close(learned.gradients[0], [-E_(-0.7) / 4, -0.25, -1.28 / 4, -1.28 / 4])


def test_gmpo():
    """OTHER"""
    for advantage, value, live in ((1.0, -1.025315121, (1, 1, 0, 0)), (-1.0, 1.690458848, (0, 1, 1, 1))):
        learned = update(settings(loss=PolicyLoss.gmpo), [moved([-1.0] * 4, RATIOS, advantage=advantage)])
        close(learned.loss, value)
        close(learned.gradients[0], [value / 4 * one for one in live])


def test_sapo_is_reinforce_where_the_ratio_is_one():
    for ratio in Ratio:
        learned = update(settings(loss=PolicyLoss.sapo, ratio=ratio), [Attempt([-1.0, -2.0], None, advantage=-1.0)])
        close(learned.gradients[0], [0.5, 0.5])


@pytest.mark.parametrize(
    "estimator, unbiased, gradient",
    [
        (KLEstimator.k1, False, [0.0, 0.0, 0.0]),
        (KLEstimator.k1, True, [0.0955850568, -0.0926706426, -0.0029144141]),
        (KLEstimator.k2, False, [0.0955850568, -0.0926706426, -0.0029144141]),
        (KLEstimator.k3, False, [0.0967462328, -0.0987081797, 0.0019619469]),
        (KLEstimator.k3, True, [0.0955850568, -0.0926706426, -0.0029144141]),
    ],
)
def test_divergence_estimators(estimator, unbiased, gradient):
    """KL: all three outcomes, weighted by how often they are sampled; unbiased ones by another policy."""
    logits_V = torch.tensor([0.5, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    reference = logs(0.4, 0.4, 0.2)
    old_V = torch.tensor([0.2, 0.1, -0.3] if unbiased else [0.5, 0.0, -0.4], dtype=torch.float64).softmax(0)
    new_V = logits_V.log_softmax(0)
    config = settings(kl=1.0)
    config.kl_estimator, config.kl_unbiased = estimator, unbiased  # k1 alone is refused
    value, pulls = 0.0, []
    for outcome in range(3):
        old, p = old_V[outcome].log().item(), old_V[outcome].item()
        attempt = Attempt([new_V[outcome].item()], [old], advantage=0.0, reference=[reference[outcome]])
        learned = update(config, [attempt])
        value += p * learned.metrics["kl"]
        pulls.append(p * learned.gradients[0][0])
    new_V.backward(torch.tensor(pulls, dtype=torch.float64))
    assert logits_V.grad is not None
    close(logits_V.grad.tolist(), gradient)
    close(value, 0.02376172518 if estimator is KLEstimator.k2 else 0.02419244238)


def test_divergence_is_not_weighed_by_the_correction():
    """KL placement: .5 * -1 + .1 * .02 and not .5 * (-1 + .1 * .02)."""
    behind = 0.2052733  # k3 of it is about .02
    kl = math.exp(-behind) - 1 + behind
    attempt = Attempt([-1.0], None, engine=engine([-1.0], (0.5000001,)), reference=[-1.0 - behind])
    learned = update(settings(kl=0.1), [attempt])
    close(learned.loss, -0.5000001 + 0.1 * kl)
    close(learned.metrics["kl"], kl)
    masked = Attempt([-1.0], None, engine=engine([-1.0], (0.4,)), reference=[-1.0 - behind])
    close(update(settings(kl=0.1), [masked]).loss, 0.1 * kl)
    close(update(settings(kl=0.1), [masked]).gradients[0][0], 0.1 * (1 - math.exp(-behind)))


def test_the_divergence_of_an_attempt_that_is_left_out_still_counts():
    """It keeps the policy near the reference wherever that policy goes (objective.opsm_delta leaves out the rest)."""
    behind = 0.2052733
    dropped = Attempt([-1.0], [-0.5], advantage=-1.0, reference=[-1.0 - behind])
    learned = update(settings(kl=0.1, opsm_delta=0.1), [dropped])
    close(learned.loss, 0.1 * (math.exp(-behind) - 1 + behind))
    close(learned.gradients[0][0], 0.1 * (1 - math.exp(-behind)))


def test_both_sides_of_the_clip():
    """Outside on the side that the advantage has pushed to: no gradient. On the other: the full one."""
    for log_ratio, advantage, learns in ((0.5, 1.0, 0), (0.5, -1.0, 1), (-0.5, 1.0, 1), (-0.5, -1.0, 0)):
        for ratio in Ratio:
            learned = update(settings(ratio=ratio, **CLIP), [moved([-1.0], [log_ratio], advantage=advantage)])
            close(learned.gradients[0], [-advantage * math.exp(log_ratio) * learns])


def test_the_first_update_has_ratio_one_to_the_last_bit():
    noisy = Attempt([-0.1234567, -3.7654321], None, advantage=1.0)
    learned = update(settings(clip_low=0.0, clip_high=0.0), [noisy], dtype=torch.float32)
    assert learned.loss == -1.0
    assert learned.gradients[0] == [-0.5, -0.5]


def test_no_advantage_no_gradient():
    for loss in PolicyLoss:
        assert update(settings(loss=loss), [moved([-1.0, -2.0], [0.1, 0.2], advantage=0.0)]).gradients[0] == [0, 0]


def test_attempts_that_are_missing_or_masked_still_count():
    """Two attempts where four were planned: half the step, also when one more is masked as a whole."""
    whole, half = update(settings(), PAPER), update(settings(), PAPER, nominal=4)
    close(half.loss, whole.loss / 2)
    close(half.gradients[0], [slope / 2 for slope in whole.gradients[0]])
    close(half.metrics["loss"], whole.loss)  # a mean over those that are there
    masked = dataclasses.replace(PAPER[1], sampled=[False] * 4)
    silent = update(settings(), [PAPER[0], masked])
    close(silent.gradients[0], whole.gradients[0])
    assert silent.gradients[1] == [0.0] * 4


def test_old_engine_and_reference_get_no_gradient():
    logprob_T, batch = row([Attempt([-1.0, -1.1], [-1.0, -1.0], reference=[-1.2, -1.0])])
    streams = {name: getattr(batch, name).requires_grad_() for name in ("old_logprob_T", "engine_logprob_T")}
    build(settings(kl=0.1), attempts_per_update=1).loss(logprob_T, batch).total.backward()
    assert logprob_T.grad is not None and logprob_T.grad.any()
    assert all(stream.grad is None for stream in streams.values())


def test_a_row_that_keeps_ranks_in_step_says_the_same_names():
    for config in (settings(), settings(kl=0.1), settings(ratio=Ratio.token, aggregate=Aggregate.token)):
        objective = build(config, attempts_per_update=4)
        names = list(objective.loss(*row(PAPER)).metrics)
        logprob_T = torch.zeros(2, requires_grad=True)
        found = objective.loss(logprob_T, filler(0))
        assert list(found.metrics) == names and not any(value.item() for value in found.metrics.values())
        assert float(objective.count(filler(0))) == 0
        found.total.backward()
        assert logprob_T.grad is not None and not logprob_T.grad.any()


def test_units():
    masked = dataclasses.replace(PAPER[1], sampled=[True, False, True, False])
    _, batch = row([PAPER[0], masked], [PAPER[0]])
    by_attempt = build(settings(), attempts_per_update=8)
    assert (by_attempt.unit, float(by_attempt.count(batch)), by_attempt.divisor) == ("attempt", 3, 8)
    by_token = build(settings(ratio=Ratio.token, aggregate=Aggregate.token), attempts_per_update=8)
    assert (by_token.unit, float(by_token.count(batch)), by_token.divisor) == ("sampled token", 6, None)
    assert batch.roles.count(Role.ATTEMPT) == 3
