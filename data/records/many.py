"""Several sources as one: the files of a folder, the shards of a pattern.

shard-000.jsonl   3 records      0 1 2
shard-001.jsonl   2 records            3 4
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import xxhash

from data.records.base import Record, Records, RecordStream, Rows


class ManyRecords:
    """One after another; `path` is what the user named to mean them all."""

    def __init__(self, path: Path, parts: Sequence[Records]):
        self.path = path
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))

    @property
    def fingerprint(self) -> str:
        """Of names and contents, in order. Not of the folder: data may move."""
        return _joined(self._parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which has {len(self)}")
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class ManyStreams:
    """One after another."""

    def __init__(self, path: Path, parts: Sequence[RecordStream]):
        self.path = path
        self._parts = tuple(parts)

    @property
    def fingerprint(self) -> str:
        return _joined(self._parts)

    def read_from(self, start: int = 0) -> Rows:
        for part in self._parts:
            start = yield from part.read_from(start)
        return start


def _joined(parts: Sequence[Records | RecordStream]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(f"{part.path.name}\0{part.fingerprint}\0".encode())
    return digest.hexdigest()
