r"""JSON files: one object per line, or one array of objects. The content decides, not the ending of the name.

    {"id": "a", "messages": [...]}          line 1        [                                     ERNIEKit, LLaMA-Factory
                                            no record       {"id": "a", "messages": [...]},      line 2
    {"id": "b", "messages": [...]}          line 3          {"id": "b",
                                                             "messages": [...]}                  line 3
                                                          ]

An array is cut into its elements by counting brackets outside strings, without understanding what is between them. So
memory stays flat, and an element that is broken inside is one broken record. A string of JSON holds no line break: at
the end of a line the scan is outside any string again, so a forgotten quote need not spoil the rest of the file.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data.conversation import Source
from data.errors import DataError
from data.records.base import parse_object
from data.records.files import CHUNK, Layout, Span

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"

# Groups are repeated without `*+`: before Python 3.11.5 it keeps what a last, failing round has read.
_STRING_TEXT = rb'[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*'  # up to its quote, or what ends it wrongly
_WHOLE_STRING = b'"' + _STRING_TEXT + b'"'
_STRING = re.compile(_STRING_TEXT)
# A run of whole strings and what lies between them; or a mark; or the quote of a string that does not end here.
_TOKEN = re.compile(
    rb'(?:[^"\[\]{}, \t\r\n]|' + _WHOLE_STRING + rb')(?:[^"\[\]{},\n]++|' + _WHOLE_STRING + rb')*|["\[\]{},\n]'
)
_QUOTE, _NEWLINE = b'"\n'


def json_layout(path: Path) -> Layout:
    """Lines or an array, by the first character that is not blank. Raises DataError for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(CHUNK).removeprefix(BOM).lstrip(BLANK)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check data.path.") from error
    return ARRAY if head.startswith(b"[") else LINES


def _line_spans(file: BinaryIO, name: str) -> Iterator[Span]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        if raw.strip(BLANK + BOM):
            yield offset, len(raw), number
        offset += len(raw)


def _array_spans(file: BinaryIO, name: str) -> Iterator[Span]:
    """Elements of the array that the file is. Raises DataError if it does not end, or something follows its end."""
    depth, line, closed = 0, 1, False
    start, start_line = -1, 1  # of the element in hand; -1 where none has begun
    for offset, mark in _tokens(file):
        if mark == _NEWLINE:
            line += 1
        elif closed:
            raise DataError(
                f"{name}:{line}: something follows the end of the array. A file is one JSON array, or holds one JSON "
                "object per line."
            )
        elif depth == 1 and mark in b",]":
            if start >= 0:
                yield start, offset - start, start_line
                start = -1
            elif mark == ord(","):
                raise DataError(f"{name}:{line}: a comma with no element before it. Remove it.")
        elif depth == 1 and start < 0:
            start, start_line = offset, line
        depth += (mark in b"[{") - (mark in b"]}")
        closed = closed or (depth == 0 and mark in b"]}")
    if not closed:
        where = f"inside the element that starts in line {start_line}" if start >= 0 else "without its closing bracket"
        raise DataError(
            f"{name}: the JSON array ends {where}. Writing the file was cut short, or a bracket or quote is missing "
            "there."
        )


def _tokens(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Offset and first byte of every bracket, comma, line break, and run of strings and other characters."""
    base, buffer, in_string = 0, file.read(CHUNK), False
    while buffer:
        position = 0
        while position < len(buffer):
            if not in_string:
                if (token := _TOKEN.search(buffer, position)) is None:
                    position = len(buffer)
                    break
                yield base + token.start(), buffer[token.start()]
                in_string, position = token[0] == b'"', token.end()  # a lone quote: its string has no end here
                continue
            string = _STRING.match(buffer, position)
            assert string is not None  # it matches nothing at least
            position = string.end()
            if position >= len(buffer) - 1 and buffer[position:] in (b"", b"\\"):
                break  # the string goes on in the next chunk
            in_string = False
            position += buffer[position] == _QUOTE
        base += position
        more = file.read(CHUNK)
        buffer = buffer[position:] + more if more else b""


def _parse_element(raw: bytes, source: Source) -> dict[str, Any]:
    return parse_object(raw, source, "element of the array")


LINES = Layout(_line_spans, parse_object)
ARRAY = Layout(_array_spans, _parse_element)


def write_jsonl(path: str | os.PathLike[str], values: Iterable[Mapping[str, Any]]) -> Path:
    """One object per line, UTF-8; `open_records` reads it back. Creates the folder. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return path
