"""Which item is this? Only the catalogue knows, and the tool that searches it by picture.

    User: Picture 1:[a badge, 56 x 56 pixels]Which item is this?
    Assistant: (Let me search.) image_search {"img_idx": 0}
    Tool: 1. K47 (likeness 0.99)  Picture 2:[the badge]  2. B12 (likeness 0.75) ...
    Assistant: (The first one is the same.) K47

Names say nothing about the items, and those that are asked for held out are in no training conversation, so there is no
answer without the tool. `Task.write_index` writes the catalogue, pictures with captions, for `ernie index`. The user's
picture is the catalogue's on other paper, a little moved. In the traces the results are the most alike by what is drawn
on them, among the items of the trace's own split; the tool itself compares what the model sees, in the whole catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from data.conversation import Conversation, Message, Part, ToolCall
from data.tasks.base import SPLITS, Split, Task, choice
from data.tasks.drawing import COLOURS, KINDS, Canvas, Colour, png

SIDE = 56
COUNTS: dict[Split, int] = {"train": 400, "heldout": 100}
PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 235, 190), (205, 225, 250), (60, 60, 66))
LETTERS = "ABCDEFGHKLMNPRSTUW"
HITS = 3

TOOL = "image_search"
THOUGHTS = ("Let me search.", "The first one is the same.")
QUESTIONS = ("Which item is this?", "What is this item called?")


@dataclass(frozen=True)
class Badge:
    name: str
    looks: tuple[str, str, str, str, int]
    """Kind and colour of the outer shape, of the inner one, and number of the paper."""

    def picture(self, by: tuple[int, int] = (0, 0), light: int = 0) -> bytes:
        """A PNG file; moved by so many pixels, on paper that much darker."""
        outer, colour, inner, inner_colour, paper = self.looks
        red, green, blue = (max(0, value - light) for value in PAPERS[paper])
        canvas = Canvas(SIDE, SIDE, (red, green, blue))
        x, y = by
        canvas.shape(outer, (6 + x, 6 + y, 50 + x, 50 + y), COLOURS[colour])
        canvas.shape(inner, (20 + x, 23 + y, 36 + x, 39 + y), COLOURS[inner_colour])
        return png(canvas.picture())


@cache
def catalogue(seed: int) -> dict[Split, list[Badge]]:
    """The items of both splits."""
    rng = np.random.default_rng([seed, 5])
    looks = [
        (outer, colour, inner, inner_colour, paper)
        for outer, colour, inner, inner_colour in product(KINDS, COLOURS, KINDS, COLOURS)
        if colour != inner_colour
        for paper in range(len(PAPERS))
    ]
    names = [f"{letter}{number}" for letter in LETTERS for number in range(10, 100)]
    count = sum(COUNTS.values())
    badges = [
        Badge(names[int(name)], looks[int(look)])
        for name, look in zip(rng.permutation(len(names))[:count], rng.permutation(len(looks))[:count], strict=True)
    ]
    train = COUNTS["train"]
    return {"train": badges[:train], "heldout": badges[train:]}


def conversations(split: Split, seed: int = 0) -> list[Conversation]:
    rng = np.random.default_rng([seed, 6, SPLITS.index(split)])
    return [
        _trace(f"search-{split}-{number:04d}", badge, catalogue(seed)[split], rng)
        for number, badge in enumerate(catalogue(seed)[split])
    ]


def _trace(id: str, badge: Badge, others: Sequence[Badge], rng: np.random.Generator) -> Conversation:
    x, y = (int(by) for by in rng.integers(-2, 3, size=2))
    asked = badge.picture((x, y), light=int(rng.integers(1, 8)))
    look, read = THOUGHTS
    found: list[Part] = []
    for place, (likeness, hit) in enumerate(_nearest(badge, others), start=1):
        found += [Part.of_text(f"{place}. {hit.name} (likeness {likeness:.2f})\n"), Part.of_image(hit.picture())]
    return Conversation(
        id=id,
        messages=(
            Message(role="user", parts=(Part.of_image(asked), Part.of_text(choice(rng, QUESTIONS)))),
            Message(role="assistant", reasoning=look, tool_calls=(ToolCall(TOOL, {"img_idx": 0}),)),
            Message(role="tool", parts=tuple(found)),
            Message(role="assistant", reasoning=read, parts=(Part.of_text(badge.name),)),
        ),
        tools=(_definition(),),
        answer=badge.name,
        reward="exact",
        extra={"domain": badge.looks[0]},
    )


def _nearest(badge: Badge, others: Sequence[Badge]) -> list[tuple[float, Badge]]:
    """The most alike by their looks, the badge itself first."""
    scored = [(sum(a == b for a, b in zip(badge.looks, other.looks, strict=True)), other) for other in others]
    scored.sort(key=lambda pair: (-pair[0], pair[1].name))
    return [(1 - 0.12 * (len(badge.looks) - same) - 0.01, other) for same, other in scored[:HITS]]


@cache
def _definition() -> dict[str, Any]:
    from ernie_model.inference.image_index import SEARCH

    return {"type": "function", "function": dict(SEARCH)}


def write_index(folder: Path, seed: int = 0) -> None:
    """The catalogue: NAME.png with its caption in NAME.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for badge in catalogue(seed)[split]:
            (folder / f"{badge.name}.png").write_bytes(badge.picture())
            (folder / f"{badge.name}.txt").write_text(badge.name + "\n", encoding="utf-8")


TASK = Task(
    name="search",
    description="which item of a catalogue is in the picture; the tool searches it",
    conversations=conversations,
    tools=(TOOL,),
    max_new_tokens=48,
    thinking=True,
    write_index=write_index,
)
