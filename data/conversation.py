"""Conversations: the one form that every dataset, task and rollout is turned into.

    Conversation
      Message user        Part image  "images/0001.png"
                          Part text   "Which digit?"
      Message assistant   Part text   "7"                 trained: an assistant message, and nobody said otherwise

    Conversation          a sequence of messages; one that ends before the assistant's turn is a prompt (RL)
    Pair                  a prompt and two answers, the first of them preferred (DPO)
    Judged                a conversation whose answer is labelled wanted or not, and another's answer (KTO)

Everything is frozen, so that a conversation may be shared by threads and caches. Media stay *references* (a path, or
the bytes of an encoded file) until `data/media.py` opens them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from data.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

Media = str | bytes
"""A path or address as the record wrote it, or the content of an encoded file (PNG, JPEG, ...)."""


class PartKind(Enum):
    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, kw_only=True)
class VideoSampling:
    """Which frames of one video to look at; what is None is left to the processor's settings (ernie_model/video.py)."""

    fps: float | None = None
    num_frames: int | None = None
    start_s: float | None = None
    """Seconds into the video; None is its beginning."""
    end_s: float | None = None
    """Seconds into the video; None is its end."""

    def __post_init__(self):
        if self.fps is not None and self.num_frames is not None:
            raise DataError(f"fps ({self.fps}) and num_frames ({self.num_frames}) are both given. Keep one.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise DataError(f"fps is {self.fps}; it must be a positive number.")
        if self.num_frames is not None and self.num_frames < 1:
            raise DataError(f"num_frames is {self.num_frames}; it must be at least 1.")
        start, end = self.start_s or 0.0, float("inf") if self.end_s is None else self.end_s
        if not 0 <= start < end:
            raise DataError(f"start_s is {self.start_s} and end_s {self.end_s}; 0 <= start_s < end_s must hold.")


@dataclass(frozen=True)
class Part:
    """A stretch of text, an image or a video; use the three constructors below."""

    kind: PartKind
    text: str = ""
    media: Media | None = None
    sampling: VideoSampling | None = None
    """Videos only."""

    @staticmethod
    def of_text(text: str) -> "Part":
        return Part(PartKind.TEXT, text=text)

    @staticmethod
    def of_image(media: Media) -> "Part":
        return Part(PartKind.IMAGE, media=media)

    @staticmethod
    def of_video(media: Media, sampling: VideoSampling | None = None) -> "Part":
        return Part(PartKind.VIDEO, media=media, sampling=sampling)


@dataclass(frozen=True)
class ToolCall:
    """A function the assistant calls."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    role: str
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    """What the assistant thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """In a tool's message: the call it answers."""
    name: str | None = None
    """Which person or tool it is from. Converting keeps it; the chat format has no place for it."""
    train: bool | None = None
    """Learn to write this message? None means: yes if the assistant wrote it."""
    weight: float = 1.0
    """Factor on the loss of each of this message's tokens."""

    def __post_init__(self):
        if self.role not in ROLES:
            raise DataError(f"role is {self.role!r}; it must be one of {', '.join(ROLES)}.")
        if self.role != "assistant":
            for name, value in (("reasoning_content", self.reasoning), ("tool_calls", self.tool_calls)):
                if value:
                    raise DataError(f"a {self.role} message has {name}; only assistant messages may.")
            if self.train:
                raise DataError(f"a {self.role} message has train=true; only what the assistant writes can be trained.")
        if not (self.weight >= 0 and self.weight < float("inf")):
            raise DataError(f"weight is {self.weight}; it must be a finite number, 0 or larger.")

    @property
    def trained_weight(self) -> float:
        """`weight`, or 0 when this message is not trained."""
        trained = self.role == "assistant" if self.train is None else self.train
        return self.weight if trained else 0.0

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Source:
    """Where a record was read: a file, and the line or row in it, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions of the functions the assistant may call, in OpenAI's form."""
    answer: str | None = None
    """The right answer, where it can be checked by a program (evaluation, reinforcement learning)."""
    reward: str | None = None
    """Name of the function that compares an answer with `answer`."""
    label: bool | None = None
    """Is the last answer wanted? Unpaired preferences (KTO); None elsewhere."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the record carried, by its own keys. Nobody reads it; converting keeps it."""
    source: Source | None = None

    def __post_init__(self):
        if not self.messages:
            raise DataError("messages is empty; a conversation needs at least one message.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of all messages, in order."""
        return _parts(self.messages)

    @property
    def is_prompt(self) -> bool:
        """The assistant's turn is still to be written."""
        return self.messages[-1].role != "assistant"

    @property
    def name(self) -> str:
        """What an error message calls this conversation."""
        if self.source is None or self.id == str(self.source):
            return f"record {self.id!r}"
        return f"record {self.id!r} ({self.source})"

    def prompt(self) -> "Conversation":
        """The same conversation without its last message, which must be the assistant's: the question alone."""
        if self.messages[-1].role != "assistant":
            raise DataError(f"{self.name}: the last message is the {self.messages[-1].role}'s, not the assistant's.")
        return dataclasses.replace(self, messages=self.messages[:-1])

    def to_chat(self, open_media: Callable[[PartKind, Media], Any] | None = None) -> list[dict[str, Any]]:
        """The messages as `Processor.encode` takes them.

        `open_media(kind, media)` turns every reference into what the processor wants (`MediaFolder.open`). Without it,
        references stay as they are, which is enough for chat templates and for printing.
        """
        return [_chat_message(message, open_media or (lambda kind, media: media)) for message in self.messages]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    prompt: Conversation
    """Ends before the assistant's turn; its id, tools and source are the pair's."""
    chosen: tuple[Message, ...]
    """What follows the prompt: an assistant message, or several turns with tool results between them."""
    rejected: tuple[Message, ...]
    chosen_score: float | None = None
    """How good the answer was found to be, by whoever compared them."""
    rejected_score: float | None = None

    def __post_init__(self):
        if not self.prompt.is_prompt:
            raise DataError("the prompt of a pair ends with an assistant message; the answers belong in the pair.")
        for name, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not answer or {answer[0].role, answer[-1].role} != {"assistant"}:
                raise DataError(f"{name} does not begin and end with an assistant message.")

    @property
    def id(self) -> str:
        return self.prompt.id

    @property
    def name(self) -> str:
        """What an error message calls this pair."""
        return self.prompt.name

    @property
    def source(self) -> Source | None:
        return self.prompt.source

    @property
    def parts(self) -> tuple[Part, ...]:
        """The prompt's, the chosen answer's, the rejected one's."""
        return _parts(self.prompt.messages + self.chosen + self.rejected)

    @property
    def scores(self) -> tuple[float | None, float | None]:
        return self.chosen_score, self.rejected_score

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen answer, and with the rejected one."""
        messages = self.prompt.messages
        return (
            dataclasses.replace(self.prompt, messages=messages + self.chosen),
            dataclasses.replace(self.prompt, messages=messages + self.rejected),
        )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer that is labelled wanted or not: all that follows the last user message, calls and results too."""

    conversation: Conversation
    """Ends with an assistant message; its label is a bool."""
    other: tuple[Message, ...] = ()
    """Another record's answer, to show how likely the model finds one that does not belong to the prompt."""

    @property
    def prompt(self) -> Conversation:
        """What stands before the answer."""
        messages = self.conversation.messages[: -len(self.answer)]
        return dataclasses.replace(self.conversation, messages=messages)

    @property
    def answer(self) -> tuple[Message, ...]:
        return last_answer(self.conversation)

    @property
    def id(self) -> str:
        return self.conversation.id

    @property
    def name(self) -> str:
        return self.conversation.name

    @property
    def source(self) -> Source | None:
        return self.conversation.source

    @property
    def parts(self) -> tuple[Part, ...]:
        return _parts(self.conversation.messages + self.other)


Item = Conversation | Pair | Judged
"""What an example is made of."""


class Learns(Enum):
    """What is learned from a record, and so what it must hold."""

    CONVERSATIONS = "conversations"
    """To write the assistant's messages."""
    PAIRS = "pairs"
    """To prefer the chosen answer to the rejected one."""
    LABELLED = "labelled"
    """To prefer answers that are labelled as wanted to those that are not."""


def _parts(messages: Sequence[Message]) -> tuple[Part, ...]:
    return tuple(part for message in messages for part in message.parts)


def last_answer(conversation: Conversation) -> tuple[Message, ...]:
    """What follows the last message that is not the assistant's or a tool's."""
    messages = conversation.messages
    asked = [index for index, message in enumerate(messages) if message.role not in ("assistant", "tool")]
    start = asked[-1] + 1 if asked else 0
    return messages[start:]


def thinks(answer: Sequence[Message]) -> bool:
    """Does it begin with a thought? Then its generation prompt is another (ernie_model/chat.py)."""
    return bool((answer[0].reasoning or "").strip("\n"))


def item_to_learn(item: Conversation | Pair, learns: Learns) -> Conversation | Pair:
    """The record, if it is of the kind that is learned from. Raises DataError that names what it is, and the way out.

    A labelled conversation stays one; data/prepare.py gives it another record's answer.
    """
    if learns is Learns.PAIRS:
        return pair_to_learn(item)
    return labelled_to_learn(item) if learns is Learns.LABELLED else conversation_to_learn(item)


def pair_to_learn(item: Conversation | Pair) -> Pair:
    """Raises DataError for a single answer, and for a pair that lacks one."""
    if isinstance(item, Conversation):
        what = "ends with the question" if item.is_prompt else "has one answer"
        way_out = "Give the record a `chosen` and a `rejected` answer"
        if not item.is_prompt:
            way_out += ", or fine-tune on it (`ernie sft`)"
        if item.label is not None:
            way_out = (
                "objective.preference_loss_type=kto learns from labels; or give it a `chosen` and a `rejected` answer"
            )
        raise DataError(f"{item.name} {what}, and a preference is learned from two. {way_out}.")
    for side, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
        if is_empty(answer):
            raise DataError(f"{item.name}: {side} is empty. Write the answer, or remove the record.")
    return item


def labelled_to_learn(item: Conversation | Pair) -> Conversation:
    """Raises DataError for a pair, and for a conversation without an answer or a label."""
    if isinstance(item, Pair):
        raise DataError(
            f"{item.name} is a pair, a chosen and a rejected answer to one prompt, and this loss learns from single "
            "answers with a `label`. Choose a loss of pairs, e.g. objective.preference_loss_type=sigmoid."
        )
    if item.is_prompt:
        raise DataError(f"{item.name} ends before the assistant's answer, so there is nothing that its label judges.")
    if item.label is None:
        raise DataError(f"{item.name} has no `label`. Add one: true if its last answer is wanted, false if not.")
    answer = last_answer(item)
    if len(answer) == len(item.messages):
        raise DataError(f"{item.name} has no user message before its answer. Add the question.")
    if answer[0].role != "assistant":
        raise DataError(f"{item.name}: what follows the last user message begins with a tool's, not the assistant's.")
    if is_empty(answer):
        raise DataError(f"{item.name}: its last answer is empty. Write the answer, or remove the record.")
    return item


def is_empty(answer: Sequence[Message]) -> bool:
    """Has the assistant written nothing at all?"""
    return not any(
        message.text or message.tool_calls or message.reasoning for message in answer if message.role == "assistant"
    )


def conversation_to_learn(item: Conversation | Pair) -> Conversation:
    """What supervised fine-tuning can learn from: one conversation, whose answers are wanted.

    Raises DataError for a pair, and for an answer that is labelled as not wanted.
    """
    way_out = (
        "`ernie convert input=FILE output=FILE to=messages keep=wanted` makes conversations of the wanted answers."
    )
    if isinstance(item, Pair):
        raise DataError(
            f"{item.prompt.name} is a pair, a chosen and a rejected answer to one prompt, and fine-tuning learns from "
            f"one answer. {way_out}"
        )
    if item.label is False:
        raise DataError(
            f"{item.name} is labelled false: its answer is not wanted, and fine-tuning would learn it. {way_out}"
        )
    return item


def _chat_message(message: Message, open_media: Callable[[PartKind, Media], Any]) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": message.role, "content": _chat_content(message.parts, open_media)}
    if message.reasoning is not None:
        chat["reasoning_content"] = message.reasoning
    if message.tool_calls:
        chat["tool_calls"] = [chat_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
    return chat


def _chat_content(parts: Sequence[Part], open_media: Callable[[PartKind, Media], Any]) -> str | list[dict[str, Any]]:
    if all(part.kind is PartKind.TEXT for part in parts):
        return "".join(part.text for part in parts)
    content = []
    for part in parts:
        value = part.text if part.media is None else open_media(part.kind, part.media)
        sampling = {} if part.sampling is None else {"sampling": dataclasses.asdict(part.sampling)}
        content.append({"type": part.kind.value, part.kind.value: value, **sampling})
    return content


def chat_tool_call(call: ToolCall) -> dict[str, Any]:
    """OpenAI's form, with the arguments as an object (chat templates print them, so they must not be quoted twice)."""
    chat: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
    return chat if call.id is None else {"id": call.id, **chat}
