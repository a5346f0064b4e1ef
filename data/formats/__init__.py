"""Formats: how other people write down what this suite calls a Conversation or a Pair. One file per format.

    {"messages": [{"role": ...}]}                             messages     read and written
    {"src": [...], "tgt": [...]}, {"text_info": [...]}        erniekit     read and written
    {"conversations": [{"from": ...}]}                        sharegpt
    {"instruction": ..., "output": ...}                       alpaca
    {"prompt": ..., "chosen": ..., "rejected": ...}           preference
    {"prompt": ..., "answer": ...}                            prompt

A format is a name, a way to read one record, a rule that knows its records, and for some a way to write them back.
Columns that are only called differently are renamed first: `columns={"messages": "dialogue"}` says that what the format
calls `messages` is the record's `dialogue`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.conversation import Conversation, Pair
from data.errors import DataError
from data.formats import alpaca, erniekit, messages, preference, prompt, sharegpt
from data.records import Record

MEDIA_COLUMNS = ("image", "images", "video", "videos")
OTHER_NAMES = {"kto_tag": "label"}
"""What LLaMA-Factory's dataset_info.json calls a column, where its name is not the record's own."""


@dataclass(frozen=True)
class Format:
    name: str
    parse: Callable[[Record], Conversation | Pair]
    recognises: Callable[[Mapping[str, Any]], bool]
    """Is this the shape of such a record?"""
    write: Callable[[Conversation | Pair], dict[str, Any]] | None = None
    """The record that is read back as the same thing; raises DataError for what the format has no words for."""

    def read(self, record: Record, columns: Mapping[str, str] | None = None) -> Conversation | Pair:
        """What a record says. Raises DataError, naming file, line and key, for what cannot be honoured."""
        return self.parse(renamed(record, columns))


FORMATS = {
    known.name: known
    for known in (
        Format("messages", messages.read, messages.recognises, messages.write),
        Format("erniekit", erniekit.read, erniekit.recognises, erniekit.write),
        Format("sharegpt", sharegpt.read, sharegpt.recognises),
        Format("alpaca", alpaca.read, alpaca.recognises),
        Format("preference", preference.read, preference.recognises),
        Format("prompt", prompt.read, prompt.recognises),
    )
}


def by_name(name: str) -> Format:
    """Raises DataError for a name that no format has."""
    if name not in FORMATS:
        raise DataError(f"data.format is {name!r}; it must be one of {', '.join(FORMATS)}, or null to recognise it.")
    return FORMATS[name]


def recognise(record: Record, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a record, by its shape. Raises DataError where none fits, or more than one."""
    value = renamed(record, columns).value
    fitting = [known for known in FORMATS.values() if known.recognises(value)]
    if len(fitting) == 1:
        return fitting[0]
    keys = _keys(value)
    if fitting:
        names = " or ".join(known.name for known in fitting)
        raise DataError(
            f"{record.source}: a record with {keys} may be {names}. Say which, e.g. data.format={fitting[0].name}."
        )
    raise DataError(
        f"{record.source}: no format fits a record with {keys}. Name one with data.format= ({', '.join(FORMATS)}), or "
        "say which column is which, e.g. data.columns={messages: dialogue}."
    )


def renamed(record: Record, columns: Mapping[str, str] | None) -> Record:
    """The record with its columns under the names that formats know; `columns` is {our name: the record's name}.

    A column of media may be absent from a record (it has none); any other that is absent is refused, because a typing
    error would otherwise pass for an empty column.
    """
    if not columns:
        return record
    columns = {OTHER_NAMES.get(ours, ours): theirs for ours, theirs in columns.items()}
    value = dict(record.value)
    moved: dict[str, Any] = {}
    for ours, theirs in columns.items():
        if theirs in value:
            moved[ours] = value.pop(theirs)
        elif ours in MEDIA_COLUMNS:
            moved[ours] = []
        else:
            raise DataError(
                f"{record.source}: data.columns says that {ours} is {theirs!r}, but the record has "
                f"{_keys(record.value)}."
            )
    for ours in moved:
        if ours in value:
            raise DataError(
                f"{record.source}: data.columns says that {ours} is {columns[ours]!r}, but the record has a column "
                f"{ours!r} of its own. Give that one another name too, e.g. data.columns.old_{ours}={ours}."
            )
    return dataclasses.replace(record, value=value | moved)


def _keys(value: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, value)) or "no keys at all"
