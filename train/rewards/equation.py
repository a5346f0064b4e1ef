"""Answers that are mathematics: right if they are equal as mathematics, however they are written.

    \\boxed{\\frac{1}{2}}   1/2   0.5   50\\%        all equal
    {1, 2}   2, 1                                    equal as sets

math-verify parses LaTeX and plain expressions and compares them symbolically, then numerically. What takes it long, or
never ends, is the caller's business: rollouts judge in processes with a time limit (train/reinforcement/scoring.py).
"""

import logging

from train.rewards.base import Attempt
from train.rewards.text import boxed

LONGEST = 2000
"""Characters of an answer that are looked at, from its end."""
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit of its own


def math(attempt: Attempt, expected: str) -> float | None:
    """1 if the answer equals the right one. The last \\boxed{...} counts where there is one; None where the right
    answer is no mathematics."""
    right = _parsed(expected)
    if not right:
        return None
    said = attempt.answer[-LONGEST:]
    answer = _parsed(f"\\boxed{{{boxed(said)}}}" if "\\boxed{" in said else said)
    return float(bool(answer) and _equal(right, answer))


def _parsed(text: str) -> list:
    from math_verify import parse  # sympy takes a second to import

    try:
        found = parse(text, parsing_timeout=0)
        return found or parse(f"\\boxed{{{text}}}", parsing_timeout=0)
    except Exception:  # of sympy and ANTLR, on whatever a model writes
        return []


def _equal(right: list, answer: list) -> bool:
    from math_verify import verify

    try:
        return bool(verify(right, answer, timeout_seconds=0))
    except Exception:
        return False
