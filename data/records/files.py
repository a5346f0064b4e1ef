"""Files in which every record is a stretch of bytes, wherever the stretches come from.

    layout.spans(file)                 (offset, size, line) of every record, front to back, holding none of them
    layout.parse(bytes, source)        one stretch -> a record's value

    FileRecords(path, layout)          remembers the spans (24 bytes a record), reads a record when asked for it
    FileStream(path, layout)           remembers nothing

JSON lines, a JSON array and a tar shard are three layouts (json_files.py, tar_files.py).
"""

import io
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data.conversation import Source
from data.errors import DataError
from data.records.base import Broken, Record, Rows

CHUNK = 1 << 20
"""Bytes read at a time."""

Span = tuple[int, int, int]
"""Offset and size in bytes, and the line (or the number of the row), counted from 1."""


@dataclass(frozen=True)
class Layout:
    """How records lie in a file. The functions are named ones, so that a layout can be pickled."""

    spans: Callable[[BinaryIO, str], Iterator[Span]]
    """Takes the open file, and its name for errors. Reads front to back, never seeks."""
    parse: Callable[[bytes, Source], dict[str, Any]]


class FileRecords:
    """The records of one file by number. The file is read through once for where they are, and for its fingerprint."""

    def __init__(self, path: str | os.PathLike[str], layout: Layout):
        self.path = Path(path)
        self._parse = layout.parse
        self._offsets, self._sizes, self._lines = array("q"), array("q"), array("q")
        digest = xxhash.xxh3_128()
        with _readable(self.path):
            raw = _Hashed(self.path, digest.update)
            with io.BufferedReader(raw, CHUNK) as file:
                for offset, size, line in layout.spans(file, str(self.path)):
                    self._offsets.append(offset)
                    self._sizes.append(size)
                    self._lines.append(line)
                while file.read(CHUNK):  # what follows the last record is part of the content too
                    pass
            self._size = raw.size
        self._fingerprint = digest.hexdigest()
        if not self._offsets:
            raise DataError(f"{self.path} holds no record. Check data.path, or whether writing the file was cut short.")

    @property
    def fingerprint(self) -> str:
        """Of the whole content."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which has {len(self)}")
        # Opened anew for every record: a shared handle has one position, and threads would move it under each other.
        with _readable(self.path), open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise DataError(
                    f"{self.path} has changed its size since this run started reading it. Data must not be rewritten "
                    "under a running job: stop, then start again with the new file."
                )
            file.seek(self._offsets[index])
            source = Source(str(self.path), self._lines[index])
            return Record(self._parse(file.read(self._sizes[index]), source), source)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class FileStream:
    """The records of one file, front to back."""

    def __init__(self, path: str | os.PathLike[str], layout: Layout):
        self.path = Path(path)
        self._layout = layout
        self._fingerprint = sampled_fingerprint(self.path)

    @property
    def fingerprint(self) -> str:
        """Of the file's size and its two ends: reading it whole would be the epoch over again."""
        return self._fingerprint

    def read_from(self, start: int = 0) -> Rows:
        # One handle finds the records, the other reads them: from the system's cache, where the first has just been.
        with _readable(self.path), open(self.path, "rb", CHUNK) as scan, open(self.path, "rb") as file:
            for offset, size, line in self._layout.spans(scan, str(self.path)):
                if start:
                    start -= 1
                    continue
                file.seek(offset)
                source = Source(str(self.path), line)
                try:
                    item: Record | Broken = Record(self._layout.parse(file.read(size), source), source)
                except DataError as error:
                    item = Broken(source, error)
                yield item
        return start


class _Hashed(io.FileIO):
    """A file whose content is passed to `update` as it is read."""

    def __init__(self, path: Path, update: Callable[[memoryview], None]):
        super().__init__(path, "rb")
        self._update = update
        self.size = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer) or 0
        self._update(memoryview(buffer)[:count])
        self.size += count
        return count

    def readall(self) -> bytes:
        raise io.UnsupportedOperation("read in chunks")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}. Check data.path.") from error


def content_fingerprint(path: Path) -> str:
    """Of the whole content of a file."""
    with _readable(path), open(path, "rb") as file:
        digest = xxhash.xxh3_128()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest()


def sampled_fingerprint(path: Path) -> str:
    """Of a file's size and the first and last 64 KiB of its content."""
    end = 1 << 16
    with _readable(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(end)
        file.seek(max(0, size - end))
        return xxhash.xxh3_128_hexdigest(size.to_bytes(8, "big") + head + file.read(end))
