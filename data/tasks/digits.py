"""Reading handwritten digits: 1,797 real scans, as image conversations.

    User: Picture 1:[a digit, 56 x 56 pixels]Which digit?      16 patches, 4 image tokens
    Assistant: 7

The scans ship with scikit-learn (the test half of the UCI set "Optical Recognition of Handwritten Digits": 13 writers,
8 x 8 pixels, 17 grey levels). They are enlarged with bicubic interpolation, which turns the blocks back into pen
strokes; 56 x 56 is the smallest image the processor accepts unresized.

The held-out part is a fifth of every digit, chosen by the seed: 360 or so scans that no training example shows.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.conversation import Conversation, Message, Part
from data.errors import DataError
from data.formats import messages
from data.media import save_media
from data.records import write_jsonl as write_records

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

SIDE = 56
"""Pixels; a multiple of 28, so that the processor leaves the picture as it is."""
HELDOUT_SHARE = 0.2
QUESTIONS = ("Which digit?", "What digit is this?", "Read the digit.", "Which number?")


def conversations(split: Split, seed: int = 0) -> list[Conversation]:
    """The task's conversations, in the order of scikit-learn's file; images as PNG bytes."""
    _, labels = _scans()
    # The question is drawn for every scan, so that it does not depend on the split.
    question = np.random.default_rng([seed, 1]).integers(len(QUESTIONS), size=len(labels))
    return [
        Conversation(
            id=f"digits-{index:04d}",
            messages=(
                Message(role="user", parts=(Part.of_image(_png(index)), Part.of_text(QUESTIONS[question[index]]))),
                Message(role="assistant", parts=(Part.of_text(str(labels[index])),)),
            ),
            answer=str(labels[index]),
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


def write_jsonl(folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """The same conversations as files: train.jsonl, heldout.jsonl and images/*.png. Returns the two paths by split."""
    folder = Path(folder)
    paths = {}
    for split in SPLITS:
        records = []
        for conversation in conversations(split, seed):
            question, answer = conversation.messages
            image, text = question.parts
            assert isinstance(image.media, bytes)
            path = save_media(folder, f"images/{conversation.id}.png", image.media)
            on_disk = Conversation(
                id=conversation.id,
                messages=(Message(role="user", parts=(Part.of_image(path), text)), answer),
                answer=conversation.answer,
            )
            records.append(messages.write(on_disk))
        paths[split] = write_records(folder / f"{split}.jsonl", records)
    return paths


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) grey levels 0 to 16, and the digit on each."""
    try:
        from sklearn.datasets import load_digits  # takes a second to import, so only when the task is used
    except ImportError as error:
        raise DataError("data=digits needs the scans that ship with scikit-learn: pip install scikit-learn") from error
    bunch: Any = load_digits()
    return bunch.images, bunch.target


@cache
def _png(index: int) -> bytes:
    images, _ = _scans()
    small = Image.fromarray((images[index] * (255 / 16)).round().astype(np.uint8))
    file = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()
