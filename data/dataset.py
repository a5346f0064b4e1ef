"""Datasets: conversations by number, and the folder their media lie in.

    digits_dataset(...)                     -> Splits(train, heldout)     made in memory
    jsonl_dataset("train.jsonl", ...)       -> Splits(train, heldout)     read from disk, one record at a time

A dataset is fixed: it has a length, `dataset[i]` is the same conversation every time, and its `fingerprint` tells it
from any other. Order, epochs and packing are the loader's business.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data.conversation import Conversation, Pair, conversation_to_learn
from data.errors import DataError
from data.formats import messages
from data.media import MediaFolder
from data.records import Record, Records, open_records
from data.tasks import digits


class Dataset(Protocol):
    """What the loader needs of a dataset."""

    media: MediaFolder

    @property
    def name(self) -> str:
        """What messages to the user call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs between datasets that differ; checked on resume."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


@dataclass(frozen=True)
class Splits:
    train: Dataset
    heldout: Dataset | None


class ListDataset:
    """Conversations held in memory."""

    def __init__(self, name: str, conversations: Sequence[Conversation], media: MediaFolder | None = None):
        if not conversations:
            raise DataError(f"{name} holds no conversation.")
        self.name = name
        self.media = media or MediaFolder(None)
        self._conversations = conversations

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for conversation in self._conversations:
            digest.update(json.dumps(messages.write(conversation), sort_keys=True).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self._conversations[index]

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._conversations)


class RecordDataset:
    """Conversations read from a file when they are asked for.

    `indices` chooses some of its records; `read` is the format they are in (data/formats).
    """

    def __init__(
        self,
        records: Records,
        media: MediaFolder,
        indices: Sequence[int] | np.ndarray | None = None,
        read: Callable[[Record], Conversation | Pair] = messages.read,
    ):
        self.name = str(records.path)
        self.media = media
        self._records = records
        self._read = read
        self._indices = np.arange(len(records)) if indices is None else np.asarray(indices, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self._records.fingerprint.encode() + self._indices.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        return conversation_to_learn(self._read(self._records[int(self._indices[index])]))

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))


def digits_dataset(seed: int = 0) -> Splits:
    """`data=digits`: the handwritten digits of data/tasks/digits.py; the seed fixes what is held out."""
    train = digits.conversations("train", seed)
    heldout = digits.conversations("heldout", seed)
    shared = {conversation.id for conversation in train} & {conversation.id for conversation in heldout}
    assert not shared, f"digits {sorted(shared)} are both trained on and held out"
    return Splits(ListDataset("digits (train)", train), ListDataset("digits (held out)", heldout))


def jsonl_dataset(
    path: str | Path,
    *,
    eval_path: str | Path | None = None,
    eval_fraction: float = 0.0,
    media_root: str | Path | None = None,
    seed: int = 0,
    max_image_pixels: int = MediaFolder.max_image_pixels,
) -> Splits:
    """`data=jsonl data.path=...`: a file of `messages` records (see data/formats/messages.py).

    Held out are the records of `eval_path`, or a share of `path` chosen by the seed (at least one record when
    `eval_fraction` is above 0), or none. Paths of media are relative to `media_root`; without one, to the folder their
    JSONL file is in. Raises DataError for a missing or empty file and for settings that contradict each other.
    """
    if eval_path is not None and eval_fraction:
        raise DataError(
            f"both data.eval_path ({eval_path}) and data.eval_fraction ({eval_fraction}) are set. Keep one."
        )
    if not 0 <= eval_fraction < 1:
        raise DataError(f"data.eval_fraction is {eval_fraction}; it must be at least 0 and less than 1, e.g. 0.1.")

    def folder(file: str | Path) -> MediaFolder:
        root = Path(file).parent if media_root is None else Path(media_root)
        if not root.is_dir():
            raise DataError(f"data.media_root ({root}) is not a folder.")
        return MediaFolder(root, max_image_pixels=max_image_pixels)

    records = open_records(path)
    if eval_path is not None:
        if Path(eval_path).resolve() == Path(path).resolve():
            raise DataError(
                f"data.eval_path and data.path are the same file ({path}): accuracy would be measured on what was "
                "trained. Use data.eval_fraction to hold out a part of it."
            )
        heldout = RecordDataset(open_records(eval_path, key="data.eval_path"), folder(eval_path))
        return Splits(RecordDataset(records, folder(path)), heldout)
    if not eval_fraction:
        return Splits(RecordDataset(records, folder(path)), None)
    if len(records) < 2:
        raise DataError(
            f"data.eval_fraction is {eval_fraction}, but {path} has a single record, which cannot be split. "
            "Set data.eval_fraction=0, or add records."
        )
    count = min(max(1, round(len(records) * eval_fraction)), len(records) - 1)
    order = np.random.default_rng(seed).permutation(len(records))
    train, heldout = np.sort(order[count:]), np.sort(order[:count])
    media = folder(path)
    return Splits(RecordDataset(records, media, train), RecordDataset(records, media, heldout))
