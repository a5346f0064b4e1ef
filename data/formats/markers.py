"""Media in columns of their own, and the markers in the text that say where they belong.

    {"messages": [{"role": "user", "content": "<image>Who are they? And here?<image>"}, ...],
     "images": ["photos/1.jpg", "photos/2.jpg"]}

The n-th `<image>` stands for the n-th of `images`, `<video>` likewise; there must be as many of one as of the other.
Only a record that has the column has markers: elsewhere `<image>` is text that somebody typed, and so it is in what an
assistant says, and in a content that is a list of parts, which places its media itself. There, a part
`{"type": "image"}` without a picture takes the next one of the column. One medium in a column `image` or
`video`, beside a question that is the whole prompt, needs no marker: it stands before the question.
"""

import re
from collections.abc import Mapping
from typing import Any

from data.conversation import Media, Part, PartKind
from data.errors import DataError
from data.formats.fields import media_of

_COLUMNS = {PartKind.IMAGE: ("images", "image"), PartKind.VIDEO: ("videos", "video")}
_MARKER = re.compile("(<image>|<video>)")


class MediaColumns:
    """The media of one record, handed out in order. Call `close` when all its text has been read."""

    def __init__(self, value: Mapping[str, Any]):
        self._media: dict[PartKind, list[Media]] = {}
        self._names: dict[PartKind, str] = {}
        self._taken = dict.fromkeys(_COLUMNS, 0)
        for kind, names in _COLUMNS.items():
            given = [name for name in names if value.get(name) not in (None, "")]
            if len(given) > 1:
                raise DataError(f"the record has both `{given[0]}` and `{given[1]}`. Put all into `{given[0]}`.")
            for name in given:
                column = value[name] if isinstance(value[name], list) else [value[name]]
                self._names[kind] = name
                self._media[kind] = [media_of(media, f"{name}[{index}]") for index, media in enumerate(column)]
        for name in ("audio", "audios"):
            if value.get(name):
                raise DataError(f"the record has `{name}`, and the model does not hear. Remove it.")

    def parts(self, text: str) -> tuple[Part, ...]:
        """The text with the media that its markers stand for."""
        parts = []
        for piece in _MARKER.split(text):
            kind = PartKind(piece[1:-1]) if _MARKER.fullmatch(piece) else PartKind.TEXT
            if kind in self._media:
                parts.append(Part(kind, media=self.take(kind)))
            elif piece:
                joined = parts.pop().text if parts and parts[-1].kind is PartKind.TEXT else ""
                parts.append(Part.of_text(joined + piece))
        return tuple(parts)

    def marked(self, question: str) -> str:
        """A question that is the whole prompt, behind a marker if a column `image` or `video` has one medium."""
        for kind, name in self._names.items():
            marker = f"<{kind.value}>"
            if name == kind.value and len(self._media[kind]) == 1 and marker not in question:
                question = marker + question
        return question

    def has(self, kind: PartKind) -> bool:
        """Has the record a column of this kind, if only an empty one?"""
        return kind in self._media

    def take(self, kind: PartKind) -> Media:
        """The next medium of this kind; a surplus marker gets nothing, and `close` counts it."""
        number = self._taken[kind]
        self._taken[kind] += 1
        media = self._media.get(kind, [])
        return media[number] if number < len(media) else ""

    def close(self) -> None:
        """Raises DataError unless there were as many markers as media."""
        for kind, taken in self._taken.items():
            count = len(self._media.get(kind, []))
            if taken != count:
                name = self._names.get(kind, _COLUMNS[kind][0])
                raise DataError(
                    f"the text has {taken} <{kind.value}> markers and `{name}` has {count} {kind.value}s. Put one "
                    f"<{kind.value}> where each {kind.value} belongs."
                )
