"""What ERNIEKit's forms have no words for, kept beside them.

    {"src": [...], "tgt": [...], "ernie": {"label": true, "messages": {"1": {"weight": 0.5, "train": true}}}}

Notes are found by comparing what was to be written with what is read back: whatever does not change the text the model
sees becomes a note, by the number of its message (a pair's are counted prompt, chosen, rejected); the rest is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data.conversation import Conversation, Message, Pair, Part, PartKind, VideoSampling
from data.errors import DataError
from data.formats.fields import read_score, refuse_unknown, typed
from data.formats.turns import write_sampling

NOTES = "ernie"
PLAIN_KEYS = ("train", "weight", "name", "tool_call_id", "reasoning")
KEYS = (*PLAIN_KEYS, "text", "call_ids", "sampling")


def add_notes(value: dict[str, Any], item: Conversation | Pair, read: Conversation | Pair) -> dict[str, Any]:
    """`value`, with notes on how `item`, which it was written from, differs from what is `read` in it."""
    notes: dict[str, Any] = {}
    wanted, found = _messages(item), _messages(read)
    if type(item) is not type(read) or [m.role for m in wanted] != [m.role for m in found]:
        raise DataError("its messages would be read back as other ones.")
    differing = {
        str(number): note
        for number, pair in enumerate(zip(wanted, found, strict=True))
        if (note := _note(*pair, f"messages[{number}]"))
    }
    if differing:
        notes["messages"] = differing
    if _prompt(item).label is not None:
        notes["label"] = _prompt(item).label
    if isinstance(item, Pair) and isinstance(read, Pair) and item.scores != read.scores:
        notes["scores"] = list(item.scores)
    if _prompt(item).tools != _prompt(read).tools:
        raise DataError("its tools would be read back as other ones.")
    return value | {NOTES: notes} if notes else value


def apply_notes(item: Conversation | Pair, notes: Any) -> Conversation | Pair:
    if notes is None:
        return item
    notes = typed(notes, dict, NOTES)
    refuse_unknown(notes, ("label", "messages", "scores"), NOTES)
    messages = list(_messages(item))
    for number, note in typed(notes.get("messages") or {}, dict, f"{NOTES}.messages").items():
        key = f"{NOTES}.messages.{number}"
        if not (number.isdecimal() and int(number) < len(messages)):
            raise DataError(f"{key}: there is no message of this number; there are {len(messages)}.")
        messages[int(number)] = _annotated(messages[int(number)], typed(note, dict, key), key)
    label = notes.get("label")
    label = None if label is None else typed(label, bool, f"{NOTES}.label")
    if isinstance(item, Conversation):
        return dataclasses.replace(item, messages=tuple(messages), label=label)
    prompt, chosen = len(item.prompt.messages), len(item.chosen)
    scores = item.scores
    if notes.get("scores") is not None:
        given = typed(notes["scores"], list, f"{NOTES}.scores")
        if len(given) != 2:
            raise DataError(f"{NOTES}.scores has {len(given)} numbers; a pair has two answers.")
        scores = tuple(read_score(score, f"{NOTES}.scores[{index}]") for index, score in enumerate(given))
    return Pair(
        prompt=dataclasses.replace(item.prompt, messages=tuple(messages[:prompt]), label=label),
        chosen=tuple(messages[prompt : prompt + chosen]),
        rejected=tuple(messages[prompt + chosen :]),
        chosen_score=scores[0],
        rejected_score=scores[1],
    )


def _note(wanted: Message, found: Message, key: str) -> dict[str, Any]:
    """How `wanted` differs from `found`. Raises DataError if the model would see the difference."""
    note: dict[str, Any] = {
        name: getattr(wanted, name) for name in PLAIN_KEYS if getattr(wanted, name) != getattr(found, name)
    }
    # Newlines around a thought are set by the chat format, whatever the record has.
    if _trimmed(wanted.reasoning) != _trimmed(found.reasoning) or (wanted.reasoning is None) != (
        found.reasoning is None
    ):
        raise DataError(f"{key}: its thought would be read back as another one.")
    if wanted.text != found.text:
        if found.reasoning is None or wanted.text.lstrip("\n") != found.text:
            raise DataError(f"{key}: its text would be read back as another one.")
        note["text"] = wanted.text
    if [(part.kind, part.media) for part in _media(wanted)] != [(part.kind, part.media) for part in _media(found)]:
        raise DataError(f"{key}: its images and videos would be read back as other ones.")
    sampling = {str(n): write_sampling(part.sampling) for n, part in enumerate(_media(wanted)) if part.sampling}
    if sampling:
        note["sampling"] = sampling
    calls = [(call.name, dict(call.arguments)) for call in wanted.tool_calls]
    if calls != [(call.name, dict(call.arguments)) for call in found.tool_calls]:
        raise DataError(f"{key}: its tool calls would be read back as other ones.")
    if [call.id for call in wanted.tool_calls] != [call.id for call in found.tool_calls]:
        note["call_ids"] = [call.id for call in wanted.tool_calls]
    return note


def _annotated(message: Message, note: Mapping[str, Any], key: str) -> Message:
    refuse_unknown(note, KEYS, key)
    changes: dict[str, Any] = {name: note[name] for name in PLAIN_KEYS if name in note}
    parts = list(message.parts)
    if "text" in note:
        parts = [*_media(message), Part.of_text(typed(note["text"], str, f"{key}.text"))]
    media = [index for index, part in enumerate(parts) if part.kind is not PartKind.TEXT]
    for number, wish in (note.get("sampling") or {}).items():
        if not (number.isdecimal() and int(number) < len(media)):
            raise DataError(f"{key}.sampling.{number}: there is no video of this number.")
        index = media[int(number)]
        try:
            parts[index] = dataclasses.replace(parts[index], sampling=VideoSampling(**wish))
        except TypeError as error:
            raise DataError(f"{key}.sampling.{number}: {error}.") from error
    if "call_ids" in note:
        ids = typed(note["call_ids"], list, f"{key}.call_ids")
        if len(ids) != len(message.tool_calls):
            raise DataError(f"{key}.call_ids has {len(ids)} ids for {len(message.tool_calls)} calls.")
        calls = zip(message.tool_calls, ids, strict=True)
        changes["tool_calls"] = tuple(dataclasses.replace(call, id=call_id) for call, call_id in calls)
    try:
        return dataclasses.replace(message, parts=tuple(parts), **changes)
    except (DataError, TypeError) as error:
        raise DataError(f"{key}: {error}") from error


def _prompt(item: Conversation | Pair) -> Conversation:
    return item.prompt if isinstance(item, Pair) else item


def _messages(item: Conversation | Pair) -> tuple[Message, ...]:
    if isinstance(item, Conversation):
        return item.messages
    return (*item.prompt.messages, *item.chosen, *item.rejected)


def _media(message: Message) -> list[Part]:
    return [part for part in message.parts if part.kind is not PartKind.TEXT]


def _trimmed(text: str | None) -> str:
    return (text or "").strip("\n")
