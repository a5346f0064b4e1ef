"""Records: the raw rows of a dataset's files, each with the file and line it came from.

    conversations.jsonl                       JsonlRecords
      {"id": "a", "messages": [...]}            [0] -> Record({"id": "a", ...}, line 1)
                                                       (blank lines are no records)
      {"id": "b", "messages": [...]}            [1] -> Record({"id": "b", ...}, line 3)

A file is scanned once, front to back, for where its lines start; records are then read from disk one at a time, so
memory does not grow with their size (16 bytes per record). To read another kind of file, write a class with the same
four members and name its ending in `READERS`.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.conversation import Source
from data.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a dataset, not yet understood."""

    value: dict[str, Any]
    source: Source


class Records(Protocol):
    """A dataset's rows by number, 0 to len - 1."""

    path: Path

    @property
    def fingerprint(self) -> str:
        """Changes whenever the rows do; a resumed run compares it, so that it cannot train on other data."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class JsonlRecords:
    """A JSON-lines file: one JSON object per line, UTF-8. Blank lines are skipped."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._offsets = array("q")
        self._lines = array("q")
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(self.path, "rb") as file:
                offset = 0
                for number, raw in enumerate(file, start=1):
                    if raw.strip(b" \t\r\n\xef\xbb\xbf"):
                        self._offsets.append(offset)
                        self._lines.append(number)
                    digest.update(raw)
                    offset += len(raw)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}. Check data.path.") from error
        self._size = offset
        self._fingerprint = digest.hexdigest()
        if not self._offsets:
            raise DataError(f"{self.path} holds no record. Check data.path, or whether writing the file was cut short.")

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which has {len(self)}")
        # Opened anew for every record: a shared handle has one position, and threads would move it under each other.
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise DataError(
                    f"{self.path} has changed its size since this run started reading it. Data must not be rewritten "
                    "under a running job: stop, then start again with the new file."
                )
            file.seek(self._offsets[index])
            return parse_line(file.readline(), Source(str(self.path), self._lines[index]))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def parse_line(raw: bytes, source: Source) -> Record:
    """One line of a JSON-lines file. Raises DataError, naming file and line, for anything that is not an object."""
    try:
        text = raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8. "
            "Convert the file, e.g. `iconv -f latin1 -t utf-8`."
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: not readable as JSON ({error}). Each line must hold one whole JSON object: mend or remove it."
        ) from error
    if isinstance(value, list):
        raise DataError(
            f"{source}: the line holds a JSON array. Each line must hold one JSON object; "
            "`jq -c '.[]' file.json > file.jsonl` turns an array into lines."
        )
    if not isinstance(value, dict):
        raise DataError(f"{source}: the line holds {text.strip()[:40]}, and each line must hold one JSON object.")
    if "\\ud" in text.lower():
        _refuse_lone_surrogates(value, source)
    return Record(value, source)


def _refuse_lone_surrogates(value: Any, source: Source) -> None:
    """JSON can spell half a character ("\\ud83d"); no tokenizer can take it, and it would fail far from here."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: a string holds half of a surrogate pair (\\u{ord(error.object[error.start]):04x}). "
            "The text was cut inside a character; mend or remove the record."
        ) from error


READERS: dict[str, Callable[[Path], Records]] = {".jsonl": JsonlRecords}
"""How to read a file, by the ending of its name."""


def open_records(path: str | os.PathLike[str]) -> Records:
    """The records of a data file. Raises DataError for a missing, empty or unknown file."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"data.path ({path}) is a folder. Name the file inside it, e.g. {path / 'train.jsonl'}.")
    if not path.exists():
        raise DataError(f"data.path ({path}) does not exist. Paths are relative to {Path.cwd()}.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data.path ({path}) ends in {path.suffix!r}; this version reads {', '.join(READERS)}. Convert it first."
        )
    return reader(path)


def write_jsonl(path: str | os.PathLike[str], values: Iterable[Mapping[str, Any]]) -> Path:
    """One object per line, UTF-8; `JsonlRecords` reads it back. Creates the folder. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return path
