"""Records that compare two answers, or judge one.

    {"prompt": "Is a whale a fish?", "chosen": "No.", "rejected": "Yes."}             TRL: texts, or lists of messages
    {"chosen": [user, assistant], "rejected": [user, assistant]}                      the prompt is what both begin with
    {"prompt": "...", "chosen": [user, assistant], "rejected": [...], "score_...": 1} UltraFeedback: the same, once more
    {"messages": [user], "chosen": {"role": ...}, "rejected": {"role": ...}}          LLaMA-Factory, with role names
    {"chosen_messages": [...], "rejected_messages": [...]}                            LLaMA-Factory 1
    {"prompt": "...", "completion": "...", "label": true}                             KTO: one answer, wanted or not

A pair may carry scores of its answers: `score_chosen` and `score_rejected` (fields.py has other names).

The first five are pairs, the last is a conversation with a label. Messages are those of turns.py.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from data.conversation import Conversation, Message, Pair
from data.errors import DataError
from data.formats.fields import MEDIA_COLUMNS, conversation, list_of, names_source, pair, present
from data.formats.markers import MediaColumns
from data.formats.messages import read as read_plain
from data.formats.turns import read_text_or_messages, with_system
from data.records import Record

ANSWERS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))


def recognises(value: Mapping[str, Any]) -> bool:
    """Not what alpaca.py (`instruction`, `question`) and sharegpt.py (`from`) know better."""
    if present(value, "prompt", "completion", "label"):
        return True
    if present(value, "instruction") or present(value, "question"):
        return False
    if any(present(value, key) and list_of(value[key], "from") for key in ("conversations", "messages")):
        return False
    return any(present(value, *keys) for keys in ANSWERS)


@names_source
def read(record: Record) -> Conversation | Pair:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    value = record.value
    keys = next((keys for keys in ANSWERS if present(value, *keys)), None)
    if keys is None:
        for one, other in (*ANSWERS, *(keys[::-1] for keys in ANSWERS)):
            if present(value, one):
                raise DataError(f"the record has `{one}` and no `{other}`; a pair needs both answers.")
        return read_plain(record)
    asked = next((key for key in ("prompt", "messages") if present(value, key)), None)
    if _is_whole(value[keys[0]]):
        prompt, chosen, rejected = _divide(value, keys, asked)
    elif asked is None:
        raise DataError(f"{keys[0]} and {keys[1]} are answers alone; the record has no prompt to them.")
    else:
        media = MediaColumns(value)
        question = media.marked(value[asked]) if isinstance(value[asked], str) else value[asked]
        prompt = read_text_or_messages(question, asked, "user", media)
        chosen, rejected = (read_text_or_messages(value[key], key, "assistant", media) for key in keys)
        media.close()
    used = (*keys, "system", *MEDIA_COLUMNS, *([] if asked is None else [asked]))
    prompt = with_system(value.get("system"), prompt)
    return pair(record, conversation(record, prompt, used), chosen, rejected)


def _is_whole(value: Any) -> bool:
    """Is it a conversation from its beginning, rather than an answer?"""
    return list_of(value, "role") and bool(value) and value[0]["role"] != "assistant"


def _divide(
    value: Mapping[str, Any], keys: tuple[str, str], asked: str | None
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """The prompt that two whole conversations share, and what follows it in each."""

    def whole(key: str) -> tuple[Message, ...]:
        media = MediaColumns(value)  # each conversation shows all of them
        messages = read_text_or_messages(value[key], key, "assistant", media)
        try:
            media.close()
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        return messages

    chosen, rejected = whole(keys[0]), whole(keys[1])
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and (chosen[shared - 1].role == "assistant" or chosen[shared].role != "assistant"):
        shared -= 1
    prompt = chosen[: max(shared, 0)]
    if not prompt:
        raise DataError(f"{keys[0]} and {keys[1]} are whole conversations, but do not begin with the same prompt.")
    if asked is not None:  # the same once more, as UltraFeedback has it: its last turn, or all of it
        told = read_text_or_messages(value[asked], asked, "user", MediaColumns(value))
        if told not in (prompt, prompt[-1:], prompt[:1], chosen):
            raise DataError(
                f"`{asked}` is not the prompt that {keys[0]} and {keys[1]} begin with. Remove it, or mend the record."
            )
    return prompt, chosen[shared:], rejected[shared:]
