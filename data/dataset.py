"""Datasets: conversations (or pairs) by number, and the folder their media lie in.

    SetSpec(task="digits")                  -> Splits(train, heldout)     made in memory
    SetSpec(path="train.jsonl")             -> Splits(train, heldout)     read from disk, one record at a time
    SetSpec(path="big.jsonl", streaming)    -> Splits(train, None)        read front to back, block by block

A dataset is fixed: it has a length (a stream has none), `dataset[i]` is the same conversation every time, and its
`fingerprint` tells it from any other. Order, epochs and packing are the loader's business.
"""

import hashlib
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data import formats
from data.conversation import Conversation, Learns, Pair, item_to_learn
from data.errors import DataError, Stage, refusing
from data.formats import Format, messages
from data.media import MediaFolder
from data.records import Broken, Record, Records, RecordStream, open_records, open_stream
from data.tasks import TASKS

TRIES = 10
"""Records from the beginning of a dataset that are looked at for its format and modality; the first readable counts."""

_KEY = re.compile(r"\bdata\.(path|format|columns|split|subset|media_root|limit)\b")

BLOCKS_KEPT = 4
"""Blocks of a stream held in memory: the one that is drawn from, the next, and two that workers may still read."""


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

    def __getitem__(self, index: int) -> Conversation | Pair: ...


@dataclass(frozen=True)
class Splits:
    train: "Dataset | StreamDataset"
    heldout: Dataset | None


