"""Reading fields of printed forms.

    User: Picture 1:[a receipt, 196 x 140 pixels]Read the date and the total. Answer in JSON.
    Assistant: {"date": "2025-03-12", "total": "18.40"}

Forms differ in title, order and names of their fields, font size, and in what else is printed on them.
"""

import json

import numpy as np
from PIL import Image, ImageDraw

from data.conversation import Conversation, Part
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import Colour, font, paper, png

WIDTH, HEIGHT = 196, 140
TITLES = ("Receipt", "Invoice", "Delivery note")
NAMES = "Abe Bauer Chen Diaz Evans Fuchs Haas Ito Jones Klein Li Mori Novak Olsen Park Rossi Silva Tanaka".split()
FIELDS = {
    "number": ("No.", "Number"),
    "name": ("Name", "Customer"),
    "date": ("Date", "Issued"),
    "total": ("Total", "Sum"),
}
"""Keys of the answer, and what the forms call them."""
FOOTERS = ("Thank you.", "Paid in cash.", "Please keep this form.", "All prices in euros.")


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    title = choice(rng, TITLES)
    values = {
        "number": f"{rng.integers(1000, 10000)}",
        "name": f"{choice(rng, 'ABCDEFGHJKLMNPRSTW')}. {choice(rng, NAMES)}",
        "date": f"20{rng.integers(20, 30)}-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}",
        "total": f"{rng.integers(1, 100)}.{rng.integers(0, 20) * 5:02d}",
    }
    order = [list(FIELDS)[int(index)] for index in rng.permutation(len(FIELDS))]
    wanted = [key for key, keep in zip(FIELDS, rng.permutation([True, True, False, False]), strict=True) if keep]
    printed = [(choice(rng, FIELDS[key]), values[key]) for key in order]
    size, footer, background = int(rng.integers(12, 15)), choice(rng, FOOTERS), paper(rng)
    aligned = bool(rng.integers(2))
    answer = json.dumps({key: values[key] for key in wanted})
    question = f"Read the {wanted[0]} and the {wanted[1]}. Answer in JSON."

    def render(id: str) -> Conversation:
        picture = Part.of_image(png(_form(title, printed, footer, size, aligned, background)))
        return asked(
            id, (picture, Part.of_text(question)), answer, reward="json_fields", domain=title.lower().replace(" ", "_")
        )

    return Item(f"{values}", render)


def _form(
    title: str, printed: list[tuple[str, str]], footer: str, size: int, aligned: bool, background: Colour
) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), background)
    pen = ImageDraw.Draw(picture)
    ink, pale = (20, 20, 30), (120, 120, 130)
    pen.text((WIDTH // 2, 12), title, fill=ink, font=font(16), anchor="mm")
    pen.line((10, 24, WIDTH - 10, 24), fill=pale, width=1)
    for row, (name, value) in enumerate(printed):
        y = 40 + row * 22
        pen.text((14, y), f"{name}:", fill=pale, font=font(size), anchor="lm")
        place, anchor = (WIDTH - 14, "rm") if aligned else (88, "lm")
        pen.text((place, y), value, fill=ink, font=font(size), anchor=anchor)
    pen.line((10, HEIGHT - 19, WIDTH - 10, HEIGHT - 19), fill=pale, width=1)
    pen.text((WIDTH // 2, HEIGHT - 9), footer, fill=pale, font=font(10), anchor="mm")
    return picture


TASK = Task(
    name="documents",
    description="fields of printed forms, as JSON",
    conversations=drawn("documents", {"train": 2000, "heldout": 200}, draw),
    max_new_tokens=64,
)
