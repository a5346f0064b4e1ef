"""What a task is: questions whose answers a program can check, made by code from a seed.

    task.conversations("train", seed)      with the answers, to learn from
    task.conversations("heldout", seed)    never shown in training; evaluation asks them

Every conversation ends with the assistant's right answer; `answer` holds what a program compares with, and `reward` the
name of the function that does (train/rewards). Options of that function lie in `extra["reward_options"]`, and
`extra["domain"]` names the part of the task that results are listed by.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from data.conversation import Conversation

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


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
    """Enough for every right answer."""


def question_of(conversation: Conversation) -> Conversation:
    """The conversation up to where the assistant's work begins: before its first turn if there are tool results,
    else before its last turn (earlier ones are given as history)."""
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not turns:
        return conversation
    uses_tools = any(message.role == "tool" for message in conversation.messages)
    stop = turns[0] if uses_tools else turns[-1]
    return replace(conversation, messages=conversation.messages[:stop])
