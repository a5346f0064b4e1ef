"""Answers that are a stretch of time in a video, in seconds.

temporal_iou     right 2.0 to 6.0, said 4.0 to 8.0:  2 s shared of 6 s covered -> 1/3

{"start": 4.0, "end": 8.0}      or in words, with exactly two numbers: "From 4.0 s to 8.0 s."
"""

from typing import Any

from ernie_model.inference.grounding import last_json
from train.rewards.base import Attempt
from train.rewards.number import quantities


def temporal_iou(attempt: Attempt, expected: str, *, iou: float | None = None) -> float | None:
    """Intersection over union of the two intervals; with `iou`, 1 from that value on and else 0."""
    right = interval(expected)
    if right is None:
        return None
    said = interval(attempt.answer)
    if said is None:
        return 0.0
    shared = max(0.0, min(right[1], said[1]) - max(right[0], said[0]))
    value = shared / (right[1] - right[0] + said[1] - said[0] - shared)
    return value if iou is None else float(value >= iou)


def interval(text: str) -> tuple[float, float] | None:
    """(start, end) with 0 <= start < end < 1e9; None for anything else."""
    value: Any = last_json(text)
    if isinstance(value, dict):
        ends = [value.get("start"), value.get("end")]
    elif isinstance(value, list):
        ends = value
    else:
        ends = [one.value for one in quantities(text.replace("-", " "))]
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(ends) != 2 or len(numbers) != 2:
        return None
    start, end = numbers
    return (float(start), float(end)) if 0 <= start < end < 1e9 else None
