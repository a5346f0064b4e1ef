"""ShareGPT: `conversations` of `from` and `value`.

{"system": "Be brief.", "tools": "[{\\"name\\": ...}]",                      both optional
 "conversations": [{"from": "human", "value": "<image>Weather there?"},
                   {"from": "function_call", "value": "{\\"name\\": \\"weather\\", \\"arguments\\": {...}}"},
                   {"from": "observation", "value": "rain"},
                   {"from": "gpt", "value": "It rains."}],
 "images": ["photos/bergen.jpg"]}                                          one for each <image> (markers.py)

{"conversations": [human], "chosen": {"from": "gpt", ...}, "rejected": {...}}      a pair
{"conversations": [...], "label": false}                                           is the last answer wanted?
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.conversation import Conversation, Message, Pair
from data.errors import DataError
from data.formats.fields import (
    MEDIA_COLUMNS,
    conversation,
    from_json,
    list_of,
    names_source,
    openai_tools,
    pair,
    present,
    read_tool_call,
    refuse_unknown,
    shown,
    split_thought,
    typed,
)
from data.formats.markers import MediaColumns
from data.formats.turns import read_weight, text_message, with_system
from data.records import Record

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def recognises(value: Mapping[str, Any]) -> bool:
    return any(present(value, key) and list_of(value[key], "from") for key in ("conversations", "messages"))


@names_source
def read(record: Record) -> Conversation | Pair:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    value = record.value
    key = "conversations" if present(value, "conversations") else "messages"
    media = MediaColumns(value)
    messages = with_system(value.get("system"), _turns(value.get(key), key, media))
    used = [key, "system", *MEDIA_COLUMNS]
    tools = openai_tools(value.get("tools"))
    if not present(value, "chosen", "rejected"):
        media.close()
        return conversation(record, messages, used, tools=tools)
    chosen, rejected = (_turns(value[name], name, media) for name in ("chosen", "rejected"))
    media.close()
    prompt = conversation(record, messages, [*used, "chosen", "rejected"], tools=tools)
    return pair(record, prompt, chosen, rejected)


def _turns(value: Any, key: str, media: MediaColumns) -> tuple[Message, ...]:
    if isinstance(value, dict):
        return (_turn(value, key, media),)
    turns: Sequence[Any] = typed(value, list, key)
    return tuple(_turn(turn, f"{key}[{index}]", media) for index, turn in enumerate(turns))


def _turn(value: Any, key: str, media: MediaColumns) -> Message:
    value = typed(value, dict, key)
    refuse_unknown(value, ("from", "value", "weight"), key)
    written = value.get("from")
    if not isinstance(written, str) or written not in ROLES:
        raise DataError(f"{key}.from is {shown(written)}; it must be one of {', '.join(ROLES)}.")
    text = typed(value.get("value"), str, f"{key}.value")
    weight = read_weight(value, key, ROLES[written])
    if written != "function_call":
        return text_message(ROLES[written], text, f"{key}.value", media, weight=weight)
    reasoning, text = split_thought(text, f"{key}.value")
    calls = from_json(text, f"{key}.value")
    calls = calls if isinstance(calls, list) else [calls]
    return Message(
        role="assistant",
        reasoning=reasoning,
        tool_calls=tuple(read_tool_call(call, f"{key}.value[{index}]") for index, call in enumerate(calls)),
        weight=weight,
    )
