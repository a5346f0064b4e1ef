"""Answers that are mathematics: right if they are equal as mathematics, however they are written.

    \\boxed{\\frac{1}{2}}   1/2   0.5   so x = \\frac{1}{2}          one value
    {1, 2}   {2, 1}                                                one set
    x^2 + 2x + 1   (x+1)^2                                         one polynomial

math-verify (https://github.com/huggingface/Math-Verify) reads LaTeX and plain expressions and compares them
symbolically, then as numbers with six decimals. Some answers, 9^{9^{9}} for example, keep it busy for ever, in loops
that no signal interrupts. So it runs in a process of its own, which is killed after `TIME_S`; in a process that can be
killed anyway (train/rewards/judge.py), it runs there.
"""

import logging
import re
import threading
from multiprocessing.connection import Connection

from ernie_model.worker import Worker, limit_memory
from train.rewards.base import Attempt
from train.rewards.text import boxed

LONGEST = 2000
"""Characters of an answer that are looked at, from its end."""
TIME_S = 10.0
START_S = 60.0
MEMORY_GIB = 4.0

_COMMITTED = re.compile(r"answer\s*(?:is|:)", re.IGNORECASE)
_OPEN = re.compile(r"\b(?:or|between)\b|\\(?:lor|vee)\b", re.IGNORECASE)
_COMMAND = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
# What is written as in a program.
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
_NAMED = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp|min|max|gcd|lcm|pi)(?![A-Za-z])")


def math(attempt: Attempt, expected: str) -> float | None:
    """1 if the answer equals the right one, else 0.

    What stands in the last \\boxed{...} counts, else what follows the last "answer is" or "answer:". One that leaves
    it open ("3 or 4", "between 1 and 9") is wrong, unless the right one does so too. None where the right answer cannot
    be read as mathematics, and where the comparison takes too long.
    """
    said = attempt.answer[-LONGEST:]
    if "\\boxed{" in said:
        said = f"\\boxed{{{boxed(said)}}}"
    else:
        said = _COMMITTED.split(said)[-1]
    if _OPEN.search(said) and not _OPEN.search(expected):
        said = ""
    return compare(said, expected) if _here else _elsewhere.compare(said, expected)


def compare(said: str, expected: str) -> float | None:
    """In this process, without limits."""
    right = _read(expected)
    if not right:
        return None
    answer = _read(said)
    return float(bool(answer) and _equal(right, answer))


def _read(text: str) -> list:
    """What a text says: all of it where it is an expression, else the last expression in it. [] where there is none."""
    from math_verify import parse  # it takes a second to import

    text = _NAMED.sub(r"\\\1", _ROOT.sub(r"\\sqrt{\1}", text))
    words = _WORD.findall(_COMMAND.sub(" ", text))
    # "hello" is not h * e * l * l * o
    if any(len(word) > 3 for word in words) and not any(letter.isdigit() for letter in text):
        return []
    whole = not words and "$" not in text and "\\boxed{" not in text
    try:
        return (whole and parse(f"\\boxed{{{text}}}", parsing_timeout=0)) or parse(text, parsing_timeout=0)
    except Exception:  # of sympy and ANTLR, on whatever is written
        return []


def _equal(right: list, answer: list) -> bool:
    from math_verify import verify

    try:
        return bool(verify(right, answer, timeout_seconds=0))
    except Exception:
        return False


# ----------------------------------------------------------------------------------------------- a process of its own

_here = False


def compare_here() -> None:
    """From now on this process compares by itself: it can be killed."""
    global _here
    _here = True
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit
    compare("1", "1")  # imports


class _Elsewhere:
    def __init__(self):
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def compare(self, said: str, expected: str) -> float | None:
        with self._lock:
            if self._worker is None or not self._worker.alive:
                self._worker = Worker(__name__, environment={"PYTHONHASHSEED": "0"})
                self._worker.hello(START_S)
            try:
                return self._worker.call((said, expected), TIME_S)
            except (TimeoutError, EOFError, OSError):
                self._worker.kill()
                return None


_elsewhere = _Elsewhere()


def serve(connection: Connection) -> None:
    compare_here()
    limit_memory(MEMORY_GIB)
    connection.send("ready")
    while True:
        try:
            connection.send(compare(*connection.recv()))
        except EOFError:
            return
