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
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 112
"""Side of the square that an image is fitted into, in pixels."""
FRAME_RIGHT, FRAME_WRONG = 2, 6
MARGIN, GAP = 24, 18
LABEL_SIZE, TITLE_SIZE = 17, 24
LABEL_LINES = 2
INK, FAINT, RED, GREEN, PAPER = "#1f2328", "#57606a", "#cf222e", "#2da44e", "#ffffff"

# The font that comes with Pillow covers Latin. These cover more, where they are installed.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "msyh.ttc",
    "DejaVuSans.ttf",
)


@dataclass(frozen=True)
class SheetItem:
    """One answered question about one image."""

    image: Image.Image
    expected: str
    answer: str
    correct: bool


def draw(items: Sequence[SheetItem], path: Path, title: str, *, columns: int = 10, max_items: int = 100) -> None:
    """Write the sheet of `items` to `path` (PNG). Of more than `max_items`, wrong ones are shown before right ones.

    The count in the second line is over all items, shown or not. Raises ValueError when there are none.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one item")
    shown = sorted(items, key=lambda item: item.correct)[:max_items]  # stable: otherwise in the order given
    right = sum(item.correct for item in items)
    summary = f"{right} of {len(items)} correct ({100 * right / len(items):.1f} %)"
    if right < len(items):
        summary += f", {len(items) - right} wrong"
    if len(shown) < len(items):
        summary += f"; {len(shown)} shown"

    line_height = round(LABEL_SIZE * 1.3)
    has_wrong = right < len(items)
    # A cell: frame, image, then the answer and (for wrong ones) the expected answer, two lines each at most.
    lines = max(len(label) for label in map(_label, shown))
    cell_height = CELL + 2 * FRAME_WRONG + 6 + lines * line_height
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    cell_width = CELL + 2 * FRAME_WRONG
    top = MARGIN + round(TITLE_SIZE * 1.5) + round(LABEL_SIZE * 1.8)
    title_font = _font(TITLE_SIZE, title)
    width = 2 * MARGIN + columns * cell_width + (columns - 1) * GAP
    width = max(
        width, 2 * MARGIN + round(max(title_font.getlength(title), _font(LABEL_SIZE, summary).getlength(summary)))
    )
    height = top + rows * cell_height + (rows - 1) * GAP + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, font=title_font, fill=INK)
    pen.text(
        (MARGIN, MARGIN + round(TITLE_SIZE * 1.5)),
        summary,
        font=_font(LABEL_SIZE, summary),
        fill=RED if has_wrong else FAINT,
    )
    for index, item in enumerate(shown):
        row, column = divmod(index, columns)
        x = MARGIN + column * (cell_width + GAP)
        y = top + row * (cell_height + GAP)
        _cell(sheet, pen, item, x, y, line_height)
    sheet.save(path, format="PNG")


def _cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, item: SheetItem, x: int, y: int, line_height: int) -> None:
    frame, colour = (FRAME_RIGHT, GREEN) if item.correct else (FRAME_WRONG, RED)
    left, top = x + FRAME_WRONG, y + FRAME_WRONG
    pen.rectangle((left - frame, top - frame, left + CELL + frame - 1, top + CELL + frame - 1), fill=colour)
    pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill="#eaeef2")
    picture = _fit(item.image)
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    for number, (text, tone) in enumerate(_label(item)):
        pen.text(
            (left, top + CELL + FRAME_WRONG + 4 + number * line_height), text, font=_font(LABEL_SIZE, text), fill=tone
        )


def _label(item: SheetItem) -> list[tuple[str, str]]:
    if item.correct:
        return [(line, INK) for line in _wrap(item.answer)]
    said = [(line, RED) for line in _wrap(f"said {item.answer}" if item.answer.strip() else "said nothing")]
    return said + [(line, INK) for line in _wrap(f"is {item.expected}")]


def _fit(image: Image.Image) -> Image.Image:
    """Scale into the cell. Small pictures keep their square pixels; large ones are smoothed."""
    image = image.convert("RGB")
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str) -> list[str]:
    """At most LABEL_LINES lines that fit under the image; the rest becomes an ellipsis."""
    text = " ".join(text.split())
    font = _font(LABEL_SIZE, text)
    lines, rest = [], text
    while rest and len(lines) < LABEL_LINES:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > CELL:
            end -= 1
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while len(last) > 1 and font.getlength(last + "...") > CELL:
            last = last[:-1]
        lines[-1] = last + "..."
    return lines or [""]


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return _load_font(size, wide=not all(ord(letter) < 0x250 for letter in text))


@lru_cache
def _load_font(size: int, *, wide: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in WIDE_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
