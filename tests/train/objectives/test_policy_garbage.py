"""Whatever the engine says, and wherever trainer and engine give probability 0: weights and gradients are finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.objectives.attempts import Attempt, row, settings, update
from train.objectives.correction import LIMIT, correction_weights
from train.objectives.policy_gradient import build
from train.rl_config import Aggregate, Correction, PolicyLoss, Ratio

LOGPROB = st.one_of(st.floats(-900, 0), st.just(-math.inf))
ENGINE = st.one_of(st.floats(-60, 0), st.floats(allow_nan=True, allow_infinity=True), st.just(math.nan))
BANDS = ([0.5, 5.0], [0.0, 5.0], [0.0, math.inf])


@st.composite
def attempts(draw: st.DrawFn) -> list[Attempt]:
    made = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 4))
        streams = [draw(st.lists(of, min_size=tokens, max_size=tokens)) for of in (LOGPROB, LOGPROB, ENGINE, LOGPROB)]
        policy, old, engine, reference = streams
        advantage = draw(st.floats(-10, 10))
        made.append(
            Attempt(
                policy,
                old,
                advantage,
                engine,
                reference,
                draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)),
            )
        )
    return made


@given(
    made=attempts(),
    loss=st.sampled_from(PolicyLoss),
    ratio=st.sampled_from(Ratio),
    correction=st.sampled_from(Correction),
    band=st.sampled_from(BANDS),
    kl=st.booleans(),
    fresh=st.booleans(),
)
def test_gradients_are_finite(made, loss, ratio, correction, band, kl, fresh):
    config = settings(
        loss=loss,
        ratio=Ratio.sequence if loss is PolicyLoss.gmpo else ratio,
        correction=correction,
        band=None if correction is Correction.none else band if correction.has_lower_bound else [0.0, band[1]],
        kl=0.1 * kl,
        opsm_delta=0.1,
    )
    if fresh:
        for attempt in made:
            attempt.old = None
    learned = update(config, made, junk=math.nan)
    assert math.isfinite(learned.loss)
    for attempt, slopes in zip(made, learned.gradients, strict=True):
        assert all(map(math.isfinite, slopes))
        for slope, sampled, now, old in zip(slopes, attempt.mask, attempt.policy, attempt.before, strict=True):
            if not sampled or now == -math.inf or old == -math.inf:
                assert slope == 0


def test_a_log_probability_of_the_trainer_that_is_nan_is_not_hidden():
    """The loop leaves such an update out, and says which records it came from."""
    logprob_T, batch = row([Attempt([-1.0, math.nan], [-1.0, -1.0])])
    for config in (settings(), settings(ratio=Ratio.token, aggregate=Aggregate.token)):
        assert build(config, attempts_per_update=1).loss(logprob_T, batch).total.isnan()


TOKENS, ATTEMPT = "icepop icepop_mask tis mis", "icepop_sequence icepop_mask_sequence tis_product icepop_mask_product"


@pytest.mark.parametrize(
    ("kinds", "band", "weights"),
    [
        (TOKENS, (0.5, 5.0), ([0, 0], [0, 0], [5, 0], [0, 0])),
        (TOKENS, (0.0, math.inf), ([0, 0], [1, 1], [math.exp(LIMIT), 0], [0, 0])),
        (ATTEMPT, (0.5, 5.0), ([0, 0], [0, 0], [5, 5], [0, 0])),
        (ATTEMPT, (0.0, math.inf), ([0, 0], [0, 0], [math.exp(LIMIT)] * 2, [0, 0])),
    ],
)
def test_k_that_is_infinite_or_of_an_attempt_undefined(kinds, band, weights):
    """An engine that was sure of one token and ruled the other out: k is inf and 0, their mean and product nan."""
    log_k_T, nan_S = torch.tensor([math.inf, -math.inf]).double(), torch.tensor([math.nan]).double()
    for kind, expected in zip(kinds.split(), weights, strict=True):
        low = band[0] if Correction(kind).has_lower_bound else 0.0
        found = correction_weights(log_k_T, nan_S, nan_S, torch.zeros(2).long(), Correction(kind), low, band[1])
        torch.testing.assert_close(found.weight_T, torch.tensor(expected).double())


def test_an_unknown_engine_counts_as_one_that_agrees():
    engine = [-1.0, math.nan, -1.0 - math.log(9.0)]
    learned = update(settings(), [Attempt([-1.0] * 3, None, 1.0, engine=engine)])
    torch.testing.assert_close(torch.tensor(learned.gradients[0]), torch.tensor([-1 / 3, -1 / 3, 0.0]))
