"""Small tasks that ship with the suite, with answers a program can check: for the demo, tests and benchmarks.

A task draws its pictures when it is asked for conversations. Naming it costs nothing: what only drawing needs
(scikit-learn, matplotlib) is imported then.
"""

from data.tasks import (
    cards,
    charts,
    circuits,
    counting,
    digits,
    documents,
    glance,
    grounding,
    locate,
    places,
    search,
    video,
    zoom,
)
from data.tasks.base import SPLITS, Split, Task, question_of

_MODULES = (
    *(digits, locate, grounding, counting, charts, documents),
    *(zoom, cards, places, glance, video, circuits, search),
)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}

__all__ = ["SPLITS", "TASKS", "Split", "Task", "question_of"]
