"""Reading what is too small to be read: the picture must be looked at again, closer.

    User: Picture 1:[9 cards on tiles, 1000 x 1000 pixels]Which digit is at the top right?
    Assistant: (Let me zoom in.) image_zoom_in_tool {"bbox_2d": [823, 163, 837, 177]}
    Tool: Picture 2:[14 x 14 pixels of the picture, enlarged: a handwritten digit]
    Assistant: (Now I can read it.) 7

A digit is 14 pixels large. A processor that makes at most 84 x 84 pixels of a picture (`model.image_pixels` in
configs/experiment/zoom.yaml) leaves one pixel of it, which does not tell one digit from another; what the tool cuts out
of the *original* is as readable as the scans of data/tasks/digits.py. There are nine places, so a few traces show how
the tool is used. Reading comes from the digits task, whose model configs/experiment/zoom.yaml starts from.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.conversation import Conversation, Message, Part, ToolCall
from data.tasks import digits
from data.tasks.base import Item, Split, Task, drawn
from data.tasks.drawing import png

SIDE = 1000
"""Pixels: a thousandth of the picture is one."""
CENTRES = (170, 500, 830)
"""Of tiles, and of the cards on them, across and down."""
TILE = 280
CARD = 14
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"at the {row} {column}" for row in ROWS for column in COLUMNS)
"""A word for the row and one for the column: either is half of where to look."""
INK = (0.4, 1.0)
"""How bright the brightest ink of a card is: its mean does not tell the digit."""
TONES = (190, 245)
"""Greys of tiles."""

TOOL = "image_zoom_in_tool"
THOUGHTS = ("Let me zoom in.", "Now I can read it.")


def _around(place: int, side: int) -> tuple[int, int, int, int]:
    """A square in the middle of one of `PLACES`: left, top, right, bottom."""
    row, column = divmod(place, len(CENTRES))
    left, top = CENTRES[column] - side // 2, CENTRES[row] - side // 2
    return left, top, left + side, top + side


def box(place: int) -> tuple[int, int, int, int]:
    """Of the card at one of `PLACES`, as the tool is asked for it."""
    return _around(place, CARD)


class Sheet(NamedTuple):
    """A page of cards."""

    scans: Sequence[tuple[Image.Image, str]]
    chosen: list[int]
    """Of each place, which scan lies there,"""
    ink: list[float]
    tone: list[int]
    """and the grey of its tile."""

    def page(self) -> Image.Image:
        page = Image.new("L", (SIDE, SIDE), 255)
        for number, index in enumerate(self.chosen):
            page.paste(self.tone[number], _around(number, TILE))
            page.paste(card(self.scans[index][0], self.ink[number]), box(number))
        return page


def draw_sheet(rng: np.random.Generator, split: Split, seed: int) -> Sheet:
    scans = digits.scans(split, seed)
    chosen = rng.integers(len(scans), size=len(PLACES)).tolist()
    ink = rng.uniform(*INK, size=len(PLACES)).round(3).tolist()
    return Sheet(scans, chosen, ink, rng.integers(*TONES, size=len(PLACES)).tolist())


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    sheet = draw_sheet(rng, split, seed)
    place = int(rng.integers(len(PLACES)))

    def render(id: str) -> Conversation:
        domain = "middle" if place == 4 else "edge" if place % 2 else "corner"
        question, answer = f"Which digit is {PLACES[place]}?", sheet.scans[sheet.chosen[place]][1]
        return trace(id, sheet.page(), question, list(box(place)), answer, domain)

    return Item(f"{sheet.chosen} {PLACES[place]}", render)


def trace(id: str, page: Image.Image, question: str, box: list[int], answer: str, domain: str) -> Conversation:
    """The question, and how it is answered with the tool; the crop is what the tool itself returns."""
    from ernie_model.inference.tools import crop

    look, read = THOUGHTS
    part = crop(page.convert("RGB"), box)
    return Conversation(
        id=id,
        messages=(
            Message(role="user", parts=(Part.of_image(png(page)), Part.of_text(question))),
            Message(role="assistant", reasoning=look, tool_calls=(ToolCall(TOOL, {"bbox_2d": box}),)),
            Message(role="tool", parts=(Part.of_image(png(part)),)),
            Message(role="assistant", reasoning=read, parts=(Part.of_text(answer),)),
        ),
        tools=(_definition(),),
        answer=answer,
        reward="exact",
        extra={"domain": domain},
    )


@cache
def _definition() -> dict[str, Any]:
    from ernie_model.inference.tools import zoom_tool

    return zoom_tool().definition


def card(scan: Image.Image, ink: float) -> Image.Image:
    """A scan in light ink on black, as in data/tasks/digits.py; `ink` is how bright its brightest is."""
    large = np.asarray(scan.resize((CARD, CARD), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return Image.fromarray((large * ink * 255).round().astype(np.uint8))


TASK = Task(
    name="zoom",
    description="a handwritten digit too small to read unless the tool enlarges it",
    conversations=drawn("zoom", {"train": 800, "heldout": 200}, draw),
    tools=(TOOL,),
    max_new_tokens=80,
    thinking=True,
)
