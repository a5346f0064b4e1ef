"""Parts of a reward beside being right: how an answer is written. For reinforcement learning; evaluation uses none.

    format       0, or -1: not exactly one thought where one was opened, tags left open, a call that cannot be read, no
                 answer, or one longer than `longest` characters
    overlong     0 up to length - cache tokens, then linearly to -1 at `length`, and -1 beyond      DAPO, 2503.14476
    repetition   -(1 - unique n-grams / n-grams) of the words
    cosine       by length: right 1 (short) to .5 (long), wrong -1 (short) to -.5 (long)            2502.03373
    tool_bonus   1 where a look through a tool helped: it worked, and the answer is right           DeepEyes, 2505.14362
    tool_errors  -1 for each call that failed, down to -`most`

A part is a number in [-1, 1] that the settings give a weight (`rewards.weights`). They see the accuracy, so that a
bonus can be had by right answers alone: a bonus for looking teaches to look, one for looking and being right to see.
Reference 4.1, 4.3, 4.4.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from train.rewards.base import Attempt

Part = Callable[..., float]
"""(attempt, accuracy, **options) -> in [-1, 1]. `accuracy` is None where it cannot be told. Nothing is raised."""

THINK, THOUGHT = "<think>", "</think>"
ACCURACY = "accuracy"
"""The part that the question itself asks for."""


def format(attempt: Attempt, accuracy: float | None, *, longest: int = 1000) -> float:
    """`longest`: characters of the answer; more is a way to say everything at once (reference 4.4)."""
    thoughts = attempt.text.count(THOUGHT)
    well = (
        THINK not in attempt.text  # the prompt opens the thought
        and thoughts <= 1 + attempt.num_calls
        and attempt.text.count("<tool_call>") == attempt.text.count("</tool_call>")
        and attempt.text.count("<response>") == attempt.text.count("</response>")
        and not any(call.get("name") == "" for call in attempt.calls)
        and 0 < len(attempt.answer.strip()) <= longest
        and attempt.finished
    )
    return 0.0 if well else -1.0


def overlong(attempt: Attempt, accuracy: float | None, *, length: int, cache: int) -> float:
    """`length`, `cache`: tokens. (20,480, 4,096) in the paper."""
    beyond = attempt.num_tokens - (length - cache)
    return -min(max(beyond / max(cache, 1), 0.0), 1.0)


def repetition(attempt: Attempt, accuracy: float | None, *, words: int = 4) -> float:
    """`words`: n of the n-grams."""
    said = attempt.text.split()
    grams = [tuple(said[at : at + words]) for at in range(len(said) - words + 1)]
    return -(1 - len(set(grams)) / len(grams)) if grams else 0.0


def cosine(attempt: Attempt, accuracy: float | None, *, length: int) -> float:
    """`length`: tokens at which the curve ends."""
    if accuracy is None:
        return 0.0
    end, begin = (0.5, 1.0) if accuracy >= 1 else (-0.5, -1.0)
    return end + 0.5 * (begin - end) * (1 + math.cos(math.pi * min(attempt.num_tokens / max(length, 1), 1.0)))


def tool_bonus(
    attempt: Attempt,
    accuracy: float | None,
    *,
    above: float = 0.5,
    whole: float = 0.9,
    tool: str = "image_zoom_in_tool",
) -> float:
    """
    Args:
        above: accuracy that an answer must have more than.
        whole: a look at more than this share of the picture is none.
        tool: which one; "" any that returned a picture.
    """
    if accuracy is None or accuracy <= above:
        return 0.0
    seen = set()
    for call in attempt.calls:
        if call.get("failed") or (tool and call.get("name") != tool):
            continue
        box = _box(call)
        if tool == "image_zoom_in_tool":
            if box is None or (box[2] - box[0]) * (box[3] - box[1]) > whole * 1e6:
                continue
        seen.add(box if box is not None else str(call.get("arguments")))
    return float(bool(seen))


def tool_errors(attempt: Attempt, accuracy: float | None, *, most: int = 1) -> float:
    """`most`: calls that count; the part is divided by it."""
    return -min(attempt.num_failed_calls, most) / max(most, 1)


def _box(call: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """A box with an area, clamped to the picture, in thousandths of its sides."""
    try:
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        left, top, right, bottom = (min(max(float(x), 0.0), 1000.0) for x in arguments["bbox_2d"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return (left, top, right, bottom) if right > left and bottom > top else None


PARTS: dict[str, Part] = {
    "format": format,
    "overlong": overlong,
    "repetition": repetition,
    "cosine": cosine,
    "tool_bonus": tool_bonus,
    "tool_errors": tool_errors,
}
