"""Reading a card of the zoom task, shown as the tool cuts it out: the skill without the search for it.

    User: Picture 1:[a handwritten digit of 14 x 14 pixels, enlarged to 28 x 28]Which digit?
    Assistant: (Now I can read it.) 7

Scans are on the side of the split that they are on in data/tasks/digits.py, so what is read here in training is held
out nowhere. Each is shown in ink of many strengths.
"""

import numpy as np
from PIL import Image

from data.conversation import Conversation, Message, Part
from data.tasks import digits, zoom
from data.tasks.base import Item, Split, Task, choice, drawn
from data.tasks.drawing import png


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    scans = digits.scans(split, seed)
    index = int(rng.integers(len(scans)))
    ink = round(float(rng.uniform(*zoom.INK)), 3)
    question = choice(rng, digits.QUESTIONS)
    scan, answer = scans[index]

    def render(id: str) -> Conversation:
        return Conversation(
            id=id,
            messages=(
                Message(role="user", parts=(Part.of_image(png(shown(scan, ink))), Part.of_text(question))),
                Message(role="assistant", reasoning=zoom.THOUGHTS[1], parts=(Part.of_text(answer),)),
            ),
            answer=answer,
            reward="exact",
            extra={"domain": "faint" if ink < sum(zoom.INK) / 2 else "strong"},
        )

    return Item(f"{index} {ink}", render)


def shown(scan: Image.Image, ink: float) -> Image.Image:
    from ernie_model.inference.tools import crop

    return crop(zoom.card(scan, ink).convert("RGB"), (0, 0, 1000, 1000))


TASK = Task(
    name="cards",
    description="a handwritten digit as the zoom tool shows it",
    conversations=drawn("cards", {"train": 6000, "heldout": 300}, draw),
    max_new_tokens=80,
    thinking=True,
)
