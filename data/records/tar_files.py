"""Tar shards as WebDataset writes them: files that share a name up to its first dot are one sample, one record.

    shard-000.tar                        record 1
      000017.json  {"messages": [...      {"id": "000017", "messages": [{"role": "user", "content": [
                    "image": "000017.jpg"     {"type": "image", "image": b"..."}, ...
      000017.jpg
      000018.jpg                         record 2
      000018.txt   A cat.                 {"id": "000018", "images": [b"..."], "txt": "A cat."}

The JSON object is the record. Where a string in it is the name of a file of the sample, the file's content takes its
place. Files that it does not name become fields: pictures in the list `images`, films in `videos` (in the order of the
archive), others under their ending; so nothing in a sample is lost without a word. A sample is a piece of the archive
that is an archive itself, so all that is remembered of it is where it begins and ends.
"""

import io
import tarfile
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from data.conversation import Source
from data.errors import DataError
from data.records.base import parse_object
from data.records.files import Layout, Span

MEDIA_LISTS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"), "images"),
    **dict.fromkeys(("mp4", "avi", "mov", "mkv", "webm"), "videos"),
}
"""The list that a file goes to that the JSON does not name, by the last part of its ending."""
TEXTS = ("txt", "cls")


def _sample_spans(file: BinaryIO, name: str) -> Iterator[Span]:
    key, start, end, number = None, 0, 0, 0
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                vars(archive)["members"] = []  # or it remembers them all
                if not member.isfile():
                    continue
                if (new := _split(member.name)[0]) != key:
                    if key is not None:
                        number += 1
                        yield start, member.offset - start, number
                    key, start = new, member.offset
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except tarfile.TarError as error:
        raise DataError(f"{name}: cannot be read as a tar archive ({error}) after {number} samples.") from error
    if key is None:
        return
    with open(name, "rb") as again:  # tarfile takes the end of the file for the end of the archive
        again.seek(end)
        if again.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{name}: the archive is cut short after {number + 1} samples. Copy it again.")
    yield start, end - start, number + 1


def _parse_sample(raw: bytes, source: Source) -> dict[str, Any]:
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            members = [(member.name, _content(archive, member)) for member in archive if member.isfile()]
    except tarfile.TarError as error:
        raise DataError(f"{source}: the sample cannot be read from the archive ({error}).") from error
    key = _split(members[0][0])[0]
    record = next((content for name, content in members if _split(name)[1] == "json"), None)
    files = {name: content for name, content in members if _split(name)[1] != "json"}
    value: dict[str, Any] = {}
    named: set[str] = set()
    if record is not None:
        value = _with_contents(parse_object(record, source, "sample's .json"), files, named)
    unnamed = {name: content for name, content in files.items() if name not in named}
    value |= _fields(unnamed, value.keys(), source)
    return value if value.get("id") is not None else {**value, "id": key.rpartition("/")[2]}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _split(name: str) -> tuple[str, str]:
    """("folder/000017", "jpg") of "folder/000017.jpg"; what follows the first dot is the ending."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _with_contents(value: Any, files: dict[str, bytes], named: set[str]) -> Any:
    """`value` with the contents of files in the place of their names; adds those names to `named`."""
    if isinstance(value, dict):
        return {key: _with_contents(item, files, named) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_contents(item, files, named) for item in value]
    if isinstance(value, str) and "." in value:
        for name, content in files.items():
            if value in (name, name.rpartition("/")[2]):
                named.add(name)
                return content
    return value


def _fields(files: dict[str, bytes], taken: Collection[str], source: Source) -> dict[str, Any]:
    """The fields that files become which no JSON names; none may have a name that the record has already."""
    fields: dict[str, Any] = {}
    for name, content in files.items():
        ending = _split(name)[1]
        field = MEDIA_LISTS.get(ending.rpartition(".")[2], ending)
        if not field or field in taken or (field in fields and not isinstance(fields[field], list)):
            raise DataError(
                f"{source}: the sample's {name} is not named anywhere in its .json, which has {field!r} already. Name "
                "it there, or leave it out of the shard."
            )
        if field != ending:
            fields.setdefault(field, []).append(content)
        else:
            fields[field] = _text(content, name, source) if ending in TEXTS else content
    return fields


def _text(content: bytes, name: str, source: Source) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: the sample's {name} is not UTF-8 ({error.reason}).") from error


TAR = Layout(_sample_spans, _parse_sample)
