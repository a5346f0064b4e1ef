"""Mathematics: what is equal, what is not, and what cannot be told."""

import time

import pytest
from trl.rewards import accuracy_reward

from train.rewards import equation
from train.rewards.base import Attempt
from train.rewards.registry import reward_named


@pytest.fixture(scope="module", autouse=True)
def _end():
    yield
    if equation._elsewhere._worker is not None:
        equation._elsewhere._worker.kill()


def score(answer: str, expected: str) -> float | None:
    return reward_named("math")(Attempt(answer=answer), expected)


@pytest.mark.parametrize(
    "answer, expected, value",
    [
        *((text, "\\frac{1}{2}", 1) for text in ("\\boxed{\\frac{1}{2}}", "1/2", "0.5", "$\\tfrac12$", "so x = 1/2")),
        *(
            (text, "7", 1)
            for text in ("7", "The answer is 7.", "x=7", "7 apples", "\\boxed{7\\text{ cm}}", "\\boxed{7")
        ),
        *((text, "7", 0) for text in ("", "8", "\\boxed{}", "\\boxed{7, 8}", "seven", "-7", "\\boxed{6<x<8}")),
        ("{1, 2}", "{2, 1}", 1),
        ("{1, 2}", "2", 0),
        ("sqrt(8)", "2\\sqrt{2}", 1),
        ("\\sin(x)^2", "1-\\cos^2(x)", 1),
        ("ln(1) + 3 pi", "3\\pi", 1),
        ("(1, 2)", "(2, 1)", 0),
        ("x^2 + 2x + 1", "(x+1)^2", 1),
        ("x^2 + 2x", "(x+1)^2", 0),
        ("\\boxed{0.333333}", "1/3", 1),
        ("\\boxed{0.33}", "1/3", 0),
        ("3.14159265", "\\pi", 1),
        ("\\sqrt{8}", "2\\sqrt{2}", 1),
        ("1,234", "1234", 1),
        # the last box, and only it
        ("\\boxed{8}, no: \\boxed{7}", "7", 1),
        ("\\boxed{7}, no: \\boxed{8}", "7", 0),
        ("The answer is 7. Is it? 7 is a prime.", "7", 1),
        # not one answer
        *((text, "7", 0) for text in ("8 or 7", "\\boxed{8 \\text{ or } 7}", "It is between 0 and 7", "7 or 8")),
        ("x = 1 or x = 2", "x = 1 or x = 2", 1),
        # what is no mathematics
        ("hello", "hello", None),
        ("7", "some words", None),
        ("7", "", None),
        ("olleh", "7", 0),
    ],
)
def test_math(answer, expected, value):
    assert score(answer, expected) == value


PROBLEMS = ["\\frac{1}{2}", "7", "x^2+1", "\\sqrt{2}", "\\{1,2\\}", "[0, 1)", "words", "-3", "12.5", "\\frac{\\pi}{4}"]
ANSWERS = [
    *PROBLEMS,
    "0.5",
    "\\dfrac{1}{2}",
    "1+x^2",
    "2^{1/2}",
    "\\{2,1\\}",
    "(0, 1)",
    "12\\frac{1}{2}",
    "\\frac{180}{4}",
]


@pytest.mark.parametrize("expected", PROBLEMS)
def test_equals_trl_where_the_answer_is_boxed(expected):
    """TRL reads only LaTeX, the right answer as it stands; we also what is not LaTeX, so it is given dollars here."""
    ours = [score(f"So it is \\boxed{{{answer}}}.", f"${expected}$") for answer in ANSWERS]
    boxed = [[{"content": f"So it is \\boxed{{{answer}}}."}] for answer in ANSWERS]
    theirs = accuracy_reward(boxed, [f"${expected}$"] * len(ANSWERS))
    if expected == "words":  # to them, the product of five variables
        assert set(ours) == {None}
    else:
        assert ours == theirs and 1.0 in ours and 0.0 in ours


def test_what_has_no_end_is_not_told(monkeypatch):
    monkeypatch.setattr(equation, "TIME_S", 2.0)
    score("7", "7")  # its process runs
    begin = time.monotonic()
    assert score("\\boxed{9^{9^{9}}}", "7") is None
    assert time.monotonic() - begin < 10
    assert score("\\boxed{7}", "7") == 1.0
