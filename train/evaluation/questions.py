"""Tasks and files to questions.

    config.tasks ──► AskedTask: name, questions, fingerprint
                        Question: what is shown, what is right, which reward compares them, how it is asked

What makes an evaluation wrong in silence is an error here, before the model is opened: a file without right answers, a
reward that is not known or cannot read them, pictures for a text model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.conversation import Conversation, Message, Part, PartKind
from data.dataset import SetSpec, open_set
from data.errors import DataError, RefusedError
from data.formats import messages
from data.media import MediaFolder
from data.tasks import TASKS, Task, question_of
from train.config import UserError, suggestion
from train.inference_config import AgentConfig, AskedConfig, EvaluationConfig, PairsConfig, SamplingConfig
from train.rewards.base import Attempt, Reward
from train.rewards.registry import check_options, needs_answer, reward_named

NAMED = 3
"""How many bad records an error names."""

Asking = EvaluationConfig | PairsConfig


class Asks(Protocol):
    """Settings of whoever asks: evaluate, pairs, reinforcement learning."""

    reward: str | None
    sampling: SamplingConfig
    agent: AgentConfig


@dataclass(frozen=True, eq=False)
class Question:
    task: str
    id: str
    conversation: Conversation
    """Whole, with the right answer where the record has one in words."""
    expected: str
    """What the reward compares with."""
    reward_name: str
    reward: Reward
    options: dict[str, Any]
    domain: str
    media: MediaFolder
    tools: tuple[str, ...]
    max_new_tokens: int
    thinking: bool

    @property
    def asked(self) -> Conversation:
        """What the model sees."""
        return question_of(self.conversation)

    @property
    def target(self) -> Conversation | None:
        """With the right answer as the assistant would write it, and nothing else to learn; None where it has none."""
        shown = len(self.asked.messages)
        whole = self.conversation
        if shown == len(whole.messages):
            if not self.expected:
                return None
            whole = replace(
                whole, messages=(*whole.messages, Message(role="assistant", parts=(Part.of_text(self.expected),)))
            )
        history = tuple(
            replace(message, train=False) if message.role == "assistant" else message
            for message in whole.messages[:shown]
        )
        return replace(whole, messages=(*history, *whole.messages[shown:]))

    def score(self, attempt: Attempt) -> float | None:
        return self.reward(attempt, self.expected, **self.options)


@dataclass(frozen=True, eq=False)
class AskedTask:
    name: str
    questions: Sequence[Question]
    fingerprint: str
    """Of what is asked and what is right; the same for the same questions."""
    write_index: Callable[[Path], None] | None = None
    """Writes into a folder what image_search looks things up in, where the task brings it."""
    rewards: tuple[str, ...] = field(default=())


def open_tasks(config: Asking) -> list[AskedTask]:
    """Raises UserError, DataError: see above; MediaError comes when a question is asked."""
    names = [name if name in TASKS else Path(name).stem for name in config.tasks]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"tasks has two of the name {name!r}: {', '.join(config.tasks)}. Rename a file.")
    for name in config.per_task:
        if name not in names:
            raise UserError(f"per_task.{name} is for none of the tasks{suggestion(name, names)}: {', '.join(names)}.")
    return [_open(name, given, config) for name, given in zip(names, config.tasks, strict=True)]


def _open(name: str, given: str, config: Asking) -> AskedTask:
    asked = config.per_task.get(name, AskedConfig())
    task = TASKS.get(given)
    if task is not None:
        _refuse_file_settings(name, asked)
        conversations = task.conversations(config.split.value, config.task_seed)
        media = MediaFolder(None)
    else:
        conversations, media = _read_file(name, given, asked)
    if not conversations:
        raise UserError(f"tasks={given} has no question in split={config.split.value}.")
    conversations = evenly(conversations, asked.limit or config.limit)
    questions = questions_of(name, conversations, media, config, asked, task)
    digest = hashlib.blake2b(digest_size=16)
    for one in questions:
        record = messages.write(replace(one.conversation, id=""))
        digest.update(json.dumps([one.id, record, one.expected, one.reward_name, one.options], sort_keys=True).encode())
    return AskedTask(
        name,
        questions,
        digest.hexdigest(),
        None if task is None or task.write_index is None else partial(_write_index, task.write_index, config.task_seed),
        tuple(dict.fromkeys(one.reward_name for one in questions)),
    )


def _write_index(write: Callable[[Path, int], None], seed: int, folder: Path) -> None:
    write(folder, seed)


def _refuse_file_settings(name: str, asked: AskedConfig) -> None:
    for key in ("format", "columns", "split", "subset", "media_root", "fetch"):
        if getattr(asked, key):
            raise UserError(f"per_task.{name}.{key} is for files; {name} is made in memory. Leave it out.")


def _read_file(name: str, path: str, asked: AskedConfig) -> tuple[list[Conversation], MediaFolder]:
    if not Path(path).exists() and "/" not in path and "." not in path:
        near = suggestion(path, list(TASKS)) or "."
        raise UserError(f"there is no task {path!r}{near} Known: {', '.join(TASKS)}; or name a file of questions.")
    keys = {key: f"per_task.{name}.{key}" for key in ("format", "columns", "split", "subset", "media_root")}
    spec = SetSpec(
        path=path,
        keys={"path": "tasks", **keys},
        format=asked.format,
        columns=asked.columns or None,
        split=asked.split,
        subset=asked.subset,
        media_root=asked.media_root,
        fetch=asked.fetch,
    )
    dataset = open_set(name, spec).train
    assert hasattr(dataset, "__len__"), "not streaming"
    conversations, bad = [], []
    for number in range(len(dataset)):  # type: ignore[arg-type]
        try:
            conversations.append(dataset[number])
        except RefusedError as error:
            bad.append(str(error))
    if bad:
        raise DataError(
            f"tasks={path}: {len(bad)} records cannot be read, and an evaluation leaves none out:\n  "
            + "\n  ".join(bad[:NAMED])
        )
    return conversations, dataset.media


def evenly(items: Sequence[Any], limit: int | None) -> list[Any]:
    """`limit` of the items, spread over all of them, in order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]


