"""Counting shapes in a scene.

    User: Picture 1:[5 circles and squares, 84 x 84 pixels]How many circles are there?
    Assistant: 3

Asked for are the shapes of a kind, of a colour, or all of them. Each lies somewhere in a cell of its own, which is as
large as one image token: a model of a few layers can learn that in minutes.
"""

import numpy as np

from data.conversation import Conversation, Part
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import COLOURS, KINDS, Thing, paper, png, show

CELL = 28
CELLS = 3
"""In a row, and in a column."""
SIDE = CELL * CELLS
SIZES = (14, 20)
MOST = 6
"""Shapes in a scene."""
ALL_KINDS, ALL_COLOURS = KINDS[:3], tuple(COLOURS)[:3]


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    domain = choice(rng, ("all", "all", "colour", "colour", "colour", "kind"))
    wanted = choice(rng, ALL_KINDS if domain == "kind" else ALL_COLOURS)
    count = int(rng.integers(1 if domain == "all" else 0, MOST + 1))
    others = 0 if domain == "all" else int(rng.integers(0 if count else 1, MOST - count + 1))
    scene: list[Thing] = []
    for number, cell in enumerate(rng.permutation(CELLS * CELLS)[: count + others].tolist()):
        kind, colour = choice(rng, ALL_KINDS), choice(rng, ALL_COLOURS)
        if domain == "kind":
            kind = wanted if number < count else choice(rng, [kind for kind in ALL_KINDS if kind != wanted])
        elif domain == "colour":
            colour = wanted if number < count else choice(rng, [colour for colour in ALL_COLOURS if colour != wanted])
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        left, top = (CELL * at + int(rng.integers(1, CELL - size)) for at in (cell % CELLS, cell // CELLS))
        scene.append(Thing(kind, colour, (left, top, left + size, top + size)))
    background = paper(rng)
    asked_for = {"all": "shapes", "kind": f"{wanted}s", "colour": f"{wanted} shapes"}[domain]
    question = choice(rng, (f"How many {asked_for} are there?", f"How many {asked_for}?", f"Count the {asked_for}."))

    def render(id: str) -> Conversation:
        picture = Part.of_image(png(show(scene, SIDE, background)))
        return asked(id, (picture, Part.of_text(question)), str(count), reward="counting", domain=domain)

    return Item(f"{asked_for} {scene} {background}", render)


TASK = Task(
    name="counting",
    description="how many shapes of a kind or colour are in the picture",
    conversations=drawn("counting", {"train": 4000, "heldout": 300}, draw),
    max_new_tokens=8,
)