class ListDataset:
    """Conversations, or pairs, held in memory."""

    def __init__(self, name: str, items: Sequence[Conversation | Pair], media: MediaFolder | None = None):
        if not items:
            raise DataError(f"{name} holds no conversation.")
        self.name = name
        self.media = media or MediaFolder(None)
        self._items = items

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for item in self._items:
            digest.update(json.dumps(messages.write(item), sort_keys=True).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Conversation | Pair:
        return self._items[index]

    def __iter__(self) -> Iterator[Conversation | Pair]:
        return iter(self._items)


class RecordDataset:
    """Conversations read from a file when they are asked for.

    `indices` chooses some of the records; `read` turns one into a conversation. `twins` are the records that are
    refused because an earlier one has the same id (`find_twins`).
    """

    def __init__(
        self,
        name: str,
        records: Records,
        media: MediaFolder,
        read: Callable[[Record], Conversation | Pair],
        indices: Sequence[int] | np.ndarray | None = None,
        twins: Mapping[int, int] | None = None,
    ):
        self.name = name
        self.media = media
        self._records = records
        self._read = read
        self._indices = np.arange(len(records)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._twins = twins or {}

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self._records.fingerprint.encode() + self._indices.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation | Pair:
        """Raises RefusedError for a record that cannot be read, or is not in its format."""
        number = int(self._indices[index])
        with refusing(Stage.READ, dataset=self.name, file=str(self._records.path)):
            record = self._records[number]
            if number in self._twins:
                first = self._records[self._twins[number]]
                raise DataError(
                    f"{record.source}: the id {record.value['id']!r} is already that of {first.source}. Give each "
                    "record an id of its own, or none; remove one if they are the same."
                )
        return understood(record, self._read, self.name)

    def __iter__(self) -> Iterator[Conversation | Pair]:
        return (self[index] for index in range(len(self)))


class StreamDataset:
    """Conversations of a source that is read front to back, in blocks of `block_size` records.

    A few blocks are held in memory, so that a block may be read in any order. Asking for one that has been dropped
    reads the source again from its beginning: right, and slow.
    """

    def __init__(
        self,
        name: str,
        stream: RecordStream,
        media: MediaFolder,
        read: Callable[[Record], Conversation | Pair],
        *,
        block_size: int,
    ):
        self.name = name
        self.media = media
        self.block_size = block_size
        self._stream = stream
        self._read = read
        self._blocks: OrderedDict[int, list[Record | Broken]] = OrderedDict()
        self._rows: Iterator[Record | Broken] | None = None  # stands before record `_next`
        self._next = 0
        self._lock = threading.Lock()  # workers and the packing thread ask for records of the same blocks

    @property
    def fingerprint(self) -> str:
        return f"{self._stream.fingerprint}/{self.block_size}"

    def block_length(self, block: int) -> int:
        """Records in a block; 0 behind the end."""
        return len(self._block(block))

    def __getitem__(self, number: int) -> Conversation | Pair:
        """Raises RefusedError as `RecordDataset` does, IndexError behind the end."""
        block, offset = divmod(number, self.block_size)
        row = self._block(block)[offset]
        if isinstance(row, Broken):
            with refusing(Stage.READ, dataset=self.name, file=row.source.file, line=row.source.line):
                raise row.error
        return understood(row, self._read, self.name)

    def _block(self, block: int) -> list[Record | Broken]:
        with self._lock:
            if block in self._blocks:
                self._blocks.move_to_end(block)
                return self._blocks[block]
            start = block * self.block_size
            if self._rows is None or self._next != start:
                self._rows = iter(self._stream.read_from(start))
            rows = list(itertools.islice(self._rows, self.block_size))
            self._next = start + self.block_size
            self._blocks[block] = rows
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            return rows


def understood(record: Record, read: Callable[[Record], Conversation | Pair], dataset: str) -> Conversation | Pair:
    """Raises RefusedError for a record that is not in its format."""
    source = record.source
    given = record.value.get("id")
    id = str(source) if given is None else str(given)
    with refusing(Stage.FORMAT, id=id, dataset=dataset, file=source.file, line=source.line):
        return read(record)


def to_item(
    record: Record, *, format: Format, columns: Mapping[str, str] | None, learns: Learns
) -> Conversation | Pair:
    """What is learned from a record. Raises DataError for one of another kind."""
    return item_to_learn(format.read(record, columns), learns)


# ------------------------------------------------------------------------------------------------- from a description


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """Where a dataset is, and what it is; the fields are those of `data` in the settings."""

    path: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    """For errors: which setting a field comes from, where that is not `data.FIELD`."""
    task: str | None = None
    """One of `data.tasks.TASKS`, made in memory, instead of a path."""
    limit: int | None = None
    """Train on the first so many conversations only; what is held out stays whole."""
    format: str | None = None
    columns: Mapping[str, str] | None = None
    split: str | None = None
    subset: str | None = None
    streaming: bool = False
    media_root: str | None = None
    fetch: bool = False


def open_set(
    name: str,
    spec: SetSpec,
    *,
    eval_fraction: float = 0.0,
    seed: int = 0,
    block_size: int = 1024,
    learns: Learns = Learns.CONVERSATIONS,
) -> Splits:
    """One dataset, and its held-out part.

    Held out is a share of the records chosen by the seed (at least one when `eval_fraction` is above 0); a task brings
    its own. Paths of media are relative to `media_root`; without one, to the folder their file is in. Raises DataError
    for a missing or empty file, and for settings that contradict each other or do not fit the first record.
    """
    if spec.task is not None:
        if learns is not Learns.CONVERSATIONS:
            raise DataError(
                f"the task {spec.task} of {name} has one right answer to each question and no wrong ones, which "
                "preferences are learned from. `ernie pairs` makes a file of them (data=files data.path=...)."
            )
        return open_task(name, spec.task, seed, spec.limit)
    with _keys_of(spec):
        return _open_path(name, spec, eval_fraction, seed, block_size, learns)


def _open_path(name: str, spec: SetSpec, eval_fraction: float, seed: int, block_size: int, learns: Learns) -> Splits:
    assert spec.path is not None
    media = _media_folder(spec)
    if spec.streaming:
        if eval_fraction:
            raise DataError(
                f"data.eval_fraction is {eval_fraction}, but {name} is streaming: its length is not known, so no share "
                "of it can be held out. Use data.eval_path, or streaming: false."
            )
        if spec.limit is not None:
            raise DataError(
                f"data.limit is {spec.limit}, but {name} is streaming: records are drawn from all of it as they come. "
                "Leave data.limit out, or use streaming: false."
            )
        stream = open_stream(spec.path, split=spec.split, subset=spec.subset)
        first = next((row for row in itertools.islice(stream.read_from(0), TRIES) if isinstance(row, Record)), None)
        return Splits(StreamDataset(name, stream, media, _reader(spec, first, learns), block_size=block_size), None)
    records = open_records(spec.path, split=spec.split, subset=spec.subset)
    read = _reader(spec, _first(records), learns)
    twins = find_twins(records)
    if not eval_fraction:
        first = np.arange(len(records))[: spec.limit]
        return Splits(RecordDataset(name, records, media, read, first, twins), None)
    if len(records) < 2:
        raise DataError(
            f"data.eval_fraction is {eval_fraction}, but {spec.path} has a single record, which cannot be split. "
            "Set data.eval_fraction=0, or add records."
        )
    count = min(max(1, round(len(records) * eval_fraction)), len(records) - 1)
    order = np.random.default_rng(seed).permutation(len(records))
    train, heldout = np.sort(order[count:])[: spec.limit], np.sort(order[:count])
    return Splits(
        RecordDataset(name, records, media, read, train, twins),
        RecordDataset(name, records, media, read, heldout, twins),
    )


@contextmanager
def _keys_of(spec: SetSpec) -> Iterator[None]:
    """The readers call settings `data.path`, `data.format`, ...; errors shall call them as the user wrote them."""
    try:
        yield
    except DataError as error:
        said = _KEY.sub(lambda match: spec.keys.get(match[1], match[0]), str(error))
        raise DataError(said) from error


def open_task(name: str, task: str, seed: int = 0, limit: int | None = None) -> Splits:
    """A task of data/tasks; the seed fixes what is asked and what is held out."""
    if task not in TASKS:
        raise DataError(f"the task of {name} is {task!r}; it must be one of {', '.join(TASKS)}.")
    train = TASKS[task].conversations("train", seed)
    heldout = TASKS[task].conversations("heldout", seed)
    shared = {conversation.id for conversation in train} & {conversation.id for conversation in heldout}
    assert not shared, f"{sorted(shared)} of {task} are both trained on and held out"
    return Splits(ListDataset(name, train[:limit]), ListDataset(name, heldout))


def find_twins(records: Records) -> dict[int, int]:
    """Records whose id an earlier one has: {number of the later: number of the first}. 8 bytes are held per record.

    Every record is read once, which takes half a minute for a million lines; so not where they carry media inside, or
    where the first has no id (it is then called by its file and line).
    """
    first = _first(records)
    if first is None or first.value.get("id") is None or _carries_bytes(first.value):
        return {}
    hashes = np.zeros(len(records), dtype=np.uint64)
    for number in range(len(records)):
        id = _id_of(records, number)
        # 0 stands for none; Python's own hash of a text differs between processes, and ranks need not agree on it
        hashes[number] = 0 if id is None else hash(id) & (2**64 - 1)
    _, where, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero((counts[where] > 1) & (hashes != 0)).tolist()
    twins: dict[int, int] = {}
    seen: dict[str, int] = {}
    for number in suspects:  # equal hashes may be chance
        id = _id_of(records, number)
        assert id is not None
        if seen.setdefault(id, number) != number:
            twins[number] = seen[id]
    return twins


def _id_of(records: Records, number: int) -> str | None:
    try:
        id = records[number].value.get("id")
    except DataError:  # it will be refused for that
        return None
    return None if id is None else str(id)


def _carries_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_carries_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_carries_bytes, value))
    return isinstance(value, bytes)


