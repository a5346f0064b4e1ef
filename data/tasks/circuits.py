"""Resistors between two points A and B: what is their total resistance, what current flows?

    User: Picture 1:[A - 2 - (6 beside 3) - B, 168 x 112 pixels]What is the total resistance from A to B in ohms?
    Assistant: 4

A number in a box is a resistance in ohms. In a row they add up; side by side their conductances do. Only networks whose
answer has at most two decimals are drawn, so it is exact.

    row        A --[a]--[b]--[c]-- B           beside     A --+--[a]--+-- B      mixed     A --[a]--+--[b]--+-- B
                                                              +--[b]--+                             +--[c]--+
"""

from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw

from data.conversation import Conversation, Part
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import Colour, font, paper, png

WIDTH, HEIGHT = 168, 112
BOX = (32, 18)
"""A resistor, in pixels."""
LARGEST = 20
"""Ohms."""
VOLTS = (6, 10, 12, 20, 24, 30)

Network = tuple[int | tuple[int, ...], ...]
"""Parts in a row; a tuple is a part whose resistors lie side by side: (2, (6, 3))."""


def resistance(network: Network) -> Fraction:
    side_by_side = (part if isinstance(part, tuple) else (part,) for part in network)
    return sum((1 / sum((Fraction(1, one) for one in part), Fraction(0)) for part in side_by_side), Fraction(0))


def exact(value: Fraction) -> str | None:
    """As people write it, if two decimals are enough."""
    hundredths = value * 100
    if hundredths.denominator != 1:
        return None
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    shape = choice(rng, ("row", "beside", "mixed"))
    volts = choice(rng, VOLTS) if rng.random() < 1 / 4 else None
    answer = None
    while answer is None:
        network = _network(rng, shape)
        value = resistance(network)
        answer = exact(value if volts is None else volts / value)
    if volts is None:
        question = choice(
            rng, ("What is the total resistance from A to B in ohms?", "How many ohms are there from A to B?")
        )
    else:
        question = f"There are {volts} volts from A to B. How many amperes flow?"
    background = paper(rng)

    def render(id: str) -> Conversation:
        picture = Part.of_image(png(_picture(network, background)))
        return asked(
            id,
            (picture, Part.of_text(question)),
            answer,
            reward="number",
            domain="current" if volts else shape,
            options={"tolerance": 0.001},
        )

    # The order of the resistors changes the picture and not the answer: both orders are on one side.
    same = sorted(str(sorted(part) if isinstance(part, tuple) else part) for part in network)
    return Item(f"{same} {volts}", render)


def _network(rng: np.random.Generator, shape: str) -> Network:
    count = 3 if shape == "mixed" else int(rng.integers(2, 4))
    first, *rest = (int(ohms) for ohms in rng.integers(1, LARGEST + 1, size=count))
    if shape == "row":
        return (first, *rest)
    if shape == "beside":
        return ((first, *rest),)
    return (first, tuple(rest)) if rng.integers(2) else (tuple(rest), first)


def _picture(network: Network, background: Colour) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), background)
    pen = ImageDraw.Draw(picture)
    ink = (25, 25, 25)
    middle = HEIGHT // 2
    left, right = 18, WIDTH - 18
    pen.line((left, middle, right, middle), fill=ink, width=1)
    for place, name in ((9, "A"), (WIDTH - 9, "B")):
        pen.text((place, middle), name, fill=ink, font=font(13), anchor="mm")
    for number, part in enumerate(network):
        centre = left + (right - left) * (2 * number + 1) // (2 * len(network))
        beside = (part,) if isinstance(part, int) else part
        rows = [middle + round((at - (len(beside) - 1) / 2) * 32) for at in range(len(beside))]
        reach = BOX[0] // 2 + 7
        if len(beside) > 1:
            pen.line((centre - reach, middle, centre + reach, middle), fill=background, width=1)
            for side in (centre - reach, centre + reach):
                pen.line((side, rows[0], side, rows[-1]), fill=ink, width=1)
        for ohms, row in zip(beside, rows, strict=True):
            pen.line((centre - reach, row, centre + reach, row), fill=ink, width=1)
            box = (centre - BOX[0] // 2, row - BOX[1] // 2, centre + BOX[0] // 2, row + BOX[1] // 2)
            pen.rectangle(box, fill="white", outline=ink, width=1)
            pen.text((centre, row), str(ohms), fill=ink, font=font(14), anchor="mm")
    return picture


TASK = Task(
    name="circuits",
    description="total resistance of a drawn network, or the current through it",
    conversations=drawn("circuits", {"train": 1200, "heldout": 200}, draw),
    max_new_tokens=16,
)
