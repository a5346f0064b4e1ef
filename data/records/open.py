"""From what the user wrote as `data.path` to its records.

    chats.jsonl  chats.json           one file
    shard-{000..009}.tar              these files, all of which must exist
    chats/                            every file of the folder, in the order of their names; all of one kind
    saved/                            a dataset that `datasets` saved with save_to_disk
    org/name                          where no such folder is: a dataset on the Hugging Face hub

A file is read by the ending of its name (`KINDS`).
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.errors import DataError
from data.records.base import Records, RecordStream
from data.records.files import FileRecords, FileStream
from data.records.json_files import json_layout
from data.records.many import ManyRecords, ManyStreams
from data.records.tables import (
    HUB_NAME,
    ParquetRecords,
    ParquetStream,
    hub_records,
    hub_stream,
    is_saved_dataset,
    saved_records,
    saved_stream,
)
from data.records.tar_files import TAR


@dataclass(frozen=True)
class Kind:
    """How files of one kind are read. A new kind is a line in `KINDS`."""

    records: Callable[[Path], Records]
    stream: Callable[[Path], RecordStream]


JSON = Kind(lambda path: FileRecords(path, json_layout(path)), lambda path: FileStream(path, json_layout(path)))
KINDS: dict[str, Kind] = {
    ".jsonl": JSON,
    ".json": JSON,
    ".parquet": Kind(ParquetRecords, ParquetStream),
    ".tar": Kind(lambda path: FileRecords(path, TAR), lambda path: FileStream(path, TAR)),
}
"""By the ending of the file's name."""

_BRACES = re.compile(r"\{([^{}]*)\}")
T = TypeVar("T")


def open_records(
    path: str | os.PathLike[str], *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> Records:
    """The records that `path` names, by number. Raises DataError, naming the key to mend, where it names none.

    `split`, `subset` and `revision` choose within a Hugging Face dataset; files have none.
    """
    path, files = _look(path, split=split, subset=subset, revision=revision)
    if files:
        return _one_or_many(path, [_kind(file).records(file) for file in files], ManyRecords)
    return saved_records(path, split) if path.is_dir() else hub_records(path.as_posix(), split, subset, revision)


def open_stream(
    path: str | os.PathLike[str], *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> RecordStream:
    """As `open_records`, front to back only. An empty file is a stream of nothing."""
    path, files = _look(path, split=split, subset=subset, revision=revision)
    if files:
        return _one_or_many(path, [_kind(file).stream(file) for file in files], ManyStreams)
    return saved_stream(path, split) if path.is_dir() else hub_stream(path.as_posix(), split, subset, revision)


def _look(path: str | os.PathLike[str], **choices: str | None) -> tuple[Path, list[Path]]:
    """The files that `path` means; none if it is a dataset of the Hugging Face library, in a folder or on the hub."""
    path = Path(path)
    saved = path.is_dir() and is_saved_dataset(path)
    on_hub = not path.exists() and path.suffix.lower() not in KINDS and HUB_NAME.fullmatch(path.as_posix())
    for key, value in choices.items():
        if value is not None and not on_hub and not (saved and key == "split"):
            what = "a saved dataset, which has" if saved else "files, which have"
            raise DataError(
                f"data.{key} is {value!r}, but data.path ({path}) names {what} no {key}. Remove data.{key}."
            )
    return path, [] if saved or on_hub else _files(path)


def _one_or_many(path: Path, parts: list[T], many: Callable[[Path, Sequence[T]], T]) -> T:
    return parts[0] if len(parts) == 1 and path.is_file() else many(path, parts)


def _files(path: Path) -> list[Path]:
    """The files that `path` means; all of one kind, at least one."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path)
    files = [Path(text) for text in expand_braces(str(path))]
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return files
    if len(files) > 1:
        raise DataError(
            f"data.path ({path}) means {len(files)} files, and {len(missing)} of them do not exist, e.g. {missing[0]}. "
            f"Paths are relative to {Path.cwd()}."
        )
    raise DataError(f"data.path ({path}) does not exist. Paths are relative to {Path.cwd()}.")


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if file.suffix.lower() in KINDS]
    endings = sorted({file.suffix.lower() for file in files})
    if not files:
        raise DataError(f"data.path ({folder}) is a folder without a file of the kinds {', '.join(KINDS)}.")
    if len(endings) > 1:
        raise DataError(
            f"data.path ({folder}) is a folder with files of several kinds ({', '.join(endings)}). Name one file, or "
            "keep one kind in a folder."
        )
    return files


def _kind(file: Path) -> Kind:
    kind = KINDS.get(file.suffix.lower())
    if kind is None:
        raise DataError(
            f"data.path ({file}) ends in {file.suffix!r}; this version reads {', '.join(KINDS)}. Convert it first."
        )
    return kind


def expand_braces(pattern: str) -> list[str]:
    """As a shell does: "a{1,2}" is a1 and a2, "s-{08..11}" is s-08, s-09, s-10 and s-11."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise DataError(
            f"data.path ({pattern}): {match[0]} is neither a range of numbers such as {{000..009}} nor a list such as "
            "{a,b}."
        )
    return [
        expanded
        for choice in choices
        for expanded in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]
