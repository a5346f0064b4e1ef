"""Rows of Arrow tables: parquet files, and datasets of the Hugging Face library.

    chats.parquet                 row groups; the one that is asked for is read and kept, others are let go
    org/name                      downloaded once and mapped into memory by `datasets`, or streamed
    folder of `save_to_disk`      mapped into memory

A picture in a table is a struct of `bytes` and `path`, as `datasets` writes it; in a record it is its bytes, or its
path where it has no bytes. Nothing is decoded here.
"""

import os
import re
import tempfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.conversation import Source
from data.errors import DataError
from data.records.base import Broken, Record, Rows
from data.records.files import CHUNK, content_fingerprint, sampled_fingerprint

KEPT_BYTES = 256 << 20
"""Row groups are kept in memory up to this size, all together; one that is larger by itself is kept in a file."""
BATCH_ROWS = 64  # of a stream: few enough for large pictures, and enough to make reading cheap

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


# ------------------------------------------------------------------------------------------------------------- parquet


class ParquetRecords:
    """The rows of a parquet file by number."""

    def __init__(self, path: Path):
        self.path = path
        with _readable(path):
            metadata = pq.read_metadata(path)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._bytes = [group.total_byte_size for group in groups]
        if not self._ends or not self._ends[-1]:
            raise DataError(f"{path} holds no record. Check data.path, or whether writing the file was cut short.")
        self._fingerprint = content_fingerprint(path)
        self._start()

    def _start(self) -> None:
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def fingerprint(self) -> str:
        """Of the whole content."""
        return self._fingerprint

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which has {len(self)}")
        group = bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        return _row(self._group(group).slice(row, 1), Source(str(self.path), index + 1))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def _group(self, group: int) -> pa.Table:
        with self._lock, _readable(self.path):
            if group not in self._kept:
                room = KEPT_BYTES - self._bytes[group]
                while self._kept and sum(self._bytes[kept] for kept in self._kept) > room:
                    self._kept.popitem(last=False)
                self._kept[group] = self._read(group)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _read(self, group: int) -> pa.Table:
        with pq.ParquetFile(self.path, buffer_size=CHUNK) as file:
            if self._bytes[group] <= KEPT_BYTES:
                return file.read_row_group(group)
            # Writers that know nothing of training put a million rows in one group. Mapped, the system lets go of it.
            with tempfile.NamedTemporaryFile(suffix=".arrow") as unfolded:
                with pa.ipc.new_file(unfolded.name, file.schema_arrow) as out:
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                        out.write_batch(batch)
                return pa.ipc.open_file(pa.memory_map(unfolded.name)).read_all()  # it lives on while it is mapped


class ParquetStream:
    """The rows of a parquet file, front to back; row groups that are skipped are not read."""

    def __init__(self, path: Path):
        self.path = path
        self._fingerprint = sampled_fingerprint(path)

    @property
    def fingerprint(self) -> str:
        """Of the file's size and its two ends; the end of a parquet file sums up its content."""
        return self._fingerprint

    def read_from(self, start: int = 0) -> Rows:
        number = 0
        with _readable(self.path), pq.ParquetFile(self.path, buffer_size=CHUNK) as file:
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows <= start:
                    start, number = start - rows, number + rows
                    continue
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    for row in range(batch.num_rows):
                        number += 1
                        if start:
                            start -= 1
                        else:
                            yield _row_or_broken(batch.slice(row, 1), Source(str(self.path), number))
        return start


# --------------------------------------------------------------------------------------------------------- Hugging Face


class DatasetRecords:
    """The rows of a `datasets.Dataset` by number; its files are mapped into memory."""

    def __init__(self, path: Path, name: str, dataset: Any):
        self.path = path
        self._name = name
        self._dataset = dataset.with_format("arrow")  # rows as they are stored: pictures stay files
        self._fingerprint: str | None = None
        if not len(dataset):
            raise DataError(f"data.path ({name}) holds no record.")

    @property
    def fingerprint(self) -> str:
        """Of the content of its files."""
        # The library's own `_fingerprint` says how a dataset was made, not what is in it, and some of its functions
        # give it at random.
        if self._fingerprint is None:
            contents = [content_fingerprint(Path(file["filename"])) for file in self._dataset.cache_files]
            self._fingerprint = _digest(self._name.partition(" ")[2], str(len(self)), *contents)
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self._name}, which has {len(self)}")
        return _row(*self.row(index))

    def row(self, index: int) -> tuple[pa.Table, Source]:
        """As it is stored."""
        return self._dataset[index], Source(self._name, index + 1)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class SavedStream:
    """The rows of a dataset on this disk, front to back."""

    def __init__(self, records: DatasetRecords, fingerprint: str):
        self.path = records.path
        self._records = records
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Of its files' sizes and their ends."""
        return self._fingerprint

    def read_from(self, start: int = 0) -> Rows:
        for index in range(start, len(self._records)):
            yield _row_or_broken(*self._records.row(index))
        return max(0, start - len(self._records))


