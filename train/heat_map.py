"""The load of every expert as a picture: a row for each sparse layer, a column for each expert.

┌ vision experts, step 400 ────────────────────────────────────────────────┐
│ layer  0 1 2 3 4 5 6 7 ...                     busiest  dead entropy drift│
│   0    ░░▒▒░░▓▓░░■■░░▒▒      ■ nobody chose it   1.9x     1    0.94   12 %│
│   1    ...                                                                │
│  colour: load over the layer's mean   1/4  1/2  1  2x  4x                 │
└───────────────────────────────────────────────────────────────────────────┘

White is the mean load, blue is less, red is more, in powers of two, so a pool that works evenly is a white picture.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from train.contact_sheet import FAINT, INK, MARGIN, PAPER, TITLE_SIZE
from train.lettering import text_width, write

if TYPE_CHECKING:
    from train.telemetry import Layers

LABEL = 13
ROW = 22
"""Height of a layer, in pixels."""
WIDTH = 840
"""What the experts of a layer share; a column is 8 to 60 pixels wide."""
DEAD = "#1f2328"
LESS, EVEN, MORE = (33, 102, 172), (247, 247, 247), (178, 24, 43)
RANGE = 2.0
"""Powers of two from white to full colour."""


def colour(share: float) -> str | tuple[int, int, int]:
    """Of a load over the mean load: 1 is white, 1/4 and less full blue, 4 and more full red, 0 black."""
    if share == 0:
        return DEAD
    depth = max(-1.0, min(1.0, math.log2(share) / RANGE))
    end = MORE if depth > 0 else LESS
    red, green, blue = (round(a + (b - a) * abs(depth)) for a, b in zip(EVEN, end, strict=True))
    return red, green, blue


def draw(layers: "Layers", path: Path, title: str) -> None:
    """Write the picture of one pool to `path` (PNG)."""
    share_LE = layers.share_LE.tolist()
    experts = len(share_LE[0])
    cell = max(8, min(60, WIDTH // experts))
    left, top = MARGIN + 46, MARGIN + round(TITLE_SIZE * 1.5) + 40
    columns = [("busiest", [f"{max(row):.1f}x" for row in share_LE])]
    columns.append(("dead", [str(sum(value == 0 for value in row)) for row in share_LE]))
    columns.append(("entropy", [f"{value:.2f}" for value in layers.entropy_L.tolist()]))
    if layers.drift_L is not None:
        columns.append(("changed", [f"{value:.0%}" for value in layers.drift_L.tolist()]))
    table, step = left + experts * cell + 24, 72
    width = max(table + len(columns) * step, MARGIN + round(text_width(title, TITLE_SIZE)), left + 560) + MARGIN
    height = top + len(share_LE) * ROW + 58 + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), title, TITLE_SIZE, INK)
    write(pen, (MARGIN, top - 22), "layer", LABEL, FAINT)
    stride = max(1, math.ceil(26 / cell))
    for expert in range(0, experts, stride):
        _centred(pen, left + expert * cell + cell / 2, top - 22, str(expert), FAINT)
    for number, (name, _) in enumerate(columns):
        _centred(pen, table + number * step + step / 2, top - 22, name, FAINT)
    for layer, row in enumerate(share_LE):
        y = top + layer * ROW
        write(pen, (MARGIN, y + 3), str(layers.numbers[layer]), LABEL, INK)
        for expert, share in enumerate(row):
            x = left + expert * cell
            pen.rectangle((x, y, x + cell - 2, y + ROW - 2), fill=colour(share), outline="#d0d7de")
        for number, (_, values) in enumerate(columns):
            _centred(pen, table + number * step + step / 2, y + 3, values[layer], INK)
    _legend(pen, left, top + len(share_LE) * ROW + 20)
    sheet.save(path, format="PNG")


def _legend(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for share, text in ((0, "nobody"), (0.25, "1/4"), (0.5, "1/2"), (1, "mean load"), (2, "2x"), (4, "4x and more")):
        pen.rectangle((x, y, x + 18, y + 18), fill=colour(share), outline="#d0d7de")
        write(pen, (round(x) + 25, round(y) + 1), text, LABEL, FAINT)
        x += 25 + text_width(text, LABEL) + 22


def _centred(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, tone: str) -> None:
    write(pen, (round(x - text_width(text, LABEL) / 2), round(y)), text, LABEL, tone)
