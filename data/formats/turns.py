"""One message in OpenAI's form, read and written; and columns that hold some of them.

    {"role": "assistant", "content": "Stop.", "reasoning_content": "A red octagon.",
     "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
     "train": true, "weight": 1.0}

A content is a text or a list of parts. In LLaMA-Factory's parts everything is a `value`, thoughts and calls as well:

    [{"type": "reasoning", "value": "I look it up."}, {"type": "tool_call", "value": "{\\"name\\": ...}"}]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.conversation import Media, Message, Part, PartKind, ToolCall, VideoSampling, chat_tool_call
from data.errors import DataError
from data.formats.fields import (
    from_json,
    media_of,
    present,
    read_tool_call,
    refuse_unknown,
    shown,
    split_thought,
    starts_with_thought,
    typed,
)
from data.formats.markers import MediaColumns
from data.media import data_url

MESSAGE_KEYS = "role content reasoning_content tool_calls tool_call_id name train weight loss_weight".split()
PART_KINDS = {
    "text": PartKind.TEXT,
    "image": PartKind.IMAGE,
    "image_url": PartKind.IMAGE,
    "video": PartKind.VIDEO,
    "video_url": PartKind.VIDEO,
}
OTHER_PARTS = ("reasoning", "tool_call")
SAMPLING_KEYS = {"fps": "fps", "num_frames": "num_frames", "start_s": "start_s", "end_s": "end_s"} | {
    "nframes": "num_frames",  # these three as Qwen's tools write them
    "video_start": "start_s",
    "video_end": "end_s",
}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_messages(value: Any, key: str, media: MediaColumns) -> tuple[Message, ...]:
    messages = typed(value, list, key)
    return tuple(read_message(message, f"{key}[{index}]", media) for index, message in enumerate(messages))


def read_text_or_messages(value: Any, key: str, role: str, media: MediaColumns) -> tuple[Message, ...]:
    """A column that is one text (of `role`), one message, or a list of messages."""
    if isinstance(value, str):
        return (text_message(role, value, key, media),)
    if isinstance(value, dict):
        return (read_message(value, key, media),)
    return read_messages(typed(value, list, key, "a string or a list of messages"), key, media)


def text_message(
    role: str, text: str, key: str, media: MediaColumns, *, train: bool | None = None, weight: float = 1.0
) -> Message:
    """A message of nothing but a text: an assistant's may begin with its thought, other people's has markers."""
    if role != "assistant":
        return Message(role=role, parts=media.parts(text), train=train, weight=weight)
    reasoning, text = split_thought(text, key)
    parts = (Part.of_text(text),) if text else ()
    return Message(role=role, parts=parts, reasoning=reasoning, train=train, weight=weight)


def with_system(system: Any, messages: Sequence[Message], key: str = "system") -> tuple[Message, ...]:
    """The messages behind the text of a `system` column, if there is one."""
    if system is None or system == "":
        return tuple(messages)
    text = typed(system, str, key)
    if messages and messages[0].role == "system":
        raise DataError(f"the record has a {key} text, and its first message is the system's too. Keep one.")
    return (Message(role="system", parts=(Part.of_text(text),)), *messages)


def read_message(value: Any, key: str, media: MediaColumns) -> Message:
    value = typed(value, dict, key)
    refuse_unknown(value, MESSAGE_KEYS, key)
    role = typed(value.get("role"), str, f"{key}.role")
    reasoning, call_id, name, train = (value.get(k) for k in ("reasoning_content", "tool_call_id", "name", "train"))
    reasoning = None if reasoning is None else typed(reasoning, str, f"{key}.reasoning_content")
    calls = typed(value.get("tool_calls") or [], list, f"{key}.tool_calls")
    calls = [read_tool_call(call, f"{key}.tool_calls[{index}]") for index, call in enumerate(calls)]
    content, where = value.get("content"), f"{key}.content"
    if isinstance(content, list):
        thoughts, parts, more_calls = _read_parts(content, where, media)
    elif role == "assistant" and isinstance(content, str):
        thought, text = split_thought(content, where)
        thoughts, parts, more_calls = [] if thought is None else [thought], [Part.of_text(text)] if text else [], []
    else:
        text = typed("" if content is None else content, str, where, "a string or a list of parts")
        thoughts, parts, more_calls = [], media.parts(text), []
    if reasoning is not None:
        thoughts = [reasoning, *thoughts]
    if len(thoughts) > 1:
        raise DataError(f"{key} has {len(thoughts)} thoughts, in its content and beside it. Join them into one.")
    try:
        return Message(
            role=role,
            parts=tuple(parts),
            reasoning=thoughts[0] if thoughts else None,
            tool_calls=(*calls, *more_calls),
            tool_call_id=None if call_id is None else typed(call_id, str, f"{key}.tool_call_id"),
            name=None if name is None else typed(name, str, f"{key}.name"),
            train=None if train is None else typed(train, bool, f"{key}.train"),
            weight=read_weight(value, key, role),
        )
    except DataError as error:
        raise error if str(error).startswith(key) else DataError(f"{key}: {error}") from error


def read_weight(value: Mapping[str, Any], key: str, role: str) -> float:
    weight, loss_weight = value.get("weight"), value.get("loss_weight")
    if role != "assistant" and loss_weight is not None:  # LLaMA-Factory writes one on every message
        if loss_weight != 0:
            raise DataError(
                f"{key}: a {role} message has loss_weight={loss_weight}; only what the assistant writes can be trained."
            )
        loss_weight = None
    if None not in (weight, loss_weight) and weight != loss_weight:
        raise DataError(f"{key} has both weight ({weight}) and loss_weight ({loss_weight}). Keep one.")
    weight = loss_weight if weight is None else weight
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight > 1e30):
        raise DataError(f"{key}.weight is {repr(weight)[:40]}; it must be a number of ordinary size.")
    return 1.0 if weight is None else float(weight)


def _read_parts(content: list[Any], key: str, media: MediaColumns) -> tuple[list[str], list[Part], list[ToolCall]]:
    """Thoughts, text and media, calls. They must come in this order, the one in which the model writes them."""
    thoughts: list[str] = []
    parts: list[Part] = []
    calls: list[ToolCall] = []
    for index, raw in enumerate(content):
        where = f"{key}[{index}]"
        value = typed(raw, dict, where)
        written = value.get("type")
        if isinstance(written, str) and written in OTHER_PARTS:
            refuse_unknown(value, ("type", "value"), where)
            text = typed(value.get("value"), str, f"{where}.value")
            if written == "tool_call":
                calls.append(read_tool_call(from_json(text, f"{where}.value"), f"{where}.value"))
                continue
            if parts or calls:
                raise DataError(f"{where} is reasoning behind text or calls; the model thinks before it answers.")
            thoughts.append(text)
            continue
        if calls:
            raise DataError(f"{where} stands behind a tool call; the model writes its text before its calls.")
        parts.append(_read_part(value, where, media))
    return thoughts, parts, calls


def _read_part(value: dict[str, Any], key: str, media: MediaColumns) -> Part:
    written = value.get("type")
    kind = PART_KINDS.get(written) if isinstance(written, str) else None
    if kind is None or not isinstance(written, str):
        known = ", ".join((*PART_KINDS, *OTHER_PARTS))
        raise DataError(f"{key}.type is {shown(written)}; it must be one of {known}.")
    names = (written, kind.value, "url", "path", "value")
    sampling = SAMPLING_KEYS if kind is PartKind.VIDEO else {}
    refuse_unknown(value, ("type", *dict.fromkeys(names), *sampling), key)
    asked = _read_sampling(value, key) if sampling else None
    name = next((name for name in names if present(value, name)), None)
    if name is None and media.has(kind):
        return Part(kind, media=media.take(kind), sampling=asked)
    if name is None:
        raise DataError(f'{key} has type "{written}" but no "{written}".')
    content, key = value[name], f"{key}.{name}"
    if kind is PartKind.TEXT:
        return Part.of_text(typed(content, str, key))
    if isinstance(content, dict):  # {"image_url": {"url": "...", "detail": "high"}}: what an interface bills
        content = {k: v for k, v in content.items() if k != "detail"}
    return Part(kind, media=media_of(content, key), sampling=asked)


def _read_sampling(value: Mapping[str, Any], key: str) -> VideoSampling | None:
    found: dict[str, float | int] = {}
    for written, name in SAMPLING_KEYS.items():
        number = value.get(written)
        if number is None:
            continue
        whole = name == "num_frames"
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            raise DataError(f"{key}.{written} is {shown(number)}; it must be a {'whole ' if whole else ''}number.")
        if name in found:
            raise DataError(f"{key} has {written} and {name}, which are the same. Keep {name}.")
        found[name] = number
    try:
        return VideoSampling(**found) if found else None  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


# -- writing ----------------------------------------------------------------------------------------------------------


def write_message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": _write_content(message)}
    if message.reasoning is not None:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [chat_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        value["name"] = message.name
    if message.train is not None:
        value["train"] = message.train
    if message.weight != 1.0:
        value["weight"] = message.weight
    return value


def _write_content(message: Message) -> str | list[dict[str, Any]]:
    parts = message.parts
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].kind is PartKind.TEXT and parts[0].text:
        # A string that begins with <think> would be read as a thought; in a part it is what it is.
        if not (message.role == "assistant" and starts_with_thought(parts[0].text)):
            return parts[0].text
    return [
        {"type": part.kind.value, part.kind.value: _write_part(part), **write_sampling(part.sampling)} for part in parts
    ]


def _write_part(part: Part) -> str:
    return part.text if part.media is None else write_media(part.media)


def write_media(media: Media) -> str:
    """A path or address as it is; the content of a file as a data: URL."""
    return data_url(media) if isinstance(media, bytes) else media


def write_sampling(sampling: VideoSampling | None) -> dict[str, Any]:
    if sampling is None:
        return {}
    return {name: value for name, value in vars(sampling).items() if value is not None}