class HubStream:
    """The rows of a dataset on the hub, front to back (`IterableDataset`)."""

    def __init__(self, path: Path, name: str, dataset: Any, fingerprint: str):
        self.path = path
        self._name = name
        self._dataset = dataset.with_format("arrow")
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the addresses of its files, which name the commit."""
        return self._fingerprint

    def read_from(self, start: int = 0) -> Rows:
        rows = iter(self._dataset.skip(start))
        number = start
        while True:
            try:
                table = next(rows, None)
            except Exception as error:  # the network's, the hub's and Arrow's
                raise DataError(
                    f"{self._name}: reading stopped after {number} rows ({type(error).__name__}: {error})."
                ) from error
            if table is None:
                return 0
            number += 1
            yield _row_or_broken(table, Source(self._name, number))


def is_saved_dataset(folder: Path) -> bool:
    """Was it written by `save_to_disk`?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_records(folder: Path, split: str | None) -> DatasetRecords:
    dataset, split = _load_saved(folder, split)
    return DatasetRecords(folder, _named(str(folder), None, split), dataset)


def saved_stream(folder: Path, split: str | None) -> SavedStream:
    dataset, split = _load_saved(folder, split)
    ends = [sampled_fingerprint(Path(file["filename"])) for file in dataset.cache_files]
    records = DatasetRecords(folder, _named(str(folder), None, split), dataset)
    return SavedStream(records, _digest(str(split), str(len(records)), *ends))


def hub_records(name: str, split: str | None, subset: str | None, revision: str | None) -> DatasetRecords:
    import datasets  # slow to import, and few runs need it

    with _from_hub(name):
        found = datasets.load_dataset(name, subset, revision=revision, keep_in_memory=False)
        dataset, split = _choose_split(name, found, split)
        return DatasetRecords(Path(name), _named(name, subset, split), dataset)


def hub_stream(name: str, split: str | None, subset: str | None, revision: str | None) -> HubStream:
    import datasets

    with _from_hub(name):
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
        dataset, split = _choose_split(name, builder.as_streaming_dataset(), split)
        files = (builder.config.data_files or {}).get(str(split)) or []
        fingerprint = _digest(str(subset), str(split), *map(str, files))
        return HubStream(Path(name), _named(name, subset, split), dataset, fingerprint)


def _load_saved(folder: Path, split: str | None) -> tuple[Any, str | None]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"data.path ({folder}): the saved dataset cannot be read ({error}).") from error
    return _choose_split(str(folder), found, split)


def _choose_split(name: str, found: Any, split: str | None) -> tuple[Any, str | None]:
    """The split named, or `train`, or the only one."""
    if not isinstance(found, dict):
        if split is not None:
            raise DataError(f"data.split is {split!r}, but {name} has no splits. Remove data.split.")
        return found, None
    if split is None:
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
    if split not in found:
        raise DataError(
            f"data.split is {'not set' if split is None else repr(split)}; {name} has {', '.join(sorted(found))}. Name "
            "one of them."
        )
    return found[split], split


def _named(name: str, subset: str | None, split: str | None) -> str:
    """What sources and errors call it: "org/name [en, train]"."""
    chosen = ", ".join(part for part in (subset, split) if part)
    return f"{name} [{chosen}]" if chosen else name


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library's and the network's, of many families
        raise DataError(
            f"data.path ({name}) is no file or folder here (paths are relative to {Path.cwd()}), and loading it from "
            f"the Hugging Face hub failed: {type(error).__name__}: {str(error)[:300]}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------- rows


def _row(table: pa.Table | pa.RecordBatch, source: Source) -> Record:
    """The only row of `table`."""
    try:
        (value,) = table.to_pylist()
    except (pa.ArrowException, ValueError) as error:  # text that is not UTF-8, a date that Python has not
        raise DataError(f"{source}: the row cannot be read ({error}).") from error
    return Record(_plain(value), source)


def _row_or_broken(table: pa.Table | pa.RecordBatch, source: Source) -> Record | Broken:
    try:
        return _row(table, source)
    except DataError as error:
        return Broken(source, error)


def _plain(value: Any) -> Any:
    """What JSON has, and bytes."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bytes | bool | int | float) else str(value)


def _digest(*texts: str) -> str:
    return xxhash.xxh3_128_hexdigest("\0".join(texts).encode())


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}). Check data.path.") from error