def questions_of(
    name: str,
    conversations: Sequence[Conversation],
    media: MediaFolder,
    config: Asks,
    asked: AskedConfig,
    task: Task | None,
) -> list[Question]:
    """Raises DataError, UserError: a conversation that cannot be scored, or a reward that cannot score it."""
    questions: list[Question] = []
    problems: list[str] = []
    per_task = isinstance(config, Asking)
    where = f"tasks={name}" if per_task else name
    thinking = asked.thinking
    if thinking is None:
        thinking = config.sampling.thinking or (task is not None and task.thinking)
    tools = asked.tools
    if tools is None:
        tools = list(dict.fromkeys((*(() if task is None else task.tools), *config.agent.tools)))
    # A task knows how long its answers are, but not its model's thoughts.
    own_length = task.max_new_tokens if task is not None and (task.thinking or not thinking) else None
    length = asked.max_new_tokens or own_length or config.sampling.max_new_tokens
    for conversation in conversations:
        reward_name = asked.reward or conversation.reward or config.reward
        if reward_name is None:
            problems.append(f"{conversation.name} names no reward")
            continue
        own = conversation.extra.get("reward_options") or {}
        if not isinstance(own, Mapping):
            problems.append(
                f"{conversation.name}: reward_options is {str(own)[:60]!r}; it must be like {{tolerance: 0.05}}"
            )
            continue
        options = {**own, **asked.reward_options}
        try:
            reward = reward_named(reward_name)
            check_options(reward_name, options)
        except UserError as error:
            raise UserError(f"{where}: {conversation.name}: {error}") from error
        expected = _right_answer(conversation)
        if expected is None and needs_answer(reward_name):
            problems.append(f"{conversation.name} has no right answer")
            continue
        question = Question(
            task=name,
            id=conversation.id,
            conversation=conversation,
            expected=expected or "",
            reward_name=reward_name,
            reward=reward,
            options=options,
            domain=str(conversation.extra.get("domain", "")),
            media=media,
            tools=tuple(tools),
            max_new_tokens=length,
            thinking=thinking,
        )
        if problem := _unreadable(question):
            problems.append(f"{conversation.name}: {problem}")
        questions.append(question)
    if problems:
        raise DataError(
            f"{where}: {len(problems)} of {len(conversations)} questions cannot be scored:\n  "
            + "\n  ".join(problems[:NAMED])
            + "\nGive each record `answer` (or the assistant's right answer as its last message) and `reward`; or name "
            "one reward for all that have none: reward=exact"
            + (f", per_task.{name}.reward=exact." if per_task else ".")
        )
    return questions


def _right_answer(conversation: Conversation) -> str | None:
    if conversation.answer is not None:
        return conversation.answer
    return None if conversation.is_prompt else conversation.messages[-1].text


def _unreadable(question: Question) -> str | None:
    """Why the reward cannot tell anything about this question, whatever is answered."""
    if not needs_answer(question.reward_name):
        return None
    try:
        value = question.score(Attempt(answer=question.expected, text=question.expected))
    except Exception as error:  # an option of the wrong type; the reward itself does not raise
        options = ", ".join(f"{key}={value!r}" for key, value in question.options.items())
        return f"reward {question.reward_name} does not take {options} ({type(error).__name__}: {error})"
    if value is None:
        return f"reward {question.reward_name} cannot read the right answer {question.expected[:60]!r}"
    return None


def check_fits(tasks: Sequence[AskedTask], *, text_model: bool) -> None:
    """Raises UserError: pictures, videos, or tools that show pictures, for a model that cannot see."""
    if not text_model:
        return
    for task in tasks:
        for one in task.questions:
            shows = [
                part.kind.value for message in one.asked.messages for part in message.parts if part.media is not None
            ]
            sees = [tool for tool in one.tools if tool in SEEING_TOOLS]
            if shows or sees:
                what = f"shows an {shows[0]}" if shows else f"has the tool {sees[0]}, which returns images"
                raise UserError(
                    f"the question {one.id!r} of {task.name} {what}, but the checkpoint is a text model. Use a "
                    f"vision-language checkpoint, or leave {task.name} out."
                )


SEEING_TOOLS = ("image_zoom_in_tool", "image_search")


def first_image(question: Question) -> Any | None:
    """The first picture of what is asked, opened."""
    for message in question.asked.messages:
        for part in message.parts:
            if part.kind is PartKind.IMAGE and part.media is not None:
                return question.media.open_image(part.media)
    return None
