"""Records with `messages`, as OpenAI's chat and fine-tuning interfaces write them. This suite's own form.

    {"id": "sign-17",                                                     optional; else "file:line"
     "tools": [{"type": "function", "function": {...}}],                  optional
     "messages": [
       {"role": "system", "content": "Answer briefly."},
       {"role": "user", "content": [
         {"type": "image", "image": "photos/sign.jpg"},                   relative to the dataset's folder
         {"type": "image_url", "image_url": {"url": "photos/b.jpg"}},     the same, in OpenAI's words; or a data: URL
         {"type": "video", "video": "clips/a.mp4", "fps": 1, "start_s": 2.5, "end_s": 9},     or num_frames
         {"type": "text", "text": "What does it say?"}]},
       {"role": "assistant", "content": "Stop.", "reasoning_content": "A red octagon.",
        "tool_calls": [...], "train": true, "weight": 1.0}],              the last four optional
     "answer": "Stop", "reward": "exact"}                                 optional: checkable by a program

    {"prompt": [...], "chosen": [...], "rejected": [...],                 a pair: lists of such messages
     "score_chosen": 8.5, "score_rejected": 3.0}                          optional
    {"prompt": "2+2?", "completion": "4"}                                 TRL's form; or lists of such messages

Understood too: media in columns with `<image>` markers (markers.py), LLaMA-Factory's parts (`{"type": "text", "value":
...}`, reasoning and tool_call) and `loss_weight`, an assistant's text that begins with `<think>...</think>`. What is
not understood is refused rather than skipped: a dropped key means a model trained on something else than the file says.
"""

from collections.abc import Mapping
from typing import Any

from data.conversation import Conversation, Message, Pair
from data.errors import DataError
from data.formats.fields import (
    MEDIA_COLUMNS,
    SCORES,
    conversation,
    list_of,
    names_source,
    pair,
    present,
    typed,
    write_shared,
)
from data.formats.markers import MediaColumns
from data.formats.turns import read_messages, read_text_or_messages, with_system, write_message
from data.records import Record

SHAPES = (("messages",), ("prompt", "chosen", "rejected"), ("prompt", "completion"))


def recognises(value: Mapping[str, Any]) -> bool:
    """Pairs are left to preference.py and labelled completions too: it reads this form of them, and others."""
    if present(value, "chosen", "rejected") or present(value, "chosen_messages"):
        return False
    if present(value, "messages"):
        if "ernie" in value:  # notes that only erniekit.py reads
            return False
        return list_of(value["messages"], "role") or not isinstance(value["messages"], list)
    return present(value, "prompt", "completion") and not present(value, "label")


@names_source
def read(record: Record) -> Conversation | Pair:
    """What a record says. Raises DataError, naming file, line and key, for what it cannot honour."""
    value = record.value
    shape = next((shape for shape in SHAPES if present(value, *shape)), None)
    if shape is None:
        raise DataError(f"the record has no `messages`, only {', '.join(map(repr, value)) or 'nothing'}.")
    used = (*shape, "system", *MEDIA_COLUMNS)
    media = MediaColumns(value)
    if shape == ("messages",):
        messages = read_messages(typed(value["messages"], list, "messages"), "messages", media)
        media.close()
        return conversation(record, with_system(value.get("system"), messages), used)
    prompt = with_system(value.get("system"), read_text_or_messages(value["prompt"], "prompt", "user", media))
    answers = [read_text_or_messages(value[key], key, "assistant", media) for key in shape[1:]]
    media.close()
    if len(answers) == 1:
        return conversation(record, (*prompt, *answers[0]), used)
    return pair(record, conversation(record, prompt, used), answers[0], answers[1])


def write(item: Conversation | Pair) -> dict[str, Any]:
    """The record that `read` turns into the same thing. Media held as bytes become data: URLs."""
    prompt = item.prompt if isinstance(item, Pair) else item
    value: dict[str, Any] = {"id": prompt.id}
    if prompt.tools:
        value["tools"] = [dict(tool) for tool in prompt.tools]
    if isinstance(item, Pair):
        value["prompt"] = _write(prompt.messages)
        value["chosen"], value["rejected"] = _write(item.chosen), _write(item.rejected)
        value |= {key: score for key, score in zip(SCORES[0], item.scores, strict=True) if score is not None}
    else:
        value["messages"] = _write(item.messages)
    value |= write_shared(prompt)
    if prompt.label is not None:
        value["label"] = prompt.label
    return value


def _write(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [write_message(message) for message in messages]
