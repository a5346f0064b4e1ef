"""Statistics: by hand, by counting all cases, and by what they promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from train.evaluation import statistics
from train.evaluation.statistics import (
    bootstrap_means,
    interval,
    macro_interval,
    mcnemar,
    paired,
    pass_at_k,
    permutation,
)
from train.score import wilson


@pytest.mark.parametrize("attempts, right", [(5, 0), (5, 2), (5, 5), (4, 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(attempts, right):
    made = [1] * right + [0] * (attempts - right)
    for k in range(1, attempts + 1):
        chosen = list(itertools.combinations(made, k))
        assert pass_at_k(attempts, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_unbiased():
    """With p = 0.3 and 6 attempts its expectation is 1 - 0.7^3 for k = 3; the plug-in estimate is too small."""
    binomial = [math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) for c in range(7)]
    assert sum(w * pass_at_k(6, c, 3) for c, w in enumerate(binomial)) == pytest.approx(1 - 0.7**3)
    assert sum(w * (1 - (1 - c / 6) ** 3) for c, w in enumerate(binomial)) < 1 - 0.7**3 - 0.03


def test_pass_at_more_than_was_tried_is_refused():
    with pytest.raises(ValueError, match="pass@3 needs at least 3 attempts; there are 2"):
        pass_at_k(2, 1, 3)


def test_the_bootstrap_agrees_with_the_standard_error():
    values = np.random.default_rng(0).random(400)
    low, high = interval(values.tolist(), seed=1)
    error = values.std() / math.sqrt(400)
    # 10,000 resamples: a percentile at 2.5 % is known to about 3 % of the standard error
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_bootstrap_covers_as_often_as_it_says():
    """Shares of 60 coins with p = 0.3: of 300 intervals 95 % hold p; 4 standard deviations are 5 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        mean_B = bootstrap_means((rng.random(60) < 0.3).astype(float), seed=trial, resamples=1000)
        low, high = np.quantile(mean_B, [0.025, 0.975])
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 300 <= 1.0


def test_the_same_seed_gives_the_same_interval_in_any_chunks(monkeypatch):
    values = np.random.default_rng(0).random(50).tolist()
    first = interval(values, seed=3)
    monkeypatch.setattr(statistics, "_CHUNK", 333)
    assert interval(values, seed=3) == first != interval(values, seed=4)


def test_nothing_but_right_answers_is_no_certainty():
    assert interval([1.0] * 20, seed=0) == wilson(20, 20)
    assert interval([0.0] * 20, seed=0) == wilson(0, 20)
    assert interval([0.5] * 20, seed=0) == (0.5, 0.5)


def test_tasks_count_the_same_whatever_their_size():
    low, high = macro_interval([[0.0, 1.0] * 500, [1.0] * 5], seed=0)
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.01) and 0 < high - low < 0.05
    assert macro_interval([[0.0, 1.0] * 5], seed=0) == interval([0.0, 1.0] * 5, seed=0)


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 1), (12, 5), (3, 3)])
def test_mcnemar_is_the_binomial_test(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected)


def test_mcnemar_by_hand():
    """6 coins, at most 1 on one side: 2 * (1 + 6) / 64."""
    assert mcnemar(5, 1) == pytest.approx(14 / 64)


def test_exchanging_signs_is_mcnemar_for_right_and_wrong():
    difference = np.array([1.0] * 5 + [-1.0] + [0.0] * 30)
    assert permutation(difference, seed=0) == pytest.approx(mcnemar(5, 1))
    long = np.array([1.0] * 20 + [-1.0] * 8)  # 28 that differ: random exchanges
    p = mcnemar(20, 8)
    assert permutation(long, seed=0) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 10_000))


def test_permutation_as_scipy_has_it():
    difference = np.random.default_rng(0).normal(0.3, 1, size=10)
    expected = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert permutation(difference, seed=0) == pytest.approx(expected)


def test_paired():
    a, b = [0.0] * 10 + [1.0] * 10, [1.0] * 6 + [0.0] * 4 + [1.0] * 9 + [0.0]
    found = paired(a, b, seed=0)
    assert (found.num_questions, found.b_better, found.a_better, found.test) == (20, 6, 1, "mcnemar")
    assert (found.mean_a, found.mean_b, found.difference) == (0.5, 0.75, 0.25)
    assert found.p_value == mcnemar(6, 1)
    assert found.interval.low < 0.25 < found.interval.high
    assert paired([0.5, 1.0], [0.25, 1.0], seed=0).test == "permutation"
    same = paired(a, a, seed=0)
    assert same.p_value == 1 and same.interval == (0, 0)
    with pytest.raises(ValueError, match="20 and 19 scores"):
        paired(a, b[1:], seed=0)


def test_pairing_sees_what_apart_would_drown():
    """Hard and easy questions differ far more than the models do."""
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    found = paired(hard.tolist(), np.clip(hard + rng.normal(0.02, 0.05, 200), 0, 1).tolist(), seed=0)
    assert found.p_value < 0.001 and found.interval.low > 0
    assert interval(hard.tolist(), seed=0).high > found.mean_b
