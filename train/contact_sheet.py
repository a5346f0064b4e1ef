"""A contact sheet: held-out images with the model's answers, as one PNG. Wrong answers come first, in red.

┌ held-out digits, step 400 ─────────────────────┐
│ 351 of 360 correct (97.5 %), 9 wrong           │
│ ┏━━━━┓ ┌────┐ ┌────┐                           │
│ ┃ 7  ┃ │ 3  │ │ 8  │   image, scaled up        │
│ ┗━━━━┛ └────┘ └────┘                           │
│ said 1 3      8          the answer            │
│ is 7                     the expected answer   │
└────────────────────────────────────────────────┘
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from train.lettering import text_width, write

CELL = 112
"""Side of the square that an image is fitted into, in pixels."""
FRAME_RIGHT, FRAME_WRONG = 2, 6
CELL_SIDE = CELL + 2 * FRAME_WRONG
MARGIN, GAP = 24, 18
LABEL_SIZE, TITLE_SIZE = 17, 24
LABEL_LINES = 2
INK, FAINT, RED, GREEN, PAPER, BEHIND = "#1f2328", "#57606a", "#cf222e", "#2da44e", "#ffffff", "#eaeef2"


@dataclass(frozen=True)
class SheetItem:
    """One answered question about one image."""

    image: Image.Image
    expected: str
    answer: str
    correct: bool


def draw(
    items: Sequence[SheetItem],
    path: Path,
    title: str,
    *,
    summary: str | None = None,
    columns: int = 10,
    max_items: int = 100,
) -> None:
    """Write the sheet of `items` to `path` (PNG). Of more than `max_items`, wrong ones are shown before right ones.

    The second line is `summary`, or how many of all items are right, shown or not. Raises ValueError when
    there are none.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one item")
    shown = sorted(items, key=lambda item: item.correct)[:max_items]  # stable: otherwise in the order given
    right = sum(item.correct for item in items)
    if summary is None:
        summary = f"{right} of {len(items)} correct ({100 * right / len(items):.1f} %)"
        if right < len(items):
            summary += f", {len(items) - right} wrong"
        if len(shown) < len(items):
            summary += f"; {len(shown)} shown"

    columns = min(columns, len(shown))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    # A cell is the frame, the image, and the label under it; a row is as high as its longest label needs.
    line_height = round(LABEL_SIZE * 1.3)
    heights = [CELL_SIDE + 6 + max(len(_label(item)) for item in row) * line_height for row in rows]
    top = MARGIN + round(TITLE_SIZE * 1.5) + round(LABEL_SIZE * 1.8)
    widest_text = max(text_width(title, TITLE_SIZE), text_width(summary, LABEL_SIZE))
    width = 2 * MARGIN + max(columns * CELL_SIDE + (columns - 1) * GAP, round(widest_text))
    height = top + sum(heights) + (len(rows) - 1) * GAP + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), title, TITLE_SIZE, INK)
    write(pen, (MARGIN, MARGIN + round(TITLE_SIZE * 1.5)), summary, LABEL_SIZE, RED if right < len(items) else FAINT)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for column, item in enumerate(row):
            _cell(sheet, pen, item, MARGIN + column * (CELL_SIDE + GAP), y, line_height)
        y += row_height + GAP
    sheet.save(path, format="PNG")


def _cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, item: SheetItem, x: int, y: int, line_height: int) -> None:
    frame, colour = (FRAME_RIGHT, GREEN) if item.correct else (FRAME_WRONG, RED)
    left, top = x + FRAME_WRONG, y + FRAME_WRONG
    pen.rectangle((left - frame, top - frame, left + CELL + frame - 1, top + CELL + frame - 1), fill=colour)
    pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=BEHIND)
    picture = _fit(item.image)
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    for number, (text, tone) in enumerate(_label(item)):
        write(pen, (left, y + CELL_SIDE + 4 + number * line_height), text, LABEL_SIZE, tone)


def _label(item: SheetItem) -> list[tuple[str, str]]:
    if item.correct:
        return [(line, INK) for line in _wrap(item.answer)]
    said = [(line, RED) for line in _wrap(f"said {item.answer}" if item.answer.strip() else "said nothing")]
    return said + [(line, INK) for line in _wrap(f"expected {item.expected}")]


def _fit(image: Image.Image) -> Image.Image:
    """Scale into the cell. Small pictures keep their square pixels; large ones are smoothed."""
    image = image.convert("RGB")
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str) -> list[str]:
    """At most LABEL_LINES lines that fit under the image; the rest becomes an ellipsis."""
    text = " ".join(text.split())
    lines, rest = [], text
    while rest and len(lines) < LABEL_LINES:
        end = len(rest)
        while end > 1 and text_width(rest[:end], LABEL_SIZE) > CELL:
            end -= 1
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while len(last) > 1 and text_width(last + "...", LABEL_SIZE) > CELL:
            last = last[:-1]
        lines[-1] = last + "..."
    return lines or [""]
