"""Every preference loss: its number on one pair, where policy and reference agree, its slope, and at the far ends.

Expected numbers are those of reference 7.1 and 7.3, to all their digits. The pair: log-probabilities -10 and -12, in
the reference -11 and -11.5; 5 and 4 tokens; beta 0.1.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import settings as draws
from hypothesis import strategies as st
from torch import Tensor

from data.pack import filler
from tests.train.objectives.rows import PAIR, Said, evenly, pair, row, settings
from train.dpo_config import FDivergence, PreferenceLoss
from train.objectives.dpo import build, needs_reference

LOG2 = math.log(2)
PLAIN: dict[str, Any] = {}
SMOOTH = {"label_smoothing": 0.1}
ALPHA = {"f_divergence_type": FDivergence.alpha_divergence}


class Case(NamedTuple):
    loss: str
    keys: dict[str, Any]
    at_pair: float
    at_reference: float | None
    """Where policy and reference agree; None: there is no reference, or it is not this pair's."""
    record: tuple[Said, ...] = PAIR
    """Chosen, rejected, and the chosen answer after corrupted pictures."""


FELL = (evenly(-10.2, -10.0, 5), evenly(-13.2, -11.5, 4))  # log-ratios -0.2 and -1.7
HALVES = (evenly(-2.5, None, 5), evenly(-4.0, None, 4))  # -0.5 and -1 per token
SCORED = (evenly(-10.0, -11.0, 5, score=4.0), evenly(-12.0, -11.5, 4, score=1.0))
UNEVEN = (Said([-1.0, -2, -3, -2, -2], [-1.5, -2, -3, -2, -2.5]), Said([-4.0, -3, -3, -2], [-3.5, -3, -3, -2]))
WITH_CORRUPTED = (*PAIR, evenly(-10.8, -11.0, 5))  # log-ratio 0.2

NUMBERS = [
    Case("sigmoid", PLAIN, 0.6209570478, LOG2),
    Case("sigmoid", SMOOTH, 0.6359570478, LOG2),
    Case("robust", SMOOTH, 0.6022070478, LOG2),
    Case("hinge", PLAIN, 0.85, 1),
    Case("ipo", PLAIN, 21.855625, 25),
    Case("ipo_sum", PLAIN, 12.25, 25),
    Case("exo_pair", SMOOTH, 0.4313884572, 0.5108256238),
    Case("nca_pair", PLAIN, 1.350824814, 2 * LOG2),
    Case("bco_pair", PLAIN, 1.312856308, 2 * LOG2),
    Case("sppo_hard", PLAIN, 36.25, 50),
    Case("apo_zero", PLAIN, 0.962523416, 1),
    Case("apo_down", PLAIN, 0.9875493421, 1),
    Case("discopop", PLAIN, 0.8493375793, 0.8465735903),
    Case("sigmoid_norm", PLAIN, 0.677029206, LOG2),
    Case("kto_pair", PLAIN, 0.481261708, 0.5),
    Case("sigmoid", {"sft_loss_ratio": 1.0}, 2.620957048, LOG2 + 11 / 5),
    Case("sigmoid", {"sft_loss_ratio": 0.1}, 0.8209570478, LOG2 + 0.1 * 11 / 5),
    Case("sigmoid", {"f_divergence_type": FDivergence.forward_kl}, 0.6311543836, LOG2),
    Case("sigmoid", {"f_divergence_type": FDivergence.js_divergence}, 0.6606521625, LOG2),
    Case("sigmoid", ALPHA, 0.6276909471, LOG2),
    Case("sigmoid", {"normalize_logps": True}, 0.622693434, LOG2),
    Case("sigmoid", {"normalize_logps": True, "sft_loss_ratio": 0.1}, 0.822693434, LOG2 + 0.1 * 11 / 5),
    Case("sigmoid", {"reference_free": True, "sft_loss_ratio": 1.0}, 2.598138869, None),  # CPO
    Case("simpo", {"beta": 2.0, "simpo_gamma": 1.0}, 0.3132616875, None),
    Case("simpo", {"beta": 2.0, "simpo_gamma": 1.0, **SMOOTH}, 0.4132616875, None),
    Case("dpop", PLAIN, 1.205865068, None, FELL),
    Case("dpop", {"dpop_outside": True}, 10.62095705, None, FELL),
    Case("dpop", PLAIN, 0.6209570478, LOG2),  # it rose
    Case("sigmoid", {"offset_alpha": 0.5}, 0.9126000072, None, SCORED),
    Case("sigmoid", {"ld_alpha": 0.5}, 0.6325990353, LOG2, UNEVEN),
    Case("sigmoid", {"ld_alpha": 0.5, "ld_policy_only": True}, 0.5759394199, None, UNEVEN),
    Case("or", PLAIN, math.log1p(math.exp(-0.9740769842)), None, HALVES),
    Case("orpo", PLAIN, 0.5320299785, None, HALVES),
    Case("or", {"pref_loss_ratio": 0.1, "sft_loss_ratio": 1.0}, 0.5320299785, None, HALVES),
    Case("orpo", PLAIN, 0.5 + 0.1 * LOG2, None, (HALVES[0], evenly(-2.0, None, 4))),  # equally likely
    Case("sigmoid", {"mdpo_conditional": 1.0, "mdpo_anchor": 1.0}, 1.919300675, 3 * LOG2, WITH_CORRUPTED),
    # MPO
    Case(
        "sigmoid",
        {"pref_loss_ratio": 0.8, "added_losses": {"bco_pair": 0.2}, "sft_loss_ratio": 1.0},
        0.8 * 0.6209570478 + 0.2 * 1.312856308 + 2,
        0.8 * LOG2 + 0.4 * LOG2 + 11 / 5,
    ),
]
PAIRED = [loss.value for loss in PreferenceLoss if not loss.unpaired]
NEEDED = {"exo_pair": {"label_smoothing": 0.1}}


