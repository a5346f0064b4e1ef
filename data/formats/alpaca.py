"""Alpaca: one instruction, one answer.

    {"instruction": "Translate to French", "input": "a red kite", "output": "un cerf-volant rouge",
     "system": "Be brief.", "history": [["Hi", "Hello."]]}                     input, system, history: optional
    {"question": "Is a whale a fish?", "chosen": "No.", "rejected": "Yes."}    a pair; or `instruction`, with an `input`

The question is the instruction and, on a new line, the input. LLaMA-Factory's names of the same columns (prompt, query,
response) are understood, and its `images` with markers, a single `image` without one (markers.py), and a `label`.
"""

from collections.abc import Mapping
from typing import Any

from data.conversation import Conversation, Message, Pair
from data.errors import DataError
from data.formats.fields import MEDIA_COLUMNS, conversation, names_source, openai_tools, pair, present, shown, typed
from data.formats.markers import MediaColumns
from data.formats.turns import text_message, with_system
from data.records import Record

QUESTIONS = ("instruction", "question", "prompt")
OUTPUTS = ("output", "response")


def recognises(value: Mapping[str, Any]) -> bool:
    if present(value, "prompt") and not present(value, "instruction") and not present(value, "question"):
        return present(value, "prompt", "response")
    asks = any(isinstance(value.get(key), str) for key in ("instruction", "question"))
    return asks and (any(present(value, key) for key in OUTPUTS) or present(value, "chosen", "rejected"))


@names_source
def read(record: Record) -> Conversation | Pair:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    value = record.value
    asked = _only(value, QUESTIONS)
    added = next((key for key in ("input", "query") if present(value, key)), None)
    media = MediaColumns(value)
    messages: list[Message] = []
    for index, turn in enumerate(typed(value.get("history") or [], list, "history")):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"history[{index}] is {shown(turn)}; it must be a question and its answer.")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            key = f"history[{index}]"
            messages.append(text_message(role, typed(text, str, key), key, media))
    question = [typed(value[asked], str, asked)]
    if added is not None and value[added] != "":
        question.append(typed(value[added], str, added))
    text = "\n".join(question)
    messages.append(text_message("user", text if messages else media.marked(text), asked, media))
    compares = present(value, "chosen", "rejected")
    answers = ("chosen", "rejected") if compares else (_only(value, OUTPUTS),)
    said = [text_message("assistant", typed(value[key], str, key), key, media) for key in answers]
    media.close()
    messages = list(with_system(value.get("system"), messages))
    used = (asked, *([] if added is None else [added]), "history", "system", *answers, *MEDIA_COLUMNS)
    tools = openai_tools(value.get("tools"))
    if not compares:
        return conversation(record, [*messages, said[0]], used, tools=tools)
    prompt = conversation(record, messages, used, tools=tools)
    return pair(record, prompt, (said[0],), (said[1],))


def _only(value: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = [key for key in keys if present(value, key)]
    if not found:
        raise DataError(f"the record has none of {', '.join(keys)}, only {', '.join(map(repr, value)) or 'nothing'}.")
    return found[0]
