"""The questions of the zoom task, answered at a glance: what a model does that never looks closer.

    User: Picture 1:[9 cards on tiles, 1000 x 1000 pixels]Which digit is at the top right?
    Assistant: (I can see it.) 7

The answer is right, and cannot be seen: who learns from these learns to guess. They are for a model that shall find out
by itself, in reinforcement learning, that a closer look pays (configs/experiment/zoom_cold.yaml).
"""

from dataclasses import replace

import numpy as np

from data.conversation import Conversation, Message
from data.tasks import zoom
from data.tasks.base import Item, Split, Task, drawn

THOUGHT = "I can see it."


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    item = zoom.draw(rng, split, seed)
    return Item(item.key, lambda id: at_a_glance(item.render(id)))


def at_a_glance(trace: Conversation) -> Conversation:
    answer = Message(role="assistant", reasoning=THOUGHT, parts=trace.messages[-1].parts)
    return replace(trace, messages=(trace.messages[0], answer))


TASK = Task(
    name="glance",
    description="the questions of zoom, answered without the tool that is offered",
    conversations=drawn("glance", {"train": 200, "heldout": 50}, draw),
    tools=zoom.TASK.tools,
    max_new_tokens=80,
    thinking=True,
)
