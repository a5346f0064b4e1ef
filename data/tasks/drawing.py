"""Pictures of tasks: shapes of a kind and colour, real handwritten digits, where they lie; PNG files.

Everything is drawn four times as large as it is shown and averaged down, so that edges are smooth.

Shape letters:  H W pixels
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 4

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 62),
    "blue": (38, 84, 200),
    "orange": (244, 142, 24),
    "purple": (132, 56, 168),
}
KINDS = ("circle", "square", "triangle", "star")

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def paper(rng: np.random.Generator) -> Colour:
    """A light background."""
    red, green, blue = (int(value) for value in rng.integers(225, 256, size=3))
    return red, green, blue


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The one that comes with Pillow."""
    return ImageFont.load_default(size)


class Canvas:
    def __init__(self, width: int, height: int, background: Colour):
        self.size = (width, height)
        self._large = Image.new("RGB", (width * SCALE, height * SCALE), background)
        self._draw = ImageDraw.Draw(self._large)
        self._pasted: list[tuple[Image.Image, tuple[int, int]]] = []

    def shape(self, kind: str, box: Box, colour: Colour) -> None:
        """A filled shape that touches all four sides of its box."""
        left, top, right, bottom = (value * SCALE for value in box)
        if kind == "circle":
            self._draw.ellipse((left, top, right - 1, bottom - 1), fill=colour)
        elif kind == "square":
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        else:
            points = TRIANGLE if kind == "triangle" else STAR
            self._draw.polygon(
                [(left + x * (right - left - 1), top + y * (bottom - top - 1)) for x, y in points], fill=colour
            )

    def frame(self, box: Box, colour: Colour, width: float) -> None:
        left, top, right, bottom = (round(value * SCALE) for value in box)
        self._draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=round(width * SCALE))

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def paste(self, picture: Image.Image, left: int, top: int) -> None:
        """A picture as it is, on top of all that is drawn."""
        self._pasted.append((picture, (left, top)))

    def picture(self) -> Image.Image:
        small = self._large.reduce(SCALE)
        for picture, place in self._pasted:
            small.paste(picture, place)
        return small


def _star() -> list[tuple[float, float]]:
    turns = [math.pi * (number / 5 - 0.5) for number in range(10)]
    points = [
        ((1 if number % 2 == 0 else 0.45) * math.cos(turn), (1 if number % 2 == 0 else 0.45) * math.sin(turn))
        for number, turn in enumerate(turns)
    ]
    low_x, low_y = (min(point[axis] for point in points) for axis in (0, 1))
    high_x, high_y = (max(point[axis] for point in points) for axis in (0, 1))
    return [((x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)) for x, y in points]


TRIANGLE = [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
STAR = _star()
"""Corners in a box of side 1."""


@dataclass(frozen=True)
class Thing:
    """What lies in a scene: a shape, or a written digit (`kind` "7")."""

    kind: str
    colour: str
    box: Box

    @property
    def label(self) -> str:
        return f"{self.colour} {self.kind}"


def free_box(
    rng: np.random.Generator, others: Sequence[Box], *, side: int, sizes: tuple[int, int], gap: float, step: int = 1
) -> Box | None:
    """A square box inside a picture of that side, apart from the others; None if there seems to be no room.

    Args:
        sizes: smallest and largest side of the box, both included; multiples of `step`, as its place is.
    """
    for _ in range(50):
        size = step * int(rng.integers(sizes[0] // step, sizes[1] // step + 1))
        left, top = (step * int(rng.integers(0, (side - size) // step + 1)) for _ in range(2))
        box = (left, top, left + size, top + size)
        if not any(overlap(box, other, gap) for other in others):
            return box
    return None


def overlap(one: Box, other: Box, gap: float) -> bool:
    """Are they less than `gap` apart?"""
    apart = one[2] + gap <= other[0] or other[2] + gap <= one[0]
    return not (apart or one[3] + gap <= other[1] or other[3] + gap <= one[1])


def show(scene: Sequence[Thing], side: int, background: Colour) -> Image.Image:
    canvas = Canvas(side, side, background)
    for thing in scene:
        canvas.shape(thing.kind, thing.box, COLOURS[thing.colour])
    return canvas.picture()
