"""ERNIEKit, the family's own training suite. Four forms; a conversation is written in the first that can express it.

    text      {"system": "Briefly.", "src": ["Capital of Norway?"], "tgt": ["Oslo."], "label": [1]}      1: trained
    pair      {"src": ["Is a whale a fish?"], "tgt": [], "response": [["No."], ["Yes."]], "sort": [1, 0]}
    messages  {"messages": [..., {"role": "assistant", "content": "<think>Call it.</think>", "tool_calls": [...]}],
               "tools": [...]}                             OpenAI's form (turns.py), for thoughts and function calls
    media     {"text_info": [...], "image_info": [...]}    erniekit_media.py

The answer with the highest `sort` is chosen, that with the lowest rejected, and others between them are left out (an
answer's rank says nothing of how it compares with its neighbour's). `sort` other than 1 and 0 is kept as the answers'
scores. An answer of several turns takes turns with the user's. What these forms
have no words for is written beside them, under `ernie` (erniekit_notes.py); ERNIEKit does not read that, and so
trains on the same text, but not with the same weights. What would change the text is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.conversation import Conversation, Message, Pair, PartKind, Source
from data.errors import DataError
from data.formats import erniekit_media
from data.formats.erniekit_notes import NOTES, add_notes, apply_notes
from data.formats.fields import conversation, join_thought, names_source, present, shown, typed, write_shared
from data.formats.markers import MediaColumns
from data.formats.messages import read as read_messages_form
from data.formats.turns import text_message, with_system
from data.records import Record


def recognises(value: Mapping[str, Any]) -> bool:
    """The messages form is any `messages` record, unless it has notes of ours."""
    return present(value, "text_info") or present(value, "src") or present(value, "messages", NOTES)


@names_source
def read(record: Record) -> Conversation | Pair:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    notes = record.value.get(NOTES)
    bare = Record({key: content for key, content in record.value.items() if key != NOTES}, record.source)
    return apply_notes(_read(bare), notes)


def write(item: Conversation | Pair) -> dict[str, Any]:
    """The record that `read` turns into the same thing. Raises DataError for what ERNIEKit would show otherwise."""
    try:
        return _write(item)
    except DataError as error:
        name = (item.prompt if isinstance(item, Pair) else item).name
        raise DataError(f"{name} cannot be written for ERNIEKit: {error}") from error


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(record: Record) -> Conversation | Pair:
    value = record.value
    if present(value, "text_info"):
        return erniekit_media.read(record)
    if not present(value, "src"):
        return read_messages_form(record)
    asked, said = _texts(value["src"], "src"), _texts(value.get("tgt") or [], "tgt")
    if len(asked) - len(said) not in (0, 1):
        raise DataError(f"src has {len(asked)} texts and tgt {len(said)}; each needs its answer, but for the last.")
    labels = value.get("label")
    labels = [1] * len(said) if labels is None else labels if isinstance(labels, list) else [labels]
    if len(labels) != len(said) or any(label not in (0, 1) for label in labels):
        raise DataError(f"label is {shown(labels)}; it must be {len(said)} times 0 or 1, one for each text of tgt.")
    no_media = MediaColumns({})
    messages: list[Message] = []
    for index, text in enumerate(asked):
        messages.append(text_message("user", text, f"src[{index}]", no_media))
        if index < len(said):
            train = None if labels[index] else False
            messages.append(text_message("assistant", said[index], f"tgt[{index}]", no_media, train=train))
    used = ("src", "tgt", "label", "system")
    messages = list(with_system(value.get("system"), messages))
    if not present(value, "response"):
        return conversation(record, messages, used)
    if len(asked) == len(said):
        raise DataError("the record has a `response`, but tgt already answers every text of src.")
    prompt = conversation(record, messages, (*used, "response", "sort"))
    responses, sort = typed(value["response"], list, "response"), value.get("sort")
    ranked = isinstance(sort, list) and len(sort) == len(responses) and all(map(_is_number, sort))
    if not isinstance(sort, list) or not ranked or len(set(sort)) < 2:
        raise DataError(
            f"response has {len(responses)} answers and sort is {shown(sort)}; there must be two answers or more, with "
            "a number each, and the highest and the lowest must differ: they are the chosen and the rejected one."
        )
    best, worst = sort.index(max(sort)), sort.index(min(sort))
    scores = (None, None) if (sort[best], sort[worst]) == (1, 0) else (float(sort[best]), float(sort[worst]))
    return Pair(
        prompt=prompt,
        chosen=_answer(responses[best], f"response[{best}]"),
        rejected=_answer(responses[worst], f"response[{worst}]"),
        chosen_score=scores[0],
        rejected_score=scores[1],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _answer(texts: Any, key: str) -> tuple[Message, ...]:
    turns = _texts(texts, key)
    roles = [("assistant", "user")[number % 2] for number in range(len(turns))]
    return tuple(text_message(*turn, key, MediaColumns({})) for turn in zip(roles, turns, strict=True))


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else typed(value, list, key, "a string or a list of strings")
    return [typed(text, str, f"{key}[{index}]") for index, text in enumerate(texts)]


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(item: Conversation | Pair) -> dict[str, Any]:
    prompt = item.prompt if isinstance(item, Pair) else item
    source = prompt.source or Source("", 0)
    value: dict[str, Any] = {} if prompt.id == str(source) else {"id": prompt.id}
    value |= _write_pair(item) if isinstance(item, Pair) else _write_conversation(item)
    value |= write_shared(prompt)
    # Reading it back shows what the form has lost: a little goes into notes, more is refused.
    return add_notes(value, item, _read(Record(value, source)))


def _write_conversation(item: Conversation) -> dict[str, Any]:
    if any(part.kind is not PartKind.TEXT for message in item.messages for part in message.parts):
        return erniekit_media.write(item)
    messages, system = _without_system(item.messages)
    alternates = all(message.role == ("user", "assistant")[index % 2] for index, message in enumerate(messages))
    plain = not item.tools and all(_is_plain(message) and message.reasoning is None for message in messages)
    if messages and alternates and plain:
        value = system | {"src": [m.text for m in messages[::2]], "tgt": [m.text for m in messages[1::2]]}
        labels = [0 if message.train is False else 1 for message in messages[1::2]]
        return value if all(labels) else value | {"label": labels}
    return {"messages": [_message(message) for message in item.messages], "tools": [dict(tool) for tool in item.tools]}


def _write_pair(pair: Pair) -> dict[str, Any]:
    messages, system = _without_system(pair.prompt.messages)
    if pair.prompt.tools:
        raise DataError("a pair in its form has no tools.")
    for turns, first in ((messages, "user"), (pair.chosen, "assistant"), (pair.rejected, "assistant")):
        roles = (first, "assistant" if first == "user" else "user")
        for index, message in enumerate(turns):
            if message.role != roles[index % 2] or not _is_plain(message):
                raise DataError("a pair in its form is user and assistant in turn, and text only.")
    texts = [join_thought(message.reasoning, message.text) for message in messages]
    answers = [
        [join_thought(message.reasoning, message.text) for message in turns] for turns in (pair.chosen, pair.rejected)
    ]
    chosen, rejected = pair.scores
    sort = [1, 0] if chosen is None or rejected is None or chosen <= rejected else [chosen, rejected]
    return system | {"src": texts[::2], "tgt": texts[1::2], "response": answers, "sort": sort}


def _without_system(messages: Sequence[Message]) -> tuple[Sequence[Message], dict[str, Any]]:
    """The messages behind the system's, and the column that holds that one."""
    if messages[0].role == "system" and messages[0].text and _is_plain(messages[0]):
        return messages[1:], {"system": messages[0].text}
    return messages, {}


def _is_plain(message: Message) -> bool:
    """A text, or a thought and a text, and nothing else."""
    return all(part.kind is PartKind.TEXT for part in message.parts) and not (
        message.tool_calls or message.tool_call_id
    )


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": join_thought(message.reasoning, message.text)}
    if message.tool_calls:
        value["tool_calls"] = [
            ({} if call.id is None else {"id": call.id})
            | {
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    return value