def _first(records: Records) -> Record | None:
    """The first record that can be read."""
    for index in range(min(len(records), TRIES)):
        try:
            return records[index]
        except DataError:
            continue
    return None


def _reader(spec: SetSpec, first: Record | None, learns: Learns) -> Callable[[Record], Conversation | Pair]:
    """How the records are read, by the named format or by the shape of the first one that is readable."""
    if spec.format is not None:
        format = formats.by_name(spec.format)
    elif first is not None:
        format = formats.recognise(first, spec.columns)
    else:
        # Nothing to go by. Every record will be refused where it cannot be read; the name only matters for the others.
        format = formats.by_name("messages")
    return partial(to_item, format=format, columns=spec.columns, learns=learns)


def _media_folder(spec: SetSpec) -> MediaFolder:
    assert spec.path is not None
    path = Path(spec.path)
    if spec.media_root is not None:
        root: Path | None = Path(spec.media_root)
        if not Path(spec.media_root).is_dir():
            raise DataError(f"data.media_root ({root}) is not a folder.")
    elif path.is_dir():
        root = path
    else:  # "org/name" on the hub has no folder; a brace pattern names files that exist under other names
        root = path.parent if path.exists() or "{" in path.name else None
    return MediaFolder(root, fetch=spec.fetch)
