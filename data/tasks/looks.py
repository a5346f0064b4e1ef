"""How the zoom tool is used, not where: a question of the zoom task is followed by a look at any of its nine places.

    User: Picture 1:[9 cards on tiles]Which digit is at the top right?
    Assistant: (Let me zoom in.) image_zoom_in_tool {"bbox_2d": [163, 823, 177, 837]}     the bottom left, by chance
    Tool: Picture 2:[the card there, enlarged]
    Assistant: (Now I can read it.) 3                                                      what stands there

One answer in nine is right. Who learns from these traces calls the tool in its form and reads what it returns; which
place a question means is left for reinforcement learning to find out (configs/experiment/zoom_rl.yaml).
"""

import numpy as np

from data.conversation import Conversation
from data.tasks import zoom
from data.tasks.base import Item, Split, Task, drawn


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    sheet = zoom.draw_sheet(rng, split, seed)
    asked, seen = (int(place) for place in rng.integers(len(zoom.PLACES), size=2))

    def render(id: str) -> Conversation:
        return sheet.look(id, asked=asked, seen=seen)

    return Item(f"{sheet.chosen} {asked} {seen}", render)


TASK = Task(
    name="looks",
    description="the zoom task's questions, answered with what a look at any place shows",
    conversations=drawn("looks", {"train": 400, "heldout": 100}, draw),
    tools=(zoom.TOOL,),
    max_new_tokens=80,
    thinking=True,
)
