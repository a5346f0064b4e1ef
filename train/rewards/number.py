"""Answers that are numbers.

    number     right within a tolerance; a year only exactly
    counting   a whole number, exactly; "three" is 3

What is read as a number

    1,234.5   1 234.5   1'234.5   1.234,5   12,5     1234.5 (four times) and 12.5: a lone comma parts thousands only
                                                     before exactly three digits
    12.5 %   3/4   1.2e-3   1.2 × 10^-3              12.5 with its sign, 0.75, 0.0012 (twice)
    3 thousand   1.2 million   2 bn                  3000, 1200000, 2000000000
    1.5 kΩ   250 mA                                  1500 ohm, 0.25 ampere: SI prefixes of the units in `UNITS`

The answer must commit itself: after the last \\boxed{...}, else "answer is", "answer:" or "=", there must be one
value. "Between 10 and 12" holds two, and is wrong whatever the right one is.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.rewards.base import Attempt
from train.rewards.text import boxed

LONGEST = 2000
"""Characters of an answer that are looked at, from its end; who needs more to say a number has not said one."""

PREFIXES = {"p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "c": 1e-2, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "": 1.0}
UNITS = ("ohm", "Ohm", "ohms", "Ohms", "Hz", "Pa", "Wh", "V", "A", "W", "F", "H", "m", "g", "s", "J", "N", "L")
SAME_UNIT = {"Ohm": "ohm", "ohms": "ohm", "Ohms": "ohm"}
FACTORS = {"k": 1e3, "thousand": 1e3, "million": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
WORDS: Sequence[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

_DIGITS = (
    r"\d{1,3}(?:[,' \u00a0\u202f]\d{3})+(?:\.\d+)?"  # 1,234.5
    r"|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}"  # 1.234,5 and 1.234.567
    r"|\d+(?:[.,]\d+)?|\.\d+"
)
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w.)\]])[-+])?\s?[$€£¥]?
    (?<![\w.])(?P<digits>{_DIGITS})(?![.,]?\d|[⁰¹²³⁴-⁹])
    (?:\s?[x*·]\s?10\s?\^\s?\{{?(?P<power>[-+]?\d{{1,3}})\}}?|[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?
    (?:\s?/\s?(?P<below>\d{{1,9}})(?![\w.,/]))?
    (?:\s?(?P<percent>%|percent\b)|\s?(?P<word>[A-Za-z]+)(?![\w]))?""",
    re.VERBOSE,
)
_COMMITTED = re.compile(r"answer\s*(?:is|:)|=", re.IGNORECASE)
# Signs that mean the same (not NFKC, which would make 102 of 10²); U+2126 and U+03A9 both show the ohm.
_PLAIN = str.maketrans(
    {"−": "-", "–": "-", "×": "x", "⁄": "/", "’": "'", "％": "%", "\u00b5": "u", "\u03bc": "u"}
    | dict.fromkeys("\u2126\u03a9", "ohm")
    | dict(zip("０１２３４５６７８９", "0123456789", strict=True))
)
_YEAR = re.compile(r"(?:19|20)\d\d")


@dataclass(frozen=True)
class Quantity:
    value: float
    percent: bool = False
    unit: str | None = None
    """Base unit, where a known one was written; `value` is in it."""


def quantities(text: str) -> list[Quantity]:
    """All numbers in a text, in order."""
    found = []
    for match in _NUMBER.finditer(text[-LONGEST:].translate(_PLAIN)):
        value = _plain(match["digits"])
        try:
            if match["power"] or match["exponent"]:
                value *= 10.0 ** int(match["power"] or match["exponent"])
            if match["below"]:
                value /= int(match["below"])
        except (OverflowError, ZeroDivisionError):
            continue
        factor, unit = _unit(match["word"])
        value *= -factor if match["sign"] == "-" else factor
        if math.isfinite(value):
            found.append(Quantity(value, match["percent"] is not None, unit))
    return found


def _plain(digits: str) -> float:
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}", digits):  # 1.234,5
        digits = digits.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"\d+,(?:\d{1,2}|\d{4,})", digits):  # 12,5
        digits = digits.replace(",", ".")
    return float(re.sub(r"[,' \u00a0\u202f]", "", digits))


def _unit(word: str | None) -> tuple[float, str | None]:
    """(factor, base unit) of the word behind a number: kV -> 1000, V; million -> 1e6, None; people -> 1, None."""
    if word is None:
        return 1.0, None
    if word.lower() in FACTORS:
        return FACTORS[word.lower()], None
    for unit in UNITS if word != "pm" else ():  # 3 pm is a time of the day
        if word.endswith(unit) and word[: -len(unit)] in PREFIXES:
            return PREFIXES[word[: -len(unit)]], SAME_UNIT.get(unit, unit)
    return 1.0, None


def stated(text: str) -> Quantity | None:
    """The one value that a text commits itself to; None when it names none, or several."""
    text = boxed(text[-LONGEST:])
    found = quantities(_COMMITTED.split(text)[-1]) or quantities(text)
    return found[0] if found and all(one == found[0] for one in found) else None


def number(
    attempt: Attempt, expected: str, *, tolerance: float = 0.0, relative: bool = True, years: bool = True
) -> float | None:
    """1 within the tolerance, else 0.

    Args:
        tolerance: largest difference, as a share of the right value with `relative`, else in its unit.
        years: a right answer that is written like a year (1900 to 2099, nothing else around it) is compared exactly.
    """
    right = stated(expected)
    if right is None:
        return None
    said = stated(attempt.answer)
    if said is None or (said.unit and right.unit and said.unit != right.unit):
        return 0.0
    if years and _YEAR.fullmatch(expected.strip()):
        return float(said.value == right.value and not said.percent)
    # "12.5" and "0.125" both mean 12.5 %; and "12.5 %" may answer "how many percent", whose answer is written "12.5".
    pairs = [(said.value, right.value)]
    if said.percent != right.percent:
        pairs.append((said.value / 100, right.value) if said.percent else (said.value, right.value / 100))
    return float(any(_close(a, b, tolerance, relative) for a, b in pairs))


def _close(said: float, right: float, tolerance: float, relative: bool) -> bool:
    room = tolerance * abs(right) if relative else tolerance
    return abs(said - right) <= room + 1e-9 * abs(right)  # decimal fractions are not exact: 1.05 * 20 is not 21


def counting(attempt: Attempt, expected: str, *, soft: bool = False) -> float | None:
    """1 if the count is right, else 0. With `soft`, max(0, 1 - |said - right| / max(right, 1)): rewards an always
    middling guess too, so not for evaluation.
    """
    right, said = _count(expected), _count(attempt.answer)
    if right is None or right < 0:
        return None
    if said is None:
        return 0.0
    return max(0.0, 1 - abs(said - right) / max(right, 1)) if soft else float(said == right)


def _count(text: str) -> float | None:
    said = stated(text)
    if said is not None:
        return said.value if said.value == round(said.value) and not said.percent else None
    named = {word for word in re.findall(r"[a-z]+", text[-LONGEST:].lower()) if word in WORDS}
    return float(WORDS.index(named.pop())) if len(named) == 1 and not quantities(text) else None
