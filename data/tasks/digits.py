"""Reading handwritten digits: 1,797 real scans, as image conversations.

    User: Picture 1:[a digit, 56 x 56 pixels]Which digit?      16 patches, 4 image tokens
    Assistant: 7

The scans ship with scikit-learn (the test half of the UCI set "Optical Recognition of Handwritten Digits": 13 writers,
8 x 8 pixels, 17 grey levels). They are enlarged with bicubic interpolation, which turns the blocks back into pen
strokes; 56 x 56 is the smallest image the processor accepts unresized.

The held-out part is a fifth of every digit, chosen by the seed: 360 or so scans that no training example shows.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import Conversation, Part
from data.errors import DataError
from data.tasks.base import HELDOUT_SHARE, Split, Task, asked
from data.tasks.drawing import png

SIDE = 56
"""Pixels; a multiple of 28, so that the processor leaves the picture as it is."""
QUESTIONS = ("Which digit?", "What digit is this?", "Read the digit.", "Which number?")


def conversations(split: Split, seed: int = 0) -> list[Conversation]:
    """The task's conversations, in the order of scikit-learn's file; images as PNG bytes."""
    _, labels = _scans()
    # The question is drawn for every scan, so that it does not depend on the split.
    question = np.random.default_rng([seed, 1]).integers(len(QUESTIONS), size=len(labels))
    return [
        asked(
            f"digits-{index:04d}",
            (Part.of_image(_png(index)), Part.of_text(QUESTIONS[question[index]])),
            str(labels[index]),
            reward="exact",
            domain="digits",
        )
        for index in split_indices(labels, seed)[split]
    ]


def split_indices(labels: Sequence[int] | np.ndarray, seed: int) -> dict[str, list[int]]:
    """Which scans are trained on and which are held out: the same share of every label."""
    labels = np.asarray(labels)
    generator = np.random.default_rng([seed, 0])
    heldout: set[int] = set()
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        heldout.update(members[: round(len(members) * HELDOUT_SHARE)].tolist())
    everything = range(len(labels))
    return {"train": [i for i in everything if i not in heldout], "heldout": sorted(heldout)}


@cache
def scans(split: Split, seed: int) -> list[tuple[Image.Image, str]]:
    """The scans of a split, 8 x 8 grey pixels, white on black, with their digits: for scenes of other tasks.

    A scan is on the same side of every task, so that tasks can be learned together.
    """
    _, labels = _scans()
    return [(_small(index), str(labels[index])) for index in split_indices(labels, seed)[split]]


def write_jsonl(folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """See `Task.write_jsonl`."""
    return TASK.write_jsonl(folder, seed)


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) grey levels 0 to 16, and the digit on each."""
    try:
        from sklearn.datasets import load_digits  # takes a second to import, so only when the task is used
    except ImportError as error:
        raise DataError(
            "tasks with handwriting need the scans that ship with scikit-learn: pip install scikit-learn"
        ) from error
    bunch: Any = load_digits()
    return bunch.images, bunch.target


@cache
def _png(index: int) -> bytes:
    return png(_small(index).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _small(index: int) -> Image.Image:
    images, _ = _scans()
    return Image.fromarray((images[index] * (255 / 16)).round().astype(np.uint8))


TASK = Task(
    name="digits",
    description="which handwritten digit is in the picture (1,797 real scans)",
    conversations=conversations,
    max_new_tokens=8,
)
