"""Answers that are boxes or points, in thousandths of the picture's width and height.

    grounding_f1     [{"bbox_2d": [100, 200, 300, 400], "label": "cat"}, ...]
    points           [{"point_2d": [120, 340], "label": "cat"}, ...]

Boxes are paired so that the sum of their IoU is largest (Hungarian method), equal labels only; pairs from `iou` on are
hits, and F1 = 2 hits / (boxes said + right boxes). Dividing by the right boxes alone would make spam free.

    2 right boxes, 3 said, IoU 0.8, 0.9 and 0:    F1 at 0.5 is 0.8, at 0.85 it is 0.4
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from train.rewards.base import Attempt
from train.rewards.json_answer import last_json
from train.rewards.text import normalised

CAP = 4
"""More than this many times the right number of boxes is spam, and earns nothing."""


class Box(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)


def boxes_in(text: str) -> list[Box] | None:
    """The boxes of the last JSON in a text; None when there is none that could be boxes. Broken boxes are left out."""
    return _items(text, "bbox_2d", 4, _box)


def points_in(text: str) -> list[Box] | None:
    """The points, as boxes without extent."""
    return _items(text, "point_2d", 2, lambda xy, label: Box(xy[0], xy[1], xy[0], xy[1], label))


def _items(text: str, key: str, count: int, make: Any) -> list[Box] | None:
    value = last_json(text)
    if isinstance(value, dict) or (isinstance(value, list) and _numbers(value, count) is not None):
        value = [value]
    if not isinstance(value, list):
        return None
    found = []
    for item in value:
        label = item.get("label", "") if isinstance(item, dict) else ""
        numbers = _numbers(item.get(key) if isinstance(item, dict) else item, count)
        if numbers is not None and (box := make(numbers, normalised(str(label)))) is not None:
            found.append(box)
    return found if found or not value else None


def _numbers(value: Any, count: int) -> list[float] | None:
    """`count` numbers, clamped to 0..1000."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value):
        return None
    return [min(max(float(min(max(one, 0), 1000)), 0.0), 1000.0) for one in value]


def _box(numbers: list[float], label: str) -> Box | None:
    x1, y1, x2, y2 = numbers
    box = Box(x1, y1, x2, y2, label)
    return box if box.x1 < box.x2 and box.y1 < box.y2 else None


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    height = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    shared = width * height
    union = a.area + b.area - shared
    return shared / union if union > 0 else 0.0


def f1(hits: int, said: int, right: int) -> float:
    """2 hits / (said + right): the harmonic mean of precision and recall; 1 when both are empty."""
    return 2 * hits / (said + right) if said + right else 1.0


def paired(value_PG: np.ndarray) -> np.ndarray:
    """The values of the pairs of rows and columns whose sum is largest."""
    return value_PG[linear_sum_assignment(value_PG, maximize=True)] if value_PG.size else np.zeros(0)


def grounding_f1(attempt: Attempt, expected: str, *, iou: float = 0.5, labels: bool = True) -> float | None:
    """F1 of the boxes at an IoU threshold; `labels`: only boxes with equal labels are paired, where the right answer
    has labels. Both empty: 1. More than `CAP` times as many boxes as are right: 0.
    """
    right = boxes_in(expected)
    if right is None:
        return None
    said = boxes_in(attempt.answer)
    if said is None or len(said) > CAP * max(len(right), 1):
        return 0.0
    labels = labels and any(box.label for box in right)
    value_PG = np.array([[_iou(p, g, labels) for g in right] for p in said]).reshape(len(said), len(right))
    return f1(int((paired(value_PG) >= iou).sum()), len(said), len(right))


def _iou(a: Box, b: Box, labels: bool) -> float:
    return 0.0 if labels and a.label != b.label else iou(a, b)


def points(attempt: Attempt, expected: str, *, radius: float = 50.0, labels: bool = True) -> float | None:
    """F1 of the points: a hit lies within `radius` thousandths of the right point, or in the right box where the right
    answer has boxes. As many pairs as possible are hits.
    """
    right = points_in(expected) or boxes_in(expected)
    if right is None:
        right = points_in(expected)
    if right is None:
        return None
    said = points_in(attempt.answer)
    if said is None or len(said) > CAP * max(len(right), 1):
        return 0.0
    labels = labels and any(box.label for box in right)
    hit_PG = np.array([[_hit(p, g, radius, labels) for g in right] for p in said]).reshape(len(said), len(right))
    return f1(int(paired(hit_PG.astype(float)).sum()), len(said), len(right))


def _hit(point: Box, right: Box, radius: float, labels: bool) -> bool:
    if labels and point.label != right.label:
        return False
    if right.area:
        return right.x1 <= point.x1 <= right.x2 and right.y1 <= point.y1 <= right.y2
    return math.hypot(point.x1 - right.x1, point.y1 - right.y1) <= radius
