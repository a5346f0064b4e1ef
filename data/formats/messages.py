"""Records with `messages`, as OpenAI's chat and fine-tuning interfaces write them.

    {"id": "sign-17",                                                     optional; else "file:line"
     "tools": [{"type": "function", "function": {...}}],                  optional
     "messages": [
       {"role": "system", "content": "Answer briefly."},
       {"role": "user", "content": [
         {"type": "image", "image": "photos/sign.jpg"},                   relative to the dataset's folder
         {"type": "image_url", "image_url": {"url": "photos/b.jpg"}},     the same, in OpenAI's words; or a data: URL
         {"type": "video", "video": "clips/a.mp4"},
         {"type": "text", "text": "What does it say?"}]},
       {"role": "assistant", "content": "Stop.", "reasoning_content": "A red octagon.",
        "tool_calls": [...], "train": true, "weight": 1.0}],              the last four optional
     "answer": "Stop"}                                                    optional: checkable by a program

LLaMA-Factory's spelling of the same (`{"type": "text", "value": ...}`, `loss_weight`) is understood too. What is not
understood is refused rather than skipped: a dropped key means a model trained on something else than the file says.
"""

import json
from collections.abc import Mapping
from typing import Any

from data.conversation import Conversation, Media, Message, Part, PartKind, Source, ToolCall, chat_tool_call
from data.errors import DataError
from data.media import data_url
from data.records import Record

MESSAGE_KEYS = "role content reasoning_content tool_calls tool_call_id name train weight loss_weight".split()
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
PART_KINDS = {"text": PartKind.TEXT, "image": PartKind.IMAGE, "image_url": PartKind.IMAGE} | {
    "video": PartKind.VIDEO,
    "video_url": PartKind.VIDEO,
}


def recognises(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("messages"), list)


def read(record: Record) -> Conversation:
    """The conversation a record holds. Raises DataError, naming file, line and key, for what it cannot honour."""
    value, source = record.value, record.source
    try:
        return _conversation(value, source)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def write(conversation: Conversation) -> dict[str, Any]:
    """The record that `read` turns into the same conversation. Media held as bytes become data: URLs."""
    value: dict[str, Any] = {"id": conversation.id}
    if conversation.tools:
        value["tools"] = [dict(tool) for tool in conversation.tools]
    value["messages"] = [_write_message(message) for message in conversation.messages]
    if conversation.answer is not None:
        value["answer"] = conversation.answer
    return value


# -- reading ----------------------------------------------------------------------------------------------------------


def _conversation(value: Mapping[str, Any], source: Source) -> Conversation:
    if "messages" not in value:
        raise DataError(f"the record has no `messages`, only {', '.join(map(repr, value)) or 'nothing'}.")
    for column in MEDIA_COLUMNS:
        if value.get(column):
            raise DataError(
                f"the record keeps its media in a separate column, `{column}`. Put each image or video where it "
                'belongs in the content: {"type": "image", "image": "path"}.'
            )
    messages = _typed(value["messages"], list, "messages")
    answer = value.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    return Conversation(
        id=str(source if value.get("id") is None else value["id"]),
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages)),
        tools=_tools(value.get("tools")),
        answer=None if answer is None else _typed(answer, str, "answer"),
        source=source,
    )


