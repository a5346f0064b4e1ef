"""Finding things in a scene: boxes of shapes and of real handwritten digits.

    User: Picture 1:[a red circle, a blue star, a written 7; 112 x 112 pixels]Where is the red circle?
    Assistant: [{"bbox_2d": [120, 340, 320, 540], "label": "red circle"}]

Boxes are left, top, right, bottom in thousandths of the picture, as the family writes them. Several things of the same
name are listed from left to right. Digits are scans in dark ink; the box is the whole scan.
"""

import json

import numpy as np
from PIL import Image

from data.conversation import Conversation, Part
from data.tasks import digits
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import COLOURS, KINDS, Box, Thing, free_box, paper, png, show

SIDE = 112
STEP = 2.24
"""Boxes begin and end at multiples of this many pixels: 20 thousandths, so that answers are round numbers."""
SIZES = (9, 14)
"""Of shapes, in steps: 20 to 31 pixels."""
DIGIT = 12
"""27 pixels."""
ALL_KINDS, ALL_COLOURS = KINDS, tuple(COLOURS)[:4]


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    scans = digits.scans(split, seed)
    domain = choice(rng, ("alone", "alone", "alone", "among others", "among others", "digit", "several"))
    count = 1 if domain == "alone" else int(rng.integers(2, 5))
    wanted = 2 if domain == "several" else 1
    boxes: list[Box] = []
    for number in range(count):
        size = (DIGIT, DIGIT) if domain == "digit" and number == 0 else SIZES
        box = free_box(rng, boxes, side=round(SIDE / STEP), sizes=size, gap=1)
        if box is None:
            return draw(rng, split, seed)
        boxes.append(box)
    label = f"{choice(rng, ALL_COLOURS)} {choice(rng, ALL_KINDS)}"
    written: list[tuple[int, Box]] = []
    scene: list[Thing] = []
    for number, box in enumerate(boxes):
        if domain == "digit" and number == 0:
            written.append((int(rng.integers(len(scans))), box))
        elif domain != "digit" and number < wanted:
            colour, kind = label.split()
            scene.append(Thing(kind, colour, box))
        else:
            colour, kind = _other(rng, label)
            scene.append(Thing(kind, colour, box))
    if written:
        label = scans[written[0][0]][1]
    found = sorted(boxes[:wanted])
    answer = json.dumps([{"bbox_2d": [round(20 * value) for value in box], "label": label} for box in found])
    question = choice(
        rng,
        (f"Where are the {label}s?", f"Find the {label}s.")
        if domain == "several"
        else (f"Where is the {label}?", f"Find the {label}."),
    )
    background = paper(rng)

    def render(id: str) -> Conversation:
        things = [Thing(one.kind, one.colour, _pixels(one.box)) for one in scene]
        picture = show(things, SIDE, background)
        for index, box in written:
            _write(picture, scans[index][0], _pixels(box))
        return asked(
            id,
            (Part.of_image(png(picture)), Part.of_text(question)),
            answer,
            reward="grounding_f1",
            domain=domain,
            options={"iou": 0.5, "labels": True},
        )

    return Item(f"{scene} {written} {label} {background}", render)


def _other(rng: np.random.Generator, label: str) -> tuple[str, str]:
    """Colour and kind of something that is not asked for."""
    while True:
        colour, kind = choice(rng, ALL_COLOURS), choice(rng, ALL_KINDS)
        if f"{colour} {kind}" != label:
            return colour, kind


def _pixels(box: Box) -> Box:
    left, top, right, bottom = (value * STEP for value in box)
    return left, top, right, bottom


def _write(picture: Image.Image, scan: Image.Image, box: Box) -> None:
    """Dark ink on the paper that is there."""
    left, top, right, bottom = (round(value) for value in box)
    ink = scan.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    picture.paste((20, 20, 30), (left, top), mask=ink)


TASK = Task(
    name="grounding",
    description="boxes of shapes and handwritten digits in a scene, as JSON",
    conversations=drawn("grounding", {"train": 4000, "heldout": 300}, draw),
    max_new_tokens=96,
)