def loss_of(loss: str, chosen: Said, rejected: Said, **keys: Any) -> float:
    logprob_T, batch = row(pair(chosen, rejected))
    return build(settings(loss, **keys)).loss(logprob_T, batch).total.item()


def at_sums(loss: str, logprob_4: Tensor, **keys: Any) -> Tensor:
    """Of policy and reference, chosen and rejected, (p_c, p_r, r_c, r_r), 5 and 4 tokens, with gradient."""
    _, batch = row(pair(*PAIR))
    place_T = torch.tensor([-1] * 2 + [0] * 5 + [-1] + [1] * 4 + [-1])
    share_T = torch.tensor([0.0] * 2 + [0.2] * 5 + [0.0] + [0.25] * 4 + [0.0], dtype=torch.float64)
    policy_T, reference_T = logprob_4[place_T] * share_T, logprob_4[2:][place_T.clamp(min=0)] * share_T
    object.__setattr__(batch, "ref_logprob_T", reference_T.detach())
    return build(settings(loss, **keys)).loss(policy_T, batch).total


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: f"{case.loss}-{'-'.join(case.keys)}")
def test_the_numbers_of_the_reference(case: Case):
    logprob_T, batch = row(pair(*case.record))
    objective = build(settings(case.loss, **case.keys))
    # ten digits were printed
    assert objective.loss(logprob_T, batch).total.item() == pytest.approx(case.at_pair, rel=1e-9, abs=0)
    if case.at_reference is not None:
        assert batch.ref_logprob_T is not None
        agreed = objective.loss(batch.ref_logprob_T, batch).total.item()
        assert agreed == pytest.approx(case.at_reference, rel=1e-9, abs=0)


def test_an_answer_of_probability_one_has_odds_too():
    logprob_T, batch = row(pair(evenly(-0.0, None, 5), HALVES[1]))
    total = build(settings("or")).loss(logprob_T.requires_grad_(), batch).total
    total.backward()
    assert total.isfinite() and logprob_T.grad is not None and logprob_T.grad.isfinite().all()


