"""What all formats share: values of the right type, columns that mean the same everywhere, errors that name the key.

    id        text or number; else the record's file and line
    answer    the right answer, checkable by a program          reward   name of the program that checks it
    label     is the last answer wanted? (or `kto_tag`)         tools    a list of definitions, or JSON that holds one
    score_chosen, score_rejected    how good the answers of a pair were found to be; other data sets' names: SCORES
    extra     an object; joined by every column that nobody knows, so that converting keeps it

null is the same as absent: tables written as JSON lines have every column in every record.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from data.conversation import Conversation, Media, Message, Pair, ToolCall
from data.errors import DataError
from data.media import from_data_url
from data.records import Record

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")

Item = TypeVar("Item", bound=Conversation | Pair)


def names_source(read: Callable[[Record], Item]) -> Callable[[Record], Item]:
    """`read`, whose errors begin with the file and line of the record."""

    @functools.wraps(read)
    def with_source(record: Record) -> Item:
        try:
            return read(record)
        except DataError as error:
            named = str(error).startswith(f"{record.source}: ")  # by another format's reader
            raise error if named else DataError(f"{record.source}: {error}") from error

    return with_source


def typed(value: Any, kind: type, key: str, wanted: str = "") -> Any:
    """`value`, which must be a `kind`. Raises DataError that names the key and shows the value."""
    if not isinstance(value, kind):
        words = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}
        raise DataError(f"{key} is {shown(value)}; it must be {wanted or words[kind]}.")
    return value


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]


def present(value: Mapping[str, Any], *keys: str) -> bool:
    """Are all of these there, and not null?"""
    return all(value.get(key) is not None for key in keys)


def refuse_unknown(value: Mapping[str, Any], known: Collection[str], key: str) -> None:
    """What is not understood inside a message is refused: a dropped key means a model trained on something else."""
    for name, content in value.items():
        if name not in known and content is not None:
            raise DataError(f"{key} has {name!r}, which has no meaning here. Known: {', '.join(known)}.")


def from_json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{key} is a string that is not JSON ({error}).") from error


def list_of(value: Any, key: str) -> bool:
    """Is it a list of objects that have `key`? (The first one stands for all; reading finds the others.)"""
    return isinstance(value, list) and (not value or (isinstance(value[0], dict) and key in value[0]))


def media_of(value: Any, key: str) -> Media:
    """A path or address; or the content of a file: bytes, a data: URL, or a table's {"bytes": ..., "path": ...}."""
    if isinstance(value, dict):
        refuse_unknown(value, ("bytes", "path", "url"), key)
        value = next((value[name] for name in ("bytes", "url", "path") if value.get(name) is not None), None)
    if isinstance(value, bytes):
        return value
    value = typed(value, str, key)
    content = from_data_url(value)
    return value if content is None else content