def _message(value: Any, key: str) -> Message:
    value = _typed(value, dict, key)
    unknown = [name for name, content in value.items() if name not in MESSAGE_KEYS and content is not None]
    if unknown:
        raise DataError(f"{key} has {unknown[0]!r}, which has no meaning here. Known: {', '.join(MESSAGE_KEYS)}.")
    reasoning = value.get("reasoning_content")
    weight, loss_weight = value.get("weight"), value.get("loss_weight")
    if None not in (weight, loss_weight) and weight != loss_weight:
        raise DataError(f"{key} has both weight ({weight}) and loss_weight ({loss_weight}). Keep one.")
    weight = loss_weight if weight is None else weight
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight > 1e30):
        raise DataError(f"{key}.weight is {repr(weight)[:40]}; it must be a number of ordinary size.")
    train = value.get("train")
    role = value.get("role")
    calls = value.get("tool_calls")
    call_id = value.get("tool_call_id")
    try:
        return Message(
            role=_typed(role, str, f"{key}.role"),
            parts=_parts(value.get("content"), f"{key}.content"),
            reasoning=None if reasoning is None else _typed(reasoning, str, f"{key}.reasoning_content"),
            tool_calls=_tool_calls(calls, f"{key}.tool_calls"),
            tool_call_id=None if call_id is None else _typed(call_id, str, f"{key}.tool_call_id"),
            train=None if train is None else _typed(train, bool, f"{key}.train"),
            weight=1.0 if weight is None else float(weight),
        )
    except DataError as error:
        raise error if str(error).startswith(key) else DataError(f"{key}: {error}") from error


def _parts(content: Any, key: str) -> tuple[Part, ...]:
    if content is None or content == "":  # an assistant that only calls tools has no content
        return ()
    if isinstance(content, str):
        return (Part.of_text(content),)
    parts = _typed(content, list, key, "a string or a list of parts")
    return tuple(_part(part, f"{key}[{index}]") for index, part in enumerate(parts))


def _part(value: Any, key: str) -> Part:
    value = _typed(value, dict, key)
    written = value.get("type")
    kind = PART_KINDS.get(written) if isinstance(written, str) else None
    if kind is None:
        raise DataError(f"{key}.type is {value.get('type')!r}; it must be one of {', '.join(PART_KINDS)}.")
    name = next((name for name in (value["type"], kind.value, "url", "path", "value") if name in value), None)
    if name is None:
        raise DataError(f'{key} has type "{value["type"]}" but no "{value["type"]}".')
    content, key = value[name], f"{key}.{name}"
    if isinstance(content, dict) and "url" in content:  # {"image_url": {"url": "..."}}
        content, key = content["url"], f"{key}.url"
    content = _typed(content, str, key)
    return Part.of_text(content) if kind is PartKind.TEXT else Part(kind, media=content)


def _tool_calls(calls: Any, key: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    return tuple(_tool_call(call, f"{key}[{index}]") for index, call in enumerate(_typed(calls, list, key)))


def _tool_call(value: Any, key: str) -> ToolCall:
    value = _typed(value, dict, key)
    function = _typed(value.get("function", value), dict, f"{key}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes the arguments as JSON inside a string
        arguments = _json(arguments or "{}", f"{key}.function.arguments")
    return ToolCall(
        name=_typed(function.get("name"), str, f"{key}.function.name"),
        arguments=_typed({} if arguments is None else arguments, dict, f"{key}.function.arguments"),
        id=value.get("id"),
    )


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):
        tools = _json(tools or "[]", "tools")
    if not tools:
        return ()
    return tuple(_typed(tool, dict, f"tools[{index}]") for index, tool in enumerate(_typed(tools, list, "tools")))


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{key} is a string that is not JSON ({error}).") from error


def _typed(value: Any, kind: type, key: str, wanted: str = "") -> Any:
    if not isinstance(value, kind):
        words = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise DataError(f"{key} is {shown[:60]}; it must be {wanted or words[kind]}.")
    return value


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": _write_content(message.parts)}
    if message.reasoning is not None:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [chat_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.train is not None:
        value["train"] = message.train
    if message.weight != 1.0:
        value["weight"] = message.weight
    return value


def _write_content(parts: tuple[Part, ...]) -> str | list[dict[str, Any]]:
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].kind is PartKind.TEXT and parts[0].text:
        return parts[0].text
    return [{"type": part.kind.value, part.kind.value: _write_part(part)} for part in parts]


def _write_part(part: Part) -> str:
    media: Media | None = part.media
    if media is None:
        return part.text
    return data_url(media) if isinstance(media, bytes) else media