@pytest.mark.parametrize("policy_only", [False, True])
def test_length_desensitising_of_either_answer(policy_only):
    """The exchanged pair has the opposite margin, so that now the rejected answer is the longer one."""
    keys = {"ld_alpha": 0.5, "ld_policy_only": policy_only}
    z, mirrored = (math.log(math.expm1(loss_of("sigmoid", *record, **keys))) for record in (UNEVEN, UNEVEN[::-1]))
    assert mirrored == pytest.approx(-z, rel=1e-9) and abs(z) > 0.1
    assert loss_of("sigmoid", *PAIR, ld_alpha=1.0) == pytest.approx(0.6209570478, rel=1e-9)


def test_mdpo_prefers_the_true_picture_and_holds_the_chosen_answer_up():
    config = settings(mdpo_conditional=1.0, mdpo_anchor=1.0)
    metrics = build(config).loss(*row(pair(*WITH_CORRUPTED))).metrics
    assert metrics["loss_sigmoid"].item() == pytest.approx(0.6209570478, rel=1e-9)
    assert metrics["loss_conditional"].item() == pytest.approx(0.6539469673, rel=1e-9)
    assert metrics["loss_anchor"].item() == pytest.approx(0.6443966601, rel=1e-9)
    # a pair of words alone has nothing to corrupt
    mixed = build(config).loss(*row(pair(*PAIR), pair(*WITH_CORRUPTED))).metrics
    assert mixed["loss_conditional"].item() == pytest.approx(0.6539469673, rel=1e-9)
    assert build(config).loss(*row(pair(*PAIR))).metrics["loss_conditional"].item() == 0
    assert mixed["corrupted"].item() == 1  # of two
    moved = settings(mdpo_anchor=1.0, mdpo_delta=0.3)
    z = 0.1 * 1.0 - 0.3
    anchor = build(moved).loss(*row(pair(*PAIR))).metrics["loss_anchor"].item()
    assert anchor == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)


def test_every_loss_has_its_number():
    assert {case.loss for case in NUMBERS} == set(PAIRED)


# ------------------------------------------------------------------------------------------------------------- slopes


@pytest.mark.parametrize("loss", PAIRED)
def test_slopes(loss):
    """Against finite differences, token by token; no kink is near."""
    records = [pair(*PAIR), pair(evenly(-3.0, -2.0, 2), evenly(-4.0, -4.5, 7))]
    keys = {**NEEDED.get(loss, {}), "sft_loss_ratio": 0.3}
    logprob_T, batch = row(*records)
    objective = build(settings(loss, **keys))
    assert torch.autograd.gradcheck(lambda value_T: objective.loss(value_T, batch).total, logprob_T.requires_grad_())


def test_the_slope_is_the_same_on_every_token_of_an_answer():
    logprob_T, batch = row(pair(*PAIR))
    build(settings()).loss(logprob_T.requires_grad_(), batch).total.backward()
    assert logprob_T.grad is not None
    prompt, chosen, rejected = logprob_T.grad.split(batch.lengths)
    slope = 0.04625701544  # beta sigmoid(-z)
    torch.testing.assert_close(chosen[:-1], torch.full((5,), -slope, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(rejected[:-1], torch.full((4,), slope, dtype=torch.float64), rtol=1e-9, atol=0)
    assert not prompt.any() and chosen[-1] == rejected[-1] == 0


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "exo_pair", "discopop", "ipo_sum"])
def test_losses_of_margins_do_not_see_what_both_answers_gained(loss):
    keys = NEEDED.get(loss, {})
    before = loss_of(loss, *PAIR, **keys)
    after = loss_of(loss, evenly(-7.0, -11.0, 5), evenly(-9.0, -11.5, 4), **keys)
    assert after == pytest.approx(before, rel=1e-12)
    assert loss_of("apo_zero", evenly(-7.0, -11.0, 5), evenly(-9.0, -11.5, 4)) != pytest.approx(0.962523416, rel=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "sigmoid_norm", "ipo_sum"])
