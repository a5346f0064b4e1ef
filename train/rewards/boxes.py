"""Answers that are boxes or points, in thousandths of the picture's width and height.

ernie_model/inference/grounding.py reads them.

    grounding_f1     [{"bbox_2d": [100, 200, 300, 400], "label": "cat"}, ...]
    points           [{"point_2d": [120, 340], "label": "cat"}, ...]

Boxes are paired so that the sum of their IoU is largest (Hungarian method), equal labels only; pairs from `iou` on are
hits, and F1 = 2 hits / (boxes said + right boxes). Dividing by the right boxes alone would make spam free.

    2 right boxes, 3 said, IoU 0.8, 0.9 and 0:    F1 at 0.5 is 0.8, at 0.85 it is 0.4

Shape letters:  A answered items   G right items
"""

import math
from collections.abc import Sequence

import numpy as np

from ernie_model.inference.grounding import Box, Grounding, Point, parse_grounding
from train.rewards.base import Attempt
from train.rewards.text import normalised

CAP = 4
"""More than this many times the right number of boxes is spam, and earns nothing."""


def read(text: str, most: int = 100_000) -> Grounding | None:
    """Boxes and points of a text; None when it holds nothing of the kind, or nothing but broken ones."""
    grounding = parse_grounding(text, most=most)
    if not grounding.found or (grounding.rejected and not grounding.boxes and not grounding.points):
        return None
    return grounding


def grounding_f1(attempt: Attempt, expected: str, *, iou: float | None = 0.5, labels: bool = True) -> float | None:
    """F1 of the boxes: a pair is a hit from an IoU of `iou` on, or, with iou=None, as much of one as it overlaps, which
    tells a near miss from a far one. `labels`: only boxes with equal labels are paired, where the right answer has
    labels. Both empty: 1. More than `CAP` times as many boxes as are right: 0.
    """
    right = read(expected)
    if right is None or right.points:
        return None
    most = CAP * max(len(right.boxes), 1)
    said = read(attempt.answer, most + 1)
    if said is None or said.points or len(said.boxes) > most:
        return 0.0
    labels = labels and any(box.label for box in right.boxes)
    iou_AG = np.zeros((len(said.boxes), len(right.boxes)))
    for a, answered in enumerate(said.boxes):
        for g, box in enumerate(right.boxes):
            if not labels or _same_label(answered, box):
                iou_AG[a, g] = overlap(answered, box)
    best = paired(iou_AG)
    hits = best if iou is None else best >= iou
    return f1(float(hits.sum()), len(said.boxes), len(right.boxes))


def points(attempt: Attempt, expected: str, *, radius: float = 50.0, labels: bool = True) -> float | None:
    """F1 of the points: a hit lies within `radius` thousandths of the right point, or in the right box where the right
    answer has boxes. As many pairs as possible are hits.
    """
    right = read(expected)
    if right is None:
        return None
    places: Sequence[Box | Point] = (*right.points, *right.boxes)
    most = CAP * max(len(places), 1)
    said = read(attempt.answer, most + 1)
    if said is None or said.boxes or len(said.points) > most:
        return 0.0
    labels = labels and any(place.label for place in places)
    hit_AG = np.zeros((len(said.points), len(places)))
    for a, point in enumerate(said.points):
        for g, place in enumerate(places):
            hit_AG[a, g] = (not labels or _same_label(point, place)) and _hits(point, place, radius)
    return f1(int(paired(hit_AG).sum()), len(said.points), len(places))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    height = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Box) -> float:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def _hits(point: Point, place: Box | Point, radius: float) -> bool:
    if isinstance(place, Box):
        return place.x1 <= point.x <= place.x2 and place.y1 <= point.y <= place.y2
    return math.hypot(point.x - place.x, point.y - place.y) <= radius


def _same_label(a: Box | Point, b: Box | Point) -> bool:
    return normalised(a.label or "") == normalised(b.label or "")


def paired(value_AG: np.ndarray) -> np.ndarray:
    """The values of the pairs of rows and columns whose sum is largest."""
    from scipy.optimize import linear_sum_assignment  # half a second, of every command that knows the rewards' names

    return value_AG[linear_sum_assignment(value_AG, maximize=True)]


def f1(hits: float, said: int, right: int) -> float:
    """2 hits / (said + right): the harmonic mean of precision and recall; 1 when both are empty."""
    return 2 * hits / (said + right) if said + right else 1.0
