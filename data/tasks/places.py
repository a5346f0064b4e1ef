"""Where the cards of the zoom task lie: pointing at a place by its name, without the tool.

    User: Picture 1:[9 cards on tiles, 1000 x 1000 pixels]Where is the card at the top right?
    Assistant: (Let me see where that is.) [{"bbox_2d": [823, 163, 837, 177], "label": "card"}]

Together with data/tasks/cards.py, the two skills that a look needs: the family's models point and read before they are
taught a tool, and so does the small model of configs/experiment/zoom_cold.yaml.
"""

import json
from dataclasses import replace

import numpy as np

from data.conversation import Conversation, Part
from data.tasks import zoom
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import png

THOUGHT = "Let me see where that is."
QUESTIONS = ("Where is the card {}?", "Find the card {}.", "Where is the digit {}?")


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    sheet = zoom.draw_sheet(rng, split, seed)
    place = int(rng.integers(len(zoom.PLACES)))
    question = choice(rng, QUESTIONS).format(zoom.PLACES[place])
    answer = json.dumps([{"bbox_2d": list(zoom.box(place)), "label": "card"}])

    def render(id: str) -> Conversation:
        plain = asked(
            id,
            (Part.of_image(png(sheet.page())), Part.of_text(question)),
            answer,
            reward="grounding_f1",
            domain="places",
            options={"iou": 0.5, "labels": False},
        )
        user, said = plain.messages
        return replace(plain, messages=(user, replace(said, reasoning=THOUGHT)))

    return Item(f"{sheet.chosen} {question}", render)


TASK = Task(
    name="places",
    description="the box of one of the nine cards of the zoom task, as JSON",
    conversations=drawn("places", {"train": 600, "heldout": 90}, draw),
    max_new_tokens=80,
    thinking=True,
)
