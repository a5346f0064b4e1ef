"""Finding one handwritten digit: the shortest grounding task, for a model that reads digits already.

    User: Picture 1:[a dark page of 84 x 84 pixels, a scanned digit somewhere on it]Where is the digit?
    Assistant: [{"bbox_2d": [240, 480, 720, 960], "label": "7"}]

The box is left, top, right, bottom in thousandths of the picture, in steps of a twenty-fifth of it.
"""

import json

import numpy as np
from PIL import Image

from data.conversation import Conversation, Part
from data.tasks import digits
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import png

SIDE = 84
"""Pixels."""
STEPS = 25
"""Of the side: boxes begin and end at multiples of 40 thousandths."""
SIZES = (8, 14)
"""Of the digit, in steps: 27 to 47 pixels."""
QUESTIONS = ("Where is the digit?", "Find the digit.", "Which box is the digit in?")


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    scans = digits.scans(split, seed)
    index, size = int(rng.integers(len(scans))), int(rng.integers(SIZES[0], SIZES[1] + 1))
    left, top = (int(value) for value in rng.integers(0, STEPS - size + 1, size=2))
    question = choice(rng, QUESTIONS)
    scan, label = scans[index]
    box = [left, top, left + size, top + size]
    answer = json.dumps([{"bbox_2d": [round(1000 / STEPS * value) for value in box], "label": label}])

    def render(id: str) -> Conversation:
        picture = Image.new("L", (SIDE, SIDE), 0)
        x, y, right, bottom = (round(SIDE / STEPS * value) for value in box)
        picture.paste(scan.resize((right - x, bottom - y), Image.Resampling.BICUBIC), (x, y))
        return asked(
            id,
            (Part.of_image(png(picture)), Part.of_text(question)),
            answer,
            reward="grounding_f1",
            domain="small" if size < sum(SIZES) / 2 else "large",
            options={"iou": None, "labels": False},  # the overlap itself, so that a near miss is worth something
        )

    return Item(f"{index} {box} {question}", render)


TASK = Task(
    name="locate",
    description="the box of a handwritten digit somewhere on a dark page, as JSON",
    conversations=drawn("locate", {"train": 4000, "heldout": 200}, draw),
    max_new_tokens=64,
)
