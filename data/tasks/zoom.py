"""Reading what is too small to be read: the picture must be looked at again, closer.

    User: Picture 1:[9 cards on tiles, 1000 x 1000 pixels]Which digit is at the top right?
    Assistant: (Let me zoom in.) image_zoom_in_tool {"bbox_2d": [823, 163, 837, 177]}
    Tool: Picture 2:[14 x 14 pixels of the picture, enlarged: a handwritten digit]
    Assistant: (Now I can read it.) 7

A digit is 14 pixels large. A processor that makes at most 84 x 84 pixels of a picture (`model.image_pixels` in
configs/experiment/zoom.yaml) leaves one pixel of it, which does not tell one digit from another; what the tool cuts out
of the *original* is as readable as the scans of data/tasks/digits.py. The question names the card by its place, or by
the colour of its tile, which can still be seen.

There are only nine boxes, so a few traces show how the tool is used. Reading comes from the digits task.
"""

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import Conversation, Message, Part, ToolCall
from data.tasks import digits
from data.tasks.base import Item, Split, Task, choice, drawn
from data.tasks.drawing import COLOURS, Colour, png

SIDE = 1000
"""Pixels: a thousandth of the picture is one."""
CENTRES = (170, 500, 830)
"""Of tiles, and of the cards on them, across and down."""
TILE = 280
CARD = 14
PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("at the left", "in the middle", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
INK = (0.4, 1.0)
"""How bright the brightest ink of a card is: its mean does not tell the digit."""

TOOL = "image_zoom_in_tool"
THOUGHTS = ("Let me zoom in.", "Now I can read it.")


def box_of(place: int) -> list[int]:
    """The card at one of `PLACES`, in pixels and thousandths of the picture."""
    return _around(place, CARD)


def _around(place: int, side: int) -> list[int]:
    row, column = divmod(place, len(CENTRES))
    left, top = CENTRES[column] - side // 2, CENTRES[row] - side // 2
    return [left, top, left + side, top + side]


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    scans = digits.scans(split, seed)
    chosen = rng.integers(len(scans), size=len(PLACES))
    ink = rng.uniform(*INK, size=len(PLACES)).round(3)
    places = rng.permutation(len(PLACES))[: len(COLOURS)].tolist()
    tiles = dict(zip(places, COLOURS, strict=True))
    domain = choice(rng, ("place", "colour"))
    place = choice(rng, places) if domain == "colour" else int(rng.integers(len(PLACES)))
    where = f"on the {tiles[place]} tile" if domain == "colour" else PLACES[place]
    answer = scans[chosen[place]][1]

    def render(id: str) -> Conversation:
        page = _page(tiles)
        for number, index in enumerate(chosen):
            page.paste(_card(scans[index][0], float(ink[number])), tuple(box_of(number)))
        return trace(id, page, f"Which digit is {where}?", box_of(place), answer, domain)

    return Item(f"{chosen.tolist()} {tiles} {where}", render)


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


# A picture has a palette, which makes it a third of the size: 251 greys, then the colours of tiles.
GREYS = 251


def _page(tiles: dict[int, str]) -> Image.Image:
    page = Image.new("P", (SIDE, SIDE), GREYS - 1)
    greys = [round(255 * grey / (GREYS - 1)) for grey in range(GREYS) for _ in "RGB"]
    page.putpalette([*greys, *(value for colour in COLOURS.values() for value in _pale(colour))])
    for place in range(len(PLACES)):
        colour = GREYS + list(COLOURS).index(tiles[place]) if place in tiles else GREYS * 9 // 10
        page.paste(colour, tuple(_around(place, TILE)))
    return page


def _pale(colour: Colour) -> Colour:
    red, green, blue = (255 - (255 - value) // 2 for value in colour)
    return red, green, blue


def _card(scan: Image.Image, ink: float) -> Image.Image:
    """Light ink on black, as in data/tasks/digits.py."""
    large = np.asarray(scan.resize((CARD, CARD), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return Image.fromarray((large * ink * (GREYS - 1)).round().astype(np.uint8))


TASK = Task(
    name="zoom",
    description="a handwritten digit too small to read unless the tool enlarges it",
    conversations=drawn("zoom", {"train": 800, "heldout": 200}, draw),
    tools=(TOOL,),
    max_new_tokens=80,
    thinking=True,
)
