"""What a task is: questions whose answers a program can check, made by code from a seed.

    task.conversations("train", seed)      with the answers, to learn from
    task.conversations("heldout", seed)    never shown in training; evaluation asks them

Every conversation ends with the assistant's right answer; `answer` holds what a program compares with, and `reward` the
name of the function that does (train/rewards). Options of that function lie in `extra["reward_options"]`, and
`extra["domain"]` names the part of the task that results are listed by.

A drawn task (`drawn`) asks each split's random numbers for one item after another. An item belongs to one split by the
hash of its key, which says all that is asked and answered, so that neither split can hold an item of the other:

    random numbers of "train" ──► item ──► side(key) is train? ──► keep, else draw again
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data.conversation import Conversation, Message, Part

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

HELDOUT_SHARE = 0.2
"""Of the keys of drawn tasks."""


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    """One line, for people."""
    conversations: Callable[[Split, int], list[Conversation]]
    """(split, seed) -> the task's conversations, always the same for the same seed."""
    tools: tuple[str, ...] = ()
    """Built-in tools that the questions expect (ernie_model/inference/tools.py)."""
    max_new_tokens: int = 64
    """Enough for every right answer, and for every turn of one."""
    thinking: bool = False
    """The answers begin with a thought."""
    write_index: Callable[[Path, int], None] | None = None
    """(folder, seed): writes the pictures and captions that the task's questions are looked up in (image_search)."""

    def write_jsonl(self, folder: str | Path, seed: int = 0) -> dict[str, Path]:
        """The conversations as files: train.jsonl, heldout.jsonl and media/; the paths of the two by split."""
        from data.tasks.files import write_jsonl  # needs the readers of media, which the registry does without

        return write_jsonl(self, folder, seed)


def question_of(conversation: Conversation) -> Conversation:
    """The conversation up to where the assistant's work begins: before its first turn if there are tool results,
    else before its last turn (earlier ones are given as history)."""
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not turns:
        return conversation
    uses_tools = any(message.role == "tool" for message in conversation.messages)
    stop = turns[0] if uses_tools else turns[-1]
    return replace(conversation, messages=conversation.messages[:stop])


class Item(NamedTuple):
    """One question, decided but not rendered."""

    key: str
    """All that is asked and answered: items with the same key are the same question."""
    render: Callable[[str], Conversation]
    """Makes the conversation of that id."""


def drawn(
    name: str, counts: Mapping[Split, int], draw: Callable[[np.random.Generator, Split, int], Item]
) -> Callable[[Split, int], list[Conversation]]:
    """`Task.conversations` of a task whose items are drawn one by one.

    Args:
        draw: (random numbers, split, seed) -> an item. The split is for what is divided already, as scans are.
    """

    def conversations(split: Split, seed: int = 0) -> list[Conversation]:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), SPLITS.index(split)])
        made: list[Conversation] = []
        seen: set[str] = set()
        while len(made) < counts[split]:
            item = draw(rng, split, seed)
            if item.key in seen or side(f"{name} {item.key}", seed) != split:
                continue
            seen.add(item.key)
            made.append(item.render(f"{name}-{split}-{len(made):04d}"))
        return made

    return conversations


def side(key: str, seed: int) -> Split:
    """Which split an item belongs to; another seed divides them otherwise."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def asked(
    id: str,
    question: Sequence[Part],
    answer: str,
    *,
    reward: str,
    domain: str,
    written: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Conversation:
    """A question and its answer. `written` is what the assistant writes, where that is not `answer` itself."""
    return Conversation(
        id=id,
        messages=(
            Message(role="user", parts=tuple(question)),
            Message(role="assistant", parts=(Part.of_text(answer if written is None else written),)),
        ),
        answer=answer,
        reward=reward,
        extra={"domain": domain} | ({"reward_options": dict(options)} if options else {}),
    )


def choice(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]
