"""Boxes and points: read out of answers, carried between grids, drawn on the picture.

    grid       0 ... 1000 across and down, whatever the picture's size; what the model reads and writes
    original   pixels of the picture as it came:   x_px = x / 1000 * W
    resized    pixels of the picture as the model saw it; the processor may squeeze width and height differently

All are continuous: 0 is the left edge of the first pixel, W the right edge of the last. Sizes are (width, height).
Source: reference 6.3, 6.4; the `bbox_2d` of the released models refers to the original picture.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

GRID = (1000, 1000)
Size = tuple[int, int]

_BOX_KEYS = ("bbox_2d", "bbox")
_POINT_KEYS = ("point_2d", "point")
_OPENING = re.compile(r"[\[{]")
_PATIENCE = 2_000_000
"""Characters that may be read in vain; an attempt counts for 1000 at least. About 0.2 s."""
_LOCATIONS = re.compile(r"(?:<\|LOC_(?:\d{1,4}|BEGIN|SEP|END)\|>\s*)+")


@dataclass(frozen=True)
class Box:
    """A rectangle on the grid: 0 <= x1 < x2 <= 1000, and y, downwards, alike."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2


@dataclass(frozen=True)
class Point:
    """A place on the grid."""

    x: float
    y: float
    label: str | None = None


@dataclass(frozen=True)
class Grounding:
    """What an answer points at, in its order."""

    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    rejected: int = 0
    """Entries that are neither, or that came after the first `most`."""
    found: bool = False
    """There was something to read, be it an empty list."""


# ----------------------------------------------------------------------------------------------------- read an answer


def parse_grounding(text: str, *, most: int = 200) -> Grounding:
    """Boxes and points of an answer's last JSON array or object; of its location tokens if it has no JSON.

    Read are `{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}`, `{"point_2d": [x, y]}`, the bare numbers, and lists of
    these; one key may hold several. Coordinates are clamped to the grid. Rejected is what is not finite, has its
    corners swapped, or no area (after clamping). Give it the content without the reasoning (`parsing.parse`). Never
    raises.
    """
    value = last_json(text)
    if value is not None:
        entries, found = list(_entries(value, None)), True
    else:
        entries = [(numbers, None) for run in _LOCATIONS.finditer(text) for numbers in _location_runs(run[0])]
        found = bool(entries)
    boxes: list[Box] = []
    points: list[Point] = []
    rejected = 0
    for numbers, label in entries:
        item = _box_or_point(numbers, label)
        if item is None or len(boxes) + len(points) == most:
            rejected += 1
        elif isinstance(item, Box):
            boxes.append(item)
        else:
            points.append(item)
    return Grounding(tuple(boxes), tuple(points), rejected, found)


def last_json(text: str) -> Any:
    """The last array or object in a text that is JSON, fenced or among words; None if there is none.

    An array or object inside another is not one by itself. A text with thousands of brackets that never close is not
    read to its end.
    """
    decoder, at, last, patience = json.JSONDecoder(), 0, None, _PATIENCE
    while patience > 0 and (match := _OPENING.search(text, at)):
        at = match.start()
        try:
            last, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            patience -= 1000 + getattr(error, "pos", at) - at
            at += 1
    return last


def _location_runs(run: str) -> Iterable[list[int]]:
    """`<|LOC_BEGIN|><|LOC_1|> x 4 <|LOC_SEP|><|LOC_1|> x 4<|LOC_END|>` -> four numbers, four numbers."""
    for part in re.split(r"<\|LOC_(?:BEGIN|SEP|END)\|>", run):
        numbers = [int(n) for n in re.findall(r"<\|LOC_(\d+)\|>", part)]
        if numbers:
            yield numbers


def _entries(value: Any, label: str | None, depth: int = 4) -> Iterable[tuple[Any, str | None]]:
    """(numbers, label) for everything that claims to be a box or a point."""
    if not depth:
        yield None, label
    elif isinstance(value, dict):
        label = value.get("label") if isinstance(value.get("label"), str) else label
        keys = [key for key in (*_BOX_KEYS, *_POINT_KEYS) if key in value]
        if not keys:
            yield None, label
        for key in keys[:1]:
            inner = value[key]
            yield from _entries(inner, label, depth - 1) if isinstance(inner, list) else [(None, label)]
    elif isinstance(value, list) and value and not any(isinstance(part, list | dict) for part in value):
        yield value, label
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part, label, depth - 1) if isinstance(part, list | dict) else [(None, label)]


def _box_or_point(numbers: Any, label: str | None) -> Box | Point | None:
    if not isinstance(numbers, list) or len(numbers) not in (2, 4):
        return None
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < math.inf for n in numbers):
        return None
    clamped = [float(min(max(n, 0), 1000)) for n in numbers]
    if len(clamped) == 2:
        return Point(clamped[0], clamped[1], label)
    x1, y1, x2, y2 = clamped
    return Box(x1, y1, x2, y2, label) if x1 < x2 and y1 < y2 else None


# ------------------------------------------------------------------------------------------------------- between grids


def rescale(numbers: Sequence[float], old: Size, new: Size) -> tuple[float, ...]:
    """x, y, x, y, ... on a picture of size `old` -> the same places on one of size `new`. `GRID` is a size, too."""
    return tuple(n * new[place % 2] / old[place % 2] for place, n in enumerate(numbers))


def to_pixels(box: Box, size: Size) -> tuple[float, float, float, float]:
    """Edges in pixels of a picture of this size, original or resized."""
    x1, y1, x2, y2 = rescale(box.xyxy, GRID, size)
    return x1, y1, x2, y2


def to_grid(numbers: Sequence[float], size: Size) -> tuple[int, ...]:
    """x, y, ... in pixels of a picture of this size -> the nearest places of the grid, as answers write them."""
    return tuple(round(n) for n in rescale(numbers, size, GRID))


# ---------------------------------------------------------------------------------------------------- on the picture

_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")


def draw(image: Image.Image, items: Iterable[Box | Point], *, color: str | None = None) -> Image.Image:
    """A copy of the picture with boxes, points and their labels on it; equal labels have equal colours.

    Labels are written in Pillow's own font, which knows Latin letters.
    """
    items = list(items)
    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture)
    unit = max(1, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(10, 6 * unit))
    labels = list(dict.fromkeys(item.label for item in items))
    for item in items:
        ink = color or _COLORS[labels.index(item.label) % len(_COLORS)]
        if isinstance(item, Box):
            left, top, right, bottom = to_pixels(item, picture.size)
            edges = (round(left), round(top), max(round(right) - 1, round(left)), max(round(bottom) - 1, round(top)))
            pen.rectangle(edges, outline=ink, width=unit)
            at = (edges[0], edges[1])
        else:
            x, y = rescale((item.x, item.y), GRID, picture.size)
            pen.ellipse((x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit), fill=ink, outline="white")
            at = (round(x) + 3 * unit, round(y))
        if item.label:
            _write(pen, item.label, at, ink, font, picture.size)
    return picture


def _write(pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int], ink: str, font: Any, size: Size) -> None:
    """White on a plate that sits on the upper edge, inside the picture."""
    text = text if len(text) <= 40 else text[:39] + "…"
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(at[0], 0), max(size[0] - width, 0))
    y = min(max(at[1] - height, 0), max(size[1] - height, 0))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=ink)
    pen.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
