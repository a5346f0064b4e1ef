"""Questions without an answer to learn: what reinforcement learning starts from.

    {"prompt": "2 + 2?", "answer": "4", "reward": "exact"}                        answer and reward: optional
    {"prompt": [{"role": "user", "content": ...}], "solution": "$4$"}             or lists of messages (turns.py)

The right answer may be called `answer`, `solution` or `ground_truth`; only a program sees it.
"""

from collections.abc import Mapping
from typing import Any

from data.conversation import Conversation
from data.errors import DataError
from data.formats.fields import MEDIA_COLUMNS, conversation, names_source, present
from data.formats.markers import MediaColumns
from data.formats.turns import read_text_or_messages, with_system
from data.records import Record

ANSWERS = ("answer", "solution", "ground_truth")
NOT_PROMPTS = ("messages", "completion", "response", "chosen", "rejected", "instruction", "question", "src")


def recognises(value: Mapping[str, Any]) -> bool:
    return present(value, "prompt") and not any(present(value, key) for key in NOT_PROMPTS)


@names_source
def read(record: Record) -> Conversation:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    value = record.value
    if not present(value, "prompt"):
        raise DataError(f"the record has no `prompt`, only {', '.join(map(repr, value)) or 'nothing'}.")
    answers = [key for key in ANSWERS if present(value, key)]
    if len(answers) > 1:
        raise DataError(f"the record has both `{answers[0]}` and `{answers[1]}`. Keep the right answer under one name.")
    media = MediaColumns(value)
    messages = with_system(value.get("system"), read_text_or_messages(value["prompt"], "prompt", "user", media))
    media.close()
    answer = value[answers[0]] if answers else None
    read = conversation(record, messages, ("prompt", "system", *answers, *MEDIA_COLUMNS), answer=answer)
    if not read.is_prompt:
        raise DataError("the prompt ends with an assistant message, so there is nothing left to write.")
    return read