def test_where_both_agree_the_exchanged_pair_has_the_opposite_slope(loss):
    one, other = evenly(-11.0, -11.0, 5), evenly(-11.5, -11.5, 5)
    slopes = []
    for record in (pair(one, other), pair(other, one)):
        logprob_T, batch = row(record)
        build(settings(loss)).loss(logprob_T.requires_grad_(), batch).total.backward()
        assert logprob_T.grad is not None
        slopes.append(logprob_T.grad.split(batch.lengths)[1:])
    (chosen, rejected), (chosen_2, rejected_2) = slopes
    torch.testing.assert_close(chosen, -rejected_2)
    torch.testing.assert_close(rejected, -chosen_2)


# ------------------------------------------------------------------------------------------------------- the far ends

far = st.floats(-3000, -1e-3)


@pytest.mark.parametrize("loss", PAIRED)
@draws(max_examples=25, deadline=None)
@given(sums=st.tuples(far, far, far, far))
def test_far_from_the_reference_numbers_stay_finite(loss, sums):
    logprob_4 = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
    total = at_sums(loss, logprob_4, beta=1.0, **NEEDED.get(loss, {}))
    total.backward()
    assert total.isfinite() and logprob_4.grad is not None and logprob_4.grad.isfinite().all()
    if loss != "robust":  # which is not bounded from below
        assert total >= -1e-12


@pytest.mark.parametrize("kind", FDivergence)
@draws(max_examples=25, deadline=None)
@given(sums=st.tuples(far, far, far, far))
def test_of_every_divergence_too(kind, sums):
    logprob_4 = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
    total = at_sums("sigmoid", logprob_4, f_divergence_type=kind)
    total.backward()
    assert total.isfinite() and logprob_4.grad is not None and logprob_4.grad.isfinite().all()


def test_alpha_goes_over_into_its_neighbours():
    for alpha, neighbour in ((1.0, FDivergence.reverse_kl), (0.0, FDivergence.forward_kl)):
        keys = {**ALPHA, "f_alpha_divergence_coef": alpha}
        near = {**ALPHA, "f_alpha_divergence_coef": alpha + 1e-5}
        expected = loss_of("sigmoid", *PAIR, f_divergence_type=neighbour)
        assert loss_of("sigmoid", *PAIR, **keys) == pytest.approx(expected, rel=1e-12)
        assert loss_of("sigmoid", *PAIR, **near) == pytest.approx(expected, rel=1e-5)


def test_long_answers_lose_nothing_in_float32():
    """Sums of 3000 float32 log-probabilities near -2: float32 sums would be off by 1e-4 and more."""
    generator = torch.Generator().manual_seed(0)
    answers = [(-2 - torch.rand(3000, 2, generator=generator)).float() for _ in range(2)]
    chosen, rejected = (Said(answer[:, 0].tolist(), answer[:, 1].tolist()) for answer in answers)
    assert chosen.reference is not None and rejected.reference is not None
    gained = math.fsum(chosen.policy) - math.fsum(chosen.reference)
    exact = gained - math.fsum(rejected.policy) + math.fsum(rejected.reference)
    single = build(settings()).loss(*row(pair(chosen, rejected), dtype=torch.float32)).metrics["reward_margin"]
    assert single.item() == pytest.approx(0.1 * exact, rel=0, abs=1e-10)


@pytest.mark.parametrize("loss", PAIRED)
def test_a_row_without_pairs_keeps_ranks_in_step(loss):
    objective = build(settings(loss, **NEEDED.get(loss, {})))
    learned = objective.loss(*row(pair(*PAIR)))
    batch = filler(7)
    logprob_T = torch.zeros(2, requires_grad=True)
    total, metrics = objective.loss(logprob_T, batch)
    total.backward()
    assert objective.count(batch) == 0 and total == 0 and logprob_T.grad is not None and not logprob_T.grad.any()
    assert list(metrics) == list(learned.metrics) and not any(metrics.values())
    assert not any(value.requires_grad for value in metrics.values())
    assert needs_reference(settings(loss, **NEEDED.get(loss, {}))) == (loss not in ("simpo", "or", "orpo"))
