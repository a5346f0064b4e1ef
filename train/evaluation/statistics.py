"""What a mean over questions is worth.

Questions are the unit: attempts at one question are not independent, so resampling draws questions, with all their
attempts. Everything random takes a seed, and gives the same numbers for it.

Shape letters:  Q questions   B resamples
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr

from train.score import wilson

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2_000_000
"""Numbers drawn at once."""


class Interval(NamedTuple):
    low: float
    high: float


def pass_at_k(attempts: int, right: int, k: int) -> float:
    """Probability that at least one of k attempts, drawn from those made without putting back, is right.

    1 - C(attempts - right, k) / C(attempts, k): unbiased for k <= attempts, unlike 1 - (1 - right/attempts)^k
    (M. Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1).
    """
    if not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} needs at least {k} attempts; there are {attempts}")
    return 1 - math.comb(attempts - right, k) / math.comb(attempts, k)


def bootstrap_means(value_Q: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(B,): means of as many questions, drawn with putting back."""
    rng = np.random.default_rng(seed)
    size = len(value_Q)
    chunk = max(1, _CHUNK // size)
    parts = [
        value_Q[rng.integers(size, size=(min(chunk, resamples - done), size))].mean(axis=1)
        for done in range(0, resamples, chunk)
    ]
    return np.concatenate(parts)


def percentiles(mean_B: np.ndarray) -> Interval:
    low, high = np.quantile(mean_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def interval(values: Sequence[float], seed: int) -> Interval:
    """95 % interval of a mean over questions, by the percentile bootstrap.

    Where all values are 0, or all are 1, a resample can hold nothing else and the bootstrap would claim to be certain:
    then it is Wilson's interval.
    """
    value_Q = np.asarray(values, dtype=np.float64)
    if len(set(values)) == 1 and values[0] in (0.0, 1.0):
        return Interval(*wilson(round(sum(values)), len(values)))
    return percentiles(bootstrap_means(value_Q, seed))


def macro_interval(groups: Sequence[Sequence[float]], seed: int) -> Interval:
    """95 % interval of the mean of the groups' means: questions are drawn within each group."""
    if len(groups) == 1:
        return interval(groups[0], seed)
    means = [bootstrap_means(np.asarray(values, dtype=np.float64), seed + i) for i, values in enumerate(groups)]
    return percentiles(np.mean(means, axis=0))


class Paired(NamedTuple):
    """Two models on the same questions."""

    num_questions: int
    mean_a: float
    mean_b: float
    difference: float
    """mean_b - mean_a"""
    interval: Interval
    """Of the difference; 95 %, paired bootstrap."""
    p_value: float
    """Of there being no difference."""
    test: str
    """"mcnemar" where every score is 0 or 1, else "permutation"."""
    b_better: int
    """Questions."""
    a_better: int


def paired(a: Sequence[float], b: Sequence[float], seed: int) -> Paired:
    """Scores of two models, question by question.

    The interval resamples questions. The test asks how often a difference as large comes about when the two names are
    exchanged at random in each question. For right-or-wrong scores that is McNemar's exact test: a coin for each
    question on which the two differ. Elsewhere all 2^m exchanges are looked at up to m = 16 questions that differ, else
    `RESAMPLES` random ones, themselves among them (B. Phipson and G. K. Smyth, 2010: a p-value is never 0).
    """
    a_Q, b_Q = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_Q.shape != b_Q.shape or not len(a_Q):
        raise ValueError(f"{len(a_Q)} and {len(b_Q)} scores: both need the same questions")
    difference_Q = b_Q - a_Q
    better, worse = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    binary = bool(np.isin(a_Q, (0, 1)).all() and np.isin(b_Q, (0, 1)).all())
    return Paired(
        num_questions=len(a_Q),
        mean_a=float(a_Q.mean()),
        mean_b=float(b_Q.mean()),
        difference=float(difference_Q.mean()),
        interval=percentiles(bootstrap_means(difference_Q, seed)),
        p_value=mcnemar(better, worse) if binary else permutation(difference_Q, seed),
        test="mcnemar" if binary else "permutation",
        b_better=better,
        a_better=worse,
    )


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value: how often a fair coin falls this unevenly (Q. McNemar, 1947; the exact form)."""
    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5))) if better + worse else 1.0


def permutation(difference_Q: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the sign-flip test on the mean."""
    differing = difference_Q[difference_Q != 0]
    count = len(differing)
    if not count:
        return 1.0
    observed = abs(differing.sum()) * (1 - 1e-12)  # equal sums that were added up in another order
    if count <= 16:
        sign_BQ = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(sign_BQ @ differing) >= observed).mean())
    rng = np.random.default_rng(seed)
    chunk, extreme = max(1, _CHUNK // count), 0
    for done in range(0, RESAMPLES, chunk):
        sign_BQ = rng.integers(2, size=(min(chunk, RESAMPLES - done), count)) * 2 - 1
        extreme += int((np.abs(sign_BQ @ differing) >= observed).sum())
    return (extreme + 1) / (RESAMPLES + 1)
