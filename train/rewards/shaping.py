"""Parts of a reward that look at how an answer was made. Reinforcement learning adds them to whether it is right
(`rewards.weights`); evaluation uses none.

    format        -1 for a bad form, else 0: see `format`
    overlong      0 up to length - cache tokens, then in a line to -1 at length, -1 beyond          DAPO, 2503.14476
    repetition    -(1 - different n-grams / n-grams) of the sampled tokens                                   2502.03373
    cosine        by length: a right answer 1 (short) to 0.5 (long), a wrong one -1 to -0.5              2502.03373
    tool_bonus    1 where a tool showed something new and the answer is right, else 0          DeepEyes, 2505.14362
    tool_errors   -1 for `most` failed calls and more, in proportion below

and, comparing the attempts at one question with each other,

    shorter       0.5 (the shortest) to -0.5 (the longest); a wrong answer at most 0       Kimi k1.5, 2501.12599
    curiosity     for looks while few attempts look, against many looks              Pixel Reasoner, 2505.15966

Each is in [-1, 1] (`base.Part`) and sees the accuracy, so that a bonus can be had by right answers alone. A bonus for
looking teaches to look; one for looking and being right, to see (reference 4.3).

    DeepEyes     accuracy 0.8, format 0.2, tool_bonus 1.2:
                 right with a look 2.0    right without 0.8    wrong with a look 0    wrong and of a bad form -0.2

Reference 4.1, 4.3, 4.4.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_model.inference.parsing import parse
from ernie_model.tokenizer import END_RESPONSE, END_THINK, END_TOOL_CALL, RESPONSE, THINK, TOOL_CALL
from train.rewards.base import Attempt, Part

ACCURACY = "accuracy"
"""The part that the question asks for."""
RIGHT = 0.5
"""An answer with more accuracy than this is right, where a part asks for right or wrong (DeepEyes)."""
GRID = 1000
"""Boxes are in thousandths."""


def format(attempt: Attempt, accuracy: float | None) -> float:
    """0, or -1 unless every turn has exactly one thought where the prompt opens one (else at most one, which it opens
    itself), at most one response, tags in pairs and calls that can be read; and unless the last one ends with an answer
    that is not empty, not longer than `attempt.max_chars`, and not cut off.
    """
    turns = attempt.turns or (attempt.text,)
    well = attempt.finished and all(_well_formed(turn, attempt.thinking) for turn in turns)
    answer = attempt.answer.strip()
    return 0.0 if well and answer and not too_long(attempt) else -1.0


def too_long(attempt: Attempt) -> bool:
    return attempt.max_chars is not None and len(attempt.answer) > attempt.max_chars


def _well_formed(turn: str, thinking: bool) -> bool:
    opened, closed = turn.count(THINK) + thinking, turn.count(END_THINK)
    if opened != closed or opened > 1 or (not thinking and opened and not turn.lstrip().startswith(THINK)):
        return False
    if turn.count(RESPONSE) != turn.count(END_RESPONSE) or turn.count(RESPONSE) > 1:
        return False
    if turn.count(TOOL_CALL) != turn.count(END_TOOL_CALL):
        return False
    said = parse(turn, in_reasoning=thinking)
    calls = turn.rpartition(END_THINK)[2].count(TOOL_CALL)  # one in a thought is none
    return not said.errors and len(said.calls) == calls


def overlong(attempt: Attempt, accuracy: float | None, *, length: int, cache: int) -> float:
    """Equation 13 of DAPO, with length 20,480 and cache 4,096 there.

    Args:
        length: tokens from which on the penalty is whole.
        cache: tokens over which it grows.
    """
    if not 0 <= cache <= length:
        raise ValueError(f"cache is {cache} and length {length}; 0 <= cache <= length.")
    beyond = attempt.num_tokens - (length - cache)
    if beyond <= 0:
        return 0.0
    return -1.0 if beyond >= cache else -beyond / cache


def repetition(attempt: Attempt, accuracy: float | None, *, size: int = 3) -> float:
    """`size`: n of the n-grams."""
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1.")
    ids = attempt.token_ids
    grams = len(ids) - size + 1
    if grams <= 0:
        return 0.0
    return len({ids[at : at + size] for at in range(grams)}) / grams - 1


def cosine(attempt: Attempt, accuracy: float | None, *, length: int) -> float | None:
    """`length`: tokens at which the curve has reached its end. None where the accuracy is."""
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1.")
    if accuracy is None:
        return None
    long, short = (0.5, 1.0) if accuracy > RIGHT else (-0.5, -1.0)
    share = min(max(attempt.num_tokens / length, 0.0), 1.0)
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * share))


def tool_bonus(
    attempt: Attempt, accuracy: float | None, *, whole: float = 0.9, same: float = 0.9, least: int = 1
) -> float:
    """1 if the answer is right (accuracy above 0.5) and there were `least` looks, else 0.

    A look is a call that worked and returned a picture. A box without area, one that covers more than `whole` of the
    picture, and one that shares more than `same` (IoU) with an earlier one are none; nor is the same call again.
    """
    if least < 1:
        raise ValueError(f"least is {least}; it must be at least 1.")
    if not (0 <= whole <= 1 and 0 <= same <= 1):
        raise ValueError(f"whole is {whole} and same {same}; both are shares, from 0 to 1.")
    if accuracy is None or accuracy <= RIGHT:
        return 0.0
    return float(len(_looks(attempt, whole, same)) >= least)


def _looks(attempt: Attempt, whole: float, same: float) -> list[Any]:
    looks: list[Any] = []
    for call in attempt.calls:
        if call.get("failed") or not call.get("images"):
            continue
        box = _box(call.get("arguments"))
        if box is None:  # not a crop: a search, for example
            seen = (str(call.get("name")), str(call.get("arguments")))
            new = seen not in looks
        else:
            seen = box
            new = 0 < _area(box) <= whole * GRID**2
            new = new and all(_overlap(box, other) <= same for other in looks if len(other) == 4)
        if new:
            looks.append(seen)
    return looks


def _box(arguments: Any) -> tuple[float, float, float, float] | None:
    """`bbox_2d` clamped to the picture, without area where its sides are swapped; None: there is none."""
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
        box = read["bbox_2d"] if isinstance(read, Mapping) else None
    except (KeyError, ValueError, RecursionError):
        return None
    try:
        x1, y1, x2, y2 = (min(max(float(value), 0.0), float(GRID)) for value in box)  # type: ignore[union-attr]
    except (TypeError, ValueError, OverflowError):
        return None if box is None else (0.0, 0.0, 0.0, 0.0)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else (0.0, 0.0, 0.0, 0.0)


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / (_area(a) + _area(b) - width * height)


def tool_errors(attempt: Attempt, accuracy: float | None, *, most: int = 1) -> float:
    """`most`: failed calls, unreadable ones among them, that cost -1."""
    if most < 1:
        raise ValueError(f"most is {most}; it must be at least 1.")
    return -min(max(attempt.num_failed_calls, 0), most) / most


PARTS: dict[str, Part] = {
    "format": format,
    "overlong": overlong,
    "repetition": repetition,
    "cosine": cosine,
    "tool_bonus": tool_bonus,
    "tool_errors": tool_errors,
}


# ------------------------------------------------------------------------------------------------- compared in a group

Comparison = Callable[..., list[float | None]]
"""(attempts, accuracies, **options) -> a `Part` of each. Those whose accuracy is None are left out: None."""


def shorter(attempts: Sequence[Attempt], accuracies: Sequence[float | None]) -> list[float | None]:
    """0.5 - (tokens - fewest) / (most - fewest) for right answers (accuracy above 0.5), for others at most 0; 0 where
    all are of one length.

        100, 200, 300 tokens right, 300 wrong:    0.5, 0, -0.5, -0.5
    """
    tokens = [one.num_tokens for one, known in zip(attempts, accuracies, strict=True) if known is not None]
    fewest, most = min(tokens, default=0), max(tokens, default=0)
    values: list[float | None] = []
    for one, accuracy in zip(attempts, accuracies, strict=True):
        if accuracy is None:
            values.append(None)
            continue
        value = 0.5 - (one.num_tokens - fewest) / (most - fewest) if most > fewest else 0.0
        values.append(value if accuracy > RIGHT else min(value, 0.0))
    return values


def curiosity(
    attempts: Sequence[Attempt],
    accuracies: Sequence[float | None],
    *,
    share: float = 0.3,
    bonus: float = 0.5,
    most: int = 1,
    cost: float = 0.05,
) -> list[float | None]:
    """bonus * max(share - r, 0) for an attempt that looks, where r is the share of the group's attempts that do, and
    -cost for each look beyond `most`. What is a look: `tool_bonus`; calls that fail are none, or they would be made for
    their own sake.
    """
    if not (0 <= share <= 1 and 0 <= bonus <= 1 and most >= 0 and cost >= 0):
        raise ValueError(
            f"share is {share}, bonus {bonus}, most {most}, cost {cost}; 0 <= share, bonus <= 1, and 0 <= most, cost."
        )
    looks = [
        None if known is None else len(_looks(one, 0.9, 0.9)) for one, known in zip(attempts, accuracies, strict=True)
    ]
    known = [count for count in looks if count is not None]
    rate = sum(count > 0 for count in known) / max(len(known), 1)

    def value(count: int) -> float:
        return max(-1.0, bonus * max(share - rate, 0.0) * (count > 0) - cost * max(count - most, 0))

    return [None if count is None else value(count) for count in looks]


COMPARISONS: dict[str, Comparison] = {"shorter": shorter, "curiosity": curiosity}
