"""Records of one format, written as records of another, one at a time.

    stream ──► Format.read ──► (keep wanted) ──► (copy media) ──► Format.write ──► lines of JSON
       └─ a row that cannot be read, understood or written is refused by name, and the next one is taken

Memory does not grow with the number of records. Media are references and stay so, unless they are to be copied: then
every file is put into one folder beside the output, and the output refers to it there.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import formats
from data.conversation import Conversation, Message, Pair, Part
from data.errors import DataError
from data.formats import Format
from data.formats.erniekit_notes import NOTES
from data.media import MediaFolder, file_ending, is_address
from data.records import Broken, Record, RecordStream
from ernie_model.images import MediaError


@dataclass
class Converter:
    """Turns records into lines. `format` None: that of the first record which any format recognises."""

    to: Format
    format: Format | None = None
    columns: Mapping[str, str] | None = None
    keep_wanted: bool = False
    """Of a pair only the chosen answer, and of labelled answers only the wanted ones."""
    media: "MediaCopy | None" = None
    counts: Counter[str] = field(default_factory=Counter)
    """What was written (conversations, prompts, pairs), and: refused, unwanted, noted, paths (references to files)."""

    def lines(self, stream: RecordStream, refuse: Callable[[str], None]) -> Iterator[str]:
        """The output, line by line. `refuse` is told why for each record that is left out."""
        for row in stream.read_from(0):
            try:
                if isinstance(row, Broken):
                    raise row.error
                line = self._line(row)
            except (DataError, MediaError) as error:
                self.counts["refused"] += 1
                refuse(str(error))
                continue
            if line is not None:
                yield line

    def _line(self, record: Record) -> str | None:
        if self.format is None:
            self.format = formats.recognise(record, self.columns)
        item = self.format.read(record, self.columns)
        if self.keep_wanted:
            wanted = _wanted(item)
            if wanted is None:
                self.counts["unwanted"] += 1
                return None
            item = wanted
        try:
            item = with_media(item, self._counted if self.media is None else self.media.copied)
            assert self.to.write is not None
            value = self.to.write(item)
            line = json.dumps(value, ensure_ascii=False) + "\n"
        except MediaError as error:
            raise DataError(f"{record.source}: {error}") from error
        except TypeError as error:  # bytes or dates of a table, in a column that nobody knows
            raise DataError(f"{record.source}: cannot be written as JSON: {error}.") from error
        self.counts[_kind(item)] += 1
        self.counts["noted"] += NOTES in value
        return line

    def _counted(self, media: str | bytes) -> str | bytes:
        self.counts["paths"] += isinstance(media, str) and not is_address(media)
        return media


class MediaCopy:
    """Copies what records refer to into `folder`; `copied` gives the path that the output names it by."""

    def __init__(self, root: MediaFolder, folder: Path):
        self.root, self.folder = root, folder

    def copied(self, media: str | bytes) -> str | bytes:
        """Raises MediaError for a file that is not there, or lies outside the media folder."""
        if isinstance(media, bytes):
            name = f"{hashlib.blake2b(media, digest_size=16).hexdigest()}{file_ending(media)}"
            return self._place(name, lambda target: target.write_bytes(media))
        if is_address(media):
            return media
        file = self.root.resolve(media)
        assert self.root.root is not None
        name = file.relative_to(self.root.root.resolve()).as_posix()
        return self._place(name, lambda target: shutil.copyfile(file, target))

    def _place(self, name: str, write: Callable[[Path], Any]) -> str:
        target = self.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target)
        return f"{self.folder.name}/{name}"


def with_media(item: Conversation | Pair, change: Callable[[str | bytes], str | bytes]) -> Conversation | Pair:
    """The same with every reference to an image or video changed."""

    def of_part(part: Part) -> Part:
        return part if part.media is None else dataclasses.replace(part, media=change(part.media))

    def of_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(dataclasses.replace(m, parts=tuple(map(of_part, m.parts))) for m in messages)

    if isinstance(item, Conversation):
        return dataclasses.replace(item, messages=of_messages(item.messages))
    prompt = dataclasses.replace(item.prompt, messages=of_messages(item.prompt.messages))
    return dataclasses.replace(
        item, prompt=prompt, chosen=of_messages(item.chosen), rejected=of_messages(item.rejected)
    )


def _wanted(item: Conversation | Pair) -> Conversation | None:
    if isinstance(item, Pair):
        return item.conversations[0]
    return None if item.label is False else dataclasses.replace(item, label=None)


def _kind(item: Conversation | Pair) -> str:
    if isinstance(item, Pair):
        return "pairs"
    return "prompts" if item.is_prompt else "conversations"
