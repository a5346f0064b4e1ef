"""Small charts: lines, stacks, bars and shaded cells in frames with axes, drawn with Pillow.

    figure = Figure("title", "what it says", columns=2, rows=1)
    panel = figure.panel("pass rate", x=(0, 300), y=(0, 1), share=True)
    panel.line([0, 100, 300], [0.2, 0.4, 0.9], BLUE)
    panel.legend([("asked", BLUE)])
    figure.save(path)

Drawn twice as large and halved, which smooths edges.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from train.contact_sheet import FAINT, INK, MARGIN, PAPER, TITLE_SIZE
from train.lettering import text_width, write

BLUE, RED, GREEN, YELLOW, GREY, VIOLET = "#2f6fd0", "#cf4a3c", "#3f9b5b", "#e0a526", "#b4bac2", "#7d55b8"
LIGHT = "#e3e7eb"
SCALE = 2
LABEL, HEADING = 13, 16
WIDTH, HEIGHT = 540, 250
"""Of what lies inside a frame, in pixels."""
LEFT, ABOVE, BELOW, RIGHT = 56, 56, 46, 26
"""Room around it for labels."""

Colour = str | tuple[int, int, int]


class Figure:
    """Panels in rows, under a title."""

    def __init__(self, title: str, about: str, *, columns: int, rows: int):
        self.columns, self.placed = columns, 0
        self.top = MARGIN + round(TITLE_SIZE * 1.5) + round(HEADING * 1.8)
        width = 2 * MARGIN + columns * (LEFT + WIDTH + RIGHT)
        height = self.top + rows * (ABOVE + HEIGHT + BELOW) + MARGIN // 2
        self.sheet = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.pen = ImageDraw.Draw(self.sheet)
        self.write(MARGIN, MARGIN, title, TITLE_SIZE, INK)
        self.write(MARGIN, MARGIN + round(TITLE_SIZE * 1.5), about, HEADING, FAINT)

    def write(self, x: float, y: float, text: str, size: int, colour: str, *, align: float = 0) -> None:
        """align: 0 begins at x, 0.5 is centred there, 1 ends there."""
        left = x * SCALE - align * text_width(text, size * SCALE)
        write(self.pen, (round(left), round(y * SCALE)), text, size * SCALE, colour)

    def panel(
        self, heading: str, *, x: tuple[float, float], y: tuple[float, float], under: str = "", share: bool = False
    ) -> "Panel":
        """The next frame, row by row.

        Args:
            x, y: smallest and largest value.
            under: what the horizontal axis counts.
            share: the vertical axis is in per cent.
        """
        row, column = divmod(self.placed, self.columns)
        self.placed += 1
        left = MARGIN + column * (LEFT + WIDTH + RIGHT) + LEFT
        return Panel(self, left, self.top + row * (ABOVE + HEIGHT + BELOW) + ABOVE, heading, x, y, under, share)

    def save(self, path: Path) -> None:
        size = (self.sheet.width // SCALE, self.sheet.height // SCALE)
        self.sheet.resize(size, Image.Resampling.BOX).save(path, format="PNG")


class Panel:
    """One frame. Values outside of its axes are drawn at its edge."""

    def __init__(
        self,
        figure: Figure,
        left: int,
        top: int,
        heading: str,
        x: tuple[float, float],
        y: tuple[float, float],
        under: str,
        share: bool,
    ):
        self.figure, self.left, self.top, self.x, self.y = figure, left, top, _widened(x), _widened(y)
        figure.write(left, top - ABOVE + 6, heading, HEADING, INK)
        figure.write(left + WIDTH, top + HEIGHT + 24, under, LABEL, FAINT, align=1)
        for value in ticks(*self.y):
            _, at = self.at(self.x[0], value)
            self._rule((left, at), (left + WIDTH, at), LIGHT, 1)
            figure.write(left - 8, at - 8, f"{value:.0%}" if share else f"{value:g}", LABEL, FAINT, align=1)
        for value in ticks(*self.x):
            at, _ = self.at(value, self.y[0])
            self._rule((at, top + HEIGHT), (at, top + HEIGHT + 4), FAINT, 1)
            figure.write(at, top + HEIGHT + 6, f"{value:g}", LABEL, FAINT, align=0.5)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies in the picture, in pixels."""
        across = min(1.0, max(0.0, (x - self.x[0]) / (self.x[1] - self.x[0])))
        up = min(1.0, max(0.0, (y - self.y[0]) / (self.y[1] - self.y[0])))
        return self.left + across * WIDTH, self.top + (1 - up) * HEIGHT

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: Colour, *, width: int = 2) -> None:
        """Through all points; one that is not a number is a gap. A point without neighbours is a dot."""
        run: list[tuple[float, float]] = []
        for x, y in [*zip(xs, ys, strict=True), (math.nan, math.nan)]:
            if math.isfinite(y):
                run.append(self.at(x, y))
                continue
            for start, end in zip(run, run[1:], strict=False):
                self._rule(start, end, colour, width)
            if len(run) == 1:
                self._box(run[0][0] - 2, run[0][1] - 2, run[0][0] + 2, run[0][1] + 2, colour)
            run = []

    def stack(self, edges: Sequence[float], layers: Sequence[tuple[Sequence[float], Colour]]) -> None:
        """Layers on top of each other. Between two edges there is one value of each."""
        for n in range(len(edges) - 1):
            height = 0.0
            for values, colour in layers:
                self.cell(edges[n], height, edges[n + 1], height + values[n], colour)
                height += values[n]

    def cell(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, *, gap: float = 0) -> None:
        """A filled rectangle. `gap`: pixels that its right edge stays away from the next."""
        (left, bottom), (right, top) = self.at(x0, y0), self.at(x1, y1)
        if bottom > top:
            self._box(left, top, right - gap, bottom, colour)

    def mark(self, y: float, text: str, colour: str = INK) -> None:
        """A level, with its name."""
        _, at = self.at(self.x[0], y)
        self._rule((self.left, at), (self.left + WIDTH, at), colour, 1)
        self.figure.write(self.left + WIDTH - 4, at - 18, text, LABEL, colour, align=1)

    def legend(self, names: Sequence[tuple[str, Colour]]) -> None:
        """Above the frame, in the order given."""
        x = float(self.left)
        for text, colour in names:
            y = self.top - 20
            self._box(x, y, x + 11, y + 11, colour)
            self.figure.write(x + 16, y - 3, text, LABEL, FAINT)
            x += 16 + text_width(text, LABEL * SCALE) / SCALE + 14

    def _rule(self, start: tuple[float, float], end: tuple[float, float], colour: Colour, width: int) -> None:
        points = [(x * SCALE, y * SCALE) for x, y in (start, end)]
        self.figure.pen.line(points, fill=colour, width=width * SCALE)

    def _box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        # Pillow fills the last pixel too.
        corners = [round(v * SCALE) for v in (left, top, right, bottom)]
        right, bottom = max(corners[0], corners[2] - 1), max(corners[1], corners[3] - 1)
        self.figure.pen.rectangle((corners[0], corners[1], right, bottom), fill=colour)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def mixed_colour(share: float, colour: str) -> tuple[int, int, int]:
    """From white (0) to a colour (1)."""
    whole = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    red, green, blue = (round(255 + (one - 255) * min(1.0, max(0.0, share))) for one in whole)
    return red, green, blue


def _widened(axis: tuple[float, float]) -> tuple[float, float]:
    low, high = axis
    return (low, high) if high > low else (low, low + 1)
