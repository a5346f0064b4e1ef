"""The errors every bad record ends in: which record, what is wrong, and the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum


class DataError(ValueError):
    """A record, or a whole dataset, that cannot be trained on as it stands."""


class TooLongError(DataError):
    """One conversation has more tokens or patches than a packed row may hold."""


class Stage(Enum):
    """Where a record was refused."""

    READ = "read"
    """Its line or row cannot be read."""
    FORMAT = "format"
    """It is not what its format says."""
    MEDIA = "media"
    """An image or video cannot be opened."""
    ENCODE = "encode"
    """The chat format cannot express it, or nothing in it is trained."""
    SIZE = "size"
    """It does not fit in a row."""


@dataclass(frozen=True)
class Refusal:
    """One record that is left out, and why: a line of quarantine.jsonl."""

    id: str
    dataset: str
    file: str | None
    line: int | None
    stage: Stage
    reason: str


class RefusedError(DataError):
    """One record cannot be used; the others can."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal)  # the one argument, so that the error can be pickled
        self.refusal = refusal

    def __str__(self) -> str:
        return self.refusal.reason


_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+): ")


@contextmanager
def refusing(
    stage: Stage, id: str | None = None, dataset: str = "", file: str | None = None, line: int | None = None
) -> Iterator[None]:
    """Turn a DataError into a RefusedError with what is known about its record.

    A record that could not even be read has no id and no line yet; its error begins with them ("chats.jsonl:7: ...").
    """
    try:
        yield
    except RefusedError:
        raise
    except DataError as error:
        if line is None and (place := _PLACE.match(str(error))):
            file, line = place["file"], int(place["line"])
        name = id or (f"{file}:{line}" if line is not None else str(file))
        raise RefusedError(Refusal(name, dataset, file, line, stage, str(error))) from error