def conversation(
    record: Record,
    messages: Sequence[Message],
    used: Collection[str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer: Any = None,
) -> Conversation:
    """A conversation of these messages with the columns that all formats share; `used` are those the format read.

    `tools` and `answer` are given where the format has its own way of writing them.
    """
    value = record.value
    identity, answer = value.get("id"), value.get("answer") if answer is None else answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    shared = ["id", "answer", *LABELS, "tools"]
    labels = [key for key in LABELS if key not in used and present(value, key)]
    if len(labels) > 1:
        raise DataError(f"the record has both `{labels[0]}` and `{labels[1]}`, which are the same. Keep one.")
    reward = value.get("reward")
    if isinstance(reward, str):  # a number is somebody's score, not the name of a function
        shared.append("reward")
    if "ernie" in value and "ernie" not in used:
        raise DataError("the record has notes under `ernie`, which belong to data.format=erniekit.")
    extra = {key: content for key, content in value.items() if key not in used and key not in shared}
    given = extra.pop("extra", None)
    if isinstance(given, dict):
        if both := sorted(extra.keys() & given.keys()):
            raise DataError(f"{both[0]!r} is a column, and a key of `extra` too. Rename one.")
        extra |= given
    elif given is not None:
        extra["extra"] = given
    return Conversation(
        id=str(record.source if identity is None else identity),
        messages=tuple(messages),
        tools=tuple(read_tools(value.get("tools")) if tools is None else tools),
        answer=None if answer is None else typed(answer, str, "answer"),
        reward=reward if isinstance(reward, str) else None,
        label=read_label(value[labels[0]], labels[0]) if labels else None,
        extra=extra,
        source=record.source,
    )


def write_shared(item: Conversation) -> dict[str, Any]:
    """The shared columns but id, tools and label, which formats place themselves."""
    value: dict[str, Any] = {}
    if item.answer is not None:
        value["answer"] = item.answer
    if item.reward is not None:
        value["reward"] = item.reward
    if item.extra:
        value["extra"] = dict(item.extra)
    return value


def read_label(label: Any, key: str) -> bool:
    if isinstance(label, bool):
        return label
    if isinstance(label, int) and label in (0, 1):
        return bool(label)
    raise DataError(
        f"{key} is {shown(label)}; it says whether the last answer is wanted, and must be true or false. Give a column "
        f"that means something else another name, e.g. data.columns.category={key}."
    )


LABELS = ("label", "kto_tag")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def pair(record: Record, prompt: Conversation, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    """A pair with the scores that the record gives its answers, which are then none of the prompt's `extra`."""
    value = record.value
    given = [keys for keys in SCORES if any(present(value, key) for key in keys)]
    if len(given) > 1:
        raise DataError(f"the answers have scores twice, as {given[0][0]} and as {given[1][0]}. Keep one.")
    scores = [read_score(value.get(key), key) for keys in given for key in keys] or [None, None]
    extra = {key: content for key, content in prompt.extra.items() if not any(key in keys for keys in given)}
    return Pair(
        prompt=dataclasses.replace(prompt, extra=extra),
        chosen=chosen,
        rejected=rejected,
        chosen_score=scores[0],
        rejected_score=scores[1],
    )


def read_score(value: Any, key: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        raise DataError(
            f"{key} is {shown(value)}; it says how good an answer is, and must be a number. Give a column that means "
            f"something else another name, e.g. data.columns.note={key}."
        )
    return float(value)


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):
        tools = from_json(tools, "tools") if tools.strip() else None
    if not tools:
        return ()
    return tuple(typed(tool, dict, f"tools[{index}]") for index, tool in enumerate(typed(tools, list, "tools")))


def openai_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """As `read_tools`; bare definitions ({"name": ...}) are put into OpenAI's form, in which the model sees tools."""
    return tuple(
        {"type": "function", "function": dict(tool)} if "name" in tool and "type" not in tool else tool
        for tool in read_tools(tools)
    )


def read_tool_call(value: Any, key: str) -> ToolCall:
    """`{"id"?, "function": {"name", "arguments"}}`, or name and arguments themselves; arguments may be JSON text."""
    value = typed(value, dict, key)
    if value.get("function") is None:
        function, where = value, key
        refuse_unknown(value, ("id", "type", "name", "arguments"), key)
    else:
        function, where = typed(value["function"], dict, f"{key}.function"), f"{key}.function"
        refuse_unknown(value, ("id", "type", "function"), key)
        refuse_unknown(function, ("name", "arguments"), where)
    if value.get("type") not in (None, "function"):
        raise DataError(f"{key}.type is {shown(value['type'])}; only functions can be called.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes the arguments as JSON inside a string
        arguments = from_json(arguments or "{}", f"{where}.arguments")
    return ToolCall(
        name=typed(function.get("name"), str, f"{where}.name"),
        arguments=typed({} if arguments is None else arguments, dict, f"{where}.arguments"),
        id=None if value.get("id") is None else typed(value["id"], str, f"{key}.id"),
    )


_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


def starts_with_thought(text: str) -> bool:
    return text.lstrip().startswith("<think>")


def split_thought(text: str, key: str) -> tuple[str | None, str]:
    """What an assistant thought, and what it said: `<think>Last line.</think>18.40` is how others write both.

    Newlines around the tags are layout, which the chat format sets itself.
    """
    if not starts_with_thought(text):
        return None, text
    match = _THOUGHT.match(text)
    if match is None:
        raise DataError(f"{key} begins with <think>, but there is no </think> after it. Close the thought.")
    return match["thought"].strip("\n"), match["answer"].lstrip("\n")


def join_thought(reasoning: str | None, text: str) -> str:
    """The inverse of `split_thought`, where there is one."""
    return text if reasoning is None else f"<think>{reasoning}</think>{text}"
