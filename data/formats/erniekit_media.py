"""ERNIEKit's form for images and videos.

    {"is_system": 1, "tools": [...],                                              both optional
     "image_info": [{"matched_text_index": 2, "image_url": "img/till_1.png"}],    stands before text 2
     "video_info": [{"matched_text_index": 2, "image_url": "vid/door.mp4"}],      still called image_url
     "text_info": [
       {"text": "You read receipts.", "tag": "mask"},                             text 0 is the system's if is_system,
       {"text": "OK", "tag": "no_mask"},                                          and this answer only fills a place
       {"text": "Total?", "tag": "mask"},
       {"text": "<think>Too small.</think>", "tag": "no_mask", "tool_calls": [{"name": "zoom", "arguments": "{}"}]},
       {"text": "", "tag": "mask", "tool_response": true},                        a tool's result
       {"text": "18.40", "tag": "no_mask"}]}

`no_mask` is what the assistant writes; the two tags take turns. Images come before videos, and both before the text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.conversation import Conversation, Message, Part, PartKind
from data.errors import DataError
from data.formats.fields import (
    conversation,
    join_thought,
    media_of,
    read_tool_call,
    refuse_unknown,
    shown,
    split_thought,
    typed,
)
from data.formats.turns import with_system, write_media
from data.records import Record

TAGS = ("mask", "no_mask")
COLUMNS = {PartKind.IMAGE: "image_info", PartKind.VIDEO: "video_info"}
FILLER = "OK"
FILLER_KEY = "ernie_system_answer"
"""In `Conversation.extra`: the answer to the system's text, where it is another one."""


# -- reading ----------------------------------------------------------------------------------------------------------


def read(record: Record) -> Conversation:
    value = record.value
    texts = typed(value["text_info"], list, "text_info")
    if not texts:
        raise DataError("text_info is empty; a conversation needs at least one text.")
    media = _media(value, len(texts))
    messages = [_message(text, f"text_info[{index}]", media[index]) for index, text in enumerate(texts)]
    for index in range(1, len(texts)):
        if texts[index]["tag"] == texts[index - 1]["tag"]:
            raise DataError(
                f"text_info[{index}] has the tag {texts[index]['tag']!r}, as the text before it has; mask and no_mask "
                "must take turns. Join the two texts."
            )
    used = ("text_info", *COLUMNS.values(), "is_system", "system")
    if not value.get("is_system"):
        return conversation(record, with_system(value.get("system"), messages), used)
    if len(messages) < 2 or [message.role for message in messages[:2]] != ["user", "assistant"]:
        raise DataError("is_system is set, but text_info does not begin with the system's text and an answer to it.")
    system, filler = messages[0], messages[1].text
    read = conversation(record, [Message(role="system", parts=system.parts), *messages[2:]], used)
    return read if filler == FILLER else replace(read, extra={**read.extra, FILLER_KEY: filler})


def _media(value: Mapping[str, Any], num_texts: int) -> list[list[Part]]:
    """What stands before each text."""
    parts: list[list[Part]] = [[] for _ in range(num_texts)]
    for kind, column in COLUMNS.items():
        for number, raw in enumerate(typed(value.get(column) or [], list, column)):
            key = f"{column}[{number}]"
            info = typed(raw, dict, key)
            refuse_unknown(info, ("matched_text_index", "image_url"), key)
            index = info.get("matched_text_index")
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_texts:
                raise DataError(
                    f"{key}.matched_text_index is {shown(index)}; it must be the number of a text, 0 to "
                    f"{num_texts - 1}."
                )
            parts[index].append(Part(kind, media=media_of(info.get("image_url"), f"{key}.image_url")))
    return parts


def _message(value: Any, key: str, media: Sequence[Part]) -> Message:
    value = typed(value, dict, key)
    refuse_unknown(value, ("text", "tag", "tool_calls", "tool_response"), key)
    if value.get("tag") not in TAGS:
        raise DataError(f"{key}.tag is {shown(value.get('tag'))}; it must be mask or no_mask.")
    text = typed(value.get("text"), str, f"{key}.text")
    calls, result = value.get("tool_calls") or [], bool(value.get("tool_response"))
    if value["tag"] == "mask":
        if calls:
            raise DataError(f"{key} has tool_calls, but its tag is mask; only the assistant calls tools.")
        parts = (*media, *([Part.of_text(text)] if text else []))
        return Message(role="tool" if result else "user", parts=parts)
    if media or result:
        what = "tool_response" if result else "an image or video before it"
        raise DataError(f"{key} has {what}, but its tag is no_mask; the assistant writes only text.")
    reasoning, text = split_thought(text, f"{key}.text")
    calls = typed(calls, list, f"{key}.tool_calls")
    return Message(
        role="assistant",
        parts=(Part.of_text(text),) if text else (),
        reasoning=reasoning,
        tool_calls=tuple(read_tool_call(call, f"{key}.tool_calls[{index}]") for index, call in enumerate(calls)),
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def write(item: Conversation) -> dict[str, Any]:
    value: dict[str, Any] = {"tools": [dict(tool) for tool in item.tools]} if item.tools else {}
    texts: list[dict[str, Any]] = []
    media: dict[PartKind, list[dict[str, Any]]] = {kind: [] for kind in COLUMNS}
    for number, message in enumerate(item.messages):
        if message.role == "system":
            if number or any(part.kind is not PartKind.TEXT for part in message.parts):
                raise DataError(f"messages[{number}]: its system text comes first, and is text only.")
            value["is_system"] = 1
            filler = item.extra.get(FILLER_KEY, FILLER)
            texts += [{"text": message.text, "tag": "mask"}, {"text": filler, "tag": "no_mask"}]
            continue
        tag = "no_mask" if message.role == "assistant" else "mask"
        if texts and texts[-1]["tag"] == tag:
            raise DataError(
                f"messages[{number}] is a {message.role}'s after a {item.messages[number - 1].role}'s; with images or "
                "videos, somebody must answer in between."
            )
        kinds = [part.kind for part in message.parts]
        if kinds != sorted(kinds, key=[*COLUMNS, PartKind.TEXT].index):
            raise DataError(f"messages[{number}]: it shows images first, then videos, then the text.")
        for part in message.parts:
            if part.media is not None:
                info = {"matched_text_index": len(texts), "image_url": write_media(part.media)}
                media[part.kind].append(info)
        text: dict[str, Any] = {"text": join_thought(message.reasoning, message.text), "tag": tag}
        if message.tool_calls:
            text["tool_calls"] = [
                {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
                for call in message.tool_calls
            ]
        if message.role == "tool":
            text["tool_response"] = True
        texts.append(text)
    value |= {column: media[kind] for kind, column in COLUMNS.items() if media[kind]}
    return value | {"text_info": texts}
