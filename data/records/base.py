"""What a reader of records is, and what it says of rows that cannot be read.

    Records        by number: `records[7]`, in any order and from any thread; knows its length
    RecordStream   forward only: `stream.read_from(7)`; knows no length

A row that cannot be read is one row less, not the end of the data: `records[7]` raises DataError for that row alone,
and a stream yields `Broken` in its place. Either way the rows after it keep their numbers.
"""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.conversation import Source
from data.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a dataset, not yet understood.

    Its values are what JSON has, and the bytes of media where the source carries media inside (parquet, tar).
    """

    value: dict[str, Any]
    source: Source


@dataclass(frozen=True)
class Broken:
    """A row of a stream that cannot be read; `error` names it."""

    source: Source
    error: DataError


Rows = Generator[Record | Broken, None, int]
"""What `RecordStream.read_from` gives: iterate over it. It returns, as generators do, how many rows were still to be
skipped when the source ended, so that the next source can go on skipping."""


class Records(Protocol):
    """A dataset's rows by number, 0 to len - 1. Memory does not grow with their size. Can be pickled."""

    path: Path

    @property
    def fingerprint(self) -> str:
        """Changes whenever the rows do; a resumed run compares it, so that it cannot train on other data."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises DataError, naming file and line, for a row that cannot be read; the other rows stay readable."""
        ...


class RecordStream(Protocol):
    """A dataset's rows front to back, numbered from 0. Memory grows neither with their size nor their number."""

    path: Path

    @property
    def fingerprint(self) -> str:
        """As `Records.fingerprint`, but cheap: a stream may be too long to be read twice."""
        ...

    def read_from(self, start: int = 0) -> Rows:
        """The rows from number `start` on. Those before it are skipped without being understood.

        Raises DataError where the source itself ends too early, so that the rows behind cannot be reached.
        """
        ...


def parse_object(raw: bytes, source: Source, unit: str = "line") -> dict[str, Any]:
    """One JSON object. Raises DataError, naming file and line, for anything else.

    `unit` is what holds it: a line, an element of an array.
    """
    try:
        text = raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start + 1} of the {unit} (0x{raw[error.start]:02x}) is not UTF-8. "
            "Convert the file, e.g. `iconv -f latin1 -t utf-8`."
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: not readable as JSON ({error}). Each {unit} must hold one whole JSON object: mend or remove it."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{source}: the {unit} holds {text.strip()[:40]}, and each {unit} must hold one JSON object.")
    if "\\ud" in text.lower():
        _refuse_lone_surrogates(value, source)
    return value


def _refuse_lone_surrogates(value: Any, source: Source) -> None:
    """JSON can spell half a character ("\\ud83d"); no tokenizer can take it, and it would fail far from here."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: a string holds half of a surrogate pair (\\u{ord(error.object[error.start]):04x}). "
            "The text was cut inside a character; mend or remove the record."
        ) from error
