"""Messages -> pieces: the chat format of the family, as text, with the author of every stretch.

    <bos>You are helpful.⏎User: What is this?Picture 1:[image]⏎Assistant: <think>⏎⏎</think>⏎⏎A cat.<end>
    |     system          template + user     media     |  the generation prompt  |  the assistant writes

Nothing is tokenised here. A piece is plain text, the name of a special token, or one image or video; the processor
turns pieces into ids. Source of the format: reference 4.5, 6.2.

Which assistant turns stand behind their generation prompt ("prompted" pieces)
------------------------------------------------------------------------------
What is trained should stand behind the text that stands before it at inference. The family shows *history* differently
from the turn being written: without reasoning, history is `⏎Assistant: text<end>`, but the turn being written follows
`⏎Assistant: <think>⏎⏎</think>⏎⏎`. So:

1. A turn with reasoning reads `⏎Assistant: <think>` + `⏎reasoning⏎</think>⏎text<end>` in both roles: always prompted.
2. The last message, if the assistant's and no generation prompt is asked for, is the turn being written: prompted.
3. An earlier turn without reasoning is history: *not* prompted. A loss on it is conditioned on a prefix that no
   inference produces. To train it exactly, encode the conversation up to and including that turn; to train all turns
   in one pass, pass `every_turn=True`, which shows each turn behind its generation prompt (the price: the history then
   has empty think blocks that inference would not show). An answer of several turns that were written in a row
   (calls, results) is `written_from` its first: only what stands before it is history.

In a prompted turn `thinking` decides the prompt: None follows the data (reasoning present or not); True ends the prompt
with `<think>`, and an answer without reasoning is then written as an empty thought; False ends it with the empty block,
and leaves out the reasoning of the last turn (of every turn with `every_turn`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ernie_model.tokenizer import (
    BEGIN_OF_SENTENCE,
    END_OF_SENTENCE,
    END_THINK,
    END_TOOL_CALL,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    THINK,
    TOOL_CALL,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
)

ROLES = ("system", "user", "assistant", "tool")
TOOL_LIST, END_TOOL_LIST = "<tool_list>", "</tool_list>"
TOOL_OUTPUT, END_TOOL_OUTPUT = "<tool_output>", "</tool_output>"
NO_MESSAGE = -1
"""`Piece.message` of what precedes all messages: the begin token and the list of tools."""

Message = Mapping[str, Any]


class ChatError(ValueError):
    """Messages that the chat format cannot express."""


class SpanKind(Enum):
    """Who wrote a stretch of tokens, and what it is."""

    TEMPLATE = "template"
    """Begin token, role names, newlines, "Picture 1:", the generation prompt."""
    TOOLS = "tools"
    """Definitions of tools."""
    SYSTEM = "system"
    USER = "user"
    TOOL_RESULT = "tool_result"
    IMAGE = "image"
    """Start token, placeholders, end token."""
    VIDEO = "video"
    REASONING = "reasoning"
    """What the assistant writes up to `</think>` and the newline after it."""
    ANSWER = "answer"
    TOOL_CALL = "tool_call"
    END = "end"
    """The `<|end_of_sentence|>` with which the assistant stops."""

    @property
    def generated(self) -> bool:
        """Written by the assistant."""
        return self in (SpanKind.REASONING, SpanKind.ANSWER, SpanKind.TOOL_CALL, SpanKind.END)


class PieceKind(Enum):
    TEXT = "text"
    """Other people's text, or ours without special tokens: the same characters, nothing special."""
    SPECIAL = "special"
    """One special token. A tokenizer that does not have it writes its characters as text."""
    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True)
class Piece:
    kind: PieceKind
    text: str
    """The text; the name of the special token; for media the placeholder with its start and end token."""
    span: SpanKind
    message: int
    prompted: bool = False
    """Belongs to an assistant turn that stands behind its generation prompt (see above)."""
    starts_generation: bool = False
    """The assistant begins to write here: this piece's text is not tokenised together with what precedes it."""
    media: Any = None
    sampling: Mapping[str, Any] | None = None
    """Videos: which frames are asked for (`video.ClipChoice`)."""


@dataclass(frozen=True)
class ChatFormat:
    """How the members of the family differ."""

    think: bool = True
    """The generation prompt has a think block. False in the text models without thinking: `⏎Assistant: `."""
    text_model: bool = False
    """Text models put two newlines before the list of tools and none behind it."""

    @property
    def tool_list_start(self) -> str:
        return "\n\n" if self.text_model else "\n"

    @property
    def tool_list_stop(self) -> str:
        return "" if self.text_model else "\n"


# What the assistant itself may write as special tokens inside its answer (reference 6.1, 6.4).
_ANSWER_MARKUP = re.compile(r"(</?response>|<\|LOC_(?:\d{1,4}|BEGIN|END|SEP)\|>)")


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = False,
    every_turn: bool = False,
    written_from: int | None = None,
    chat_format: ChatFormat | None = None,
) -> list[Piece]:
    """The pieces of a conversation, in order.

    Args:
        messages: `{"role", "content", "reasoning_content"?, "tool_calls"?}`; content is a text or a list of
            `{"type": "text" | "image" | "video", ...}`; a video may have `"sampling"`: fields of `video.ClipChoice`.
        tools: definitions in OpenAI's form, printed as JSON as they are.
        thinking: None follows the data, and means False for the generation prompt.
        add_generation_prompt: end where the assistant begins to write; those pieces have message = len(messages).
        every_turn: show every assistant turn behind its generation prompt, not only the last.
        written_from: show those from this message on so; what stands before it is history.

    Raises:
        ChatError: a message that the format cannot express.
    """
    writer = _Writer(chat_format or ChatFormat(), thinking)
    writer.open(tools)
    for index, message in enumerate(messages):
        being_written = every_turn or (index == len(messages) - 1 and not add_generation_prompt)
        being_written |= written_from is not None and index >= written_from
        writer.write(index, message, being_written)
    if add_generation_prompt:
        writer.index = len(messages)
        writer.generation_prompt(bool(thinking))
    return writer.pieces


def render_continuation(
    messages: Sequence[Message],
    *,
    images_before: int,
    videos_before: int,
    thinking: bool | None = None,
    chat_format: ChatFormat | None = None,
) -> list[Piece]:
    """What stands between an assistant's `<|end_of_sentence|>` and its next turn: `messages`, the generation prompt.

    Args:
        messages: results of tools and what the user says next; as for `render`, and none of the assistant's.
        images_before, videos_before: how many the conversation holds already; labels go on from there.

    Raises:
        ChatError: a message that the format cannot express; an assistant's message; no message.
    """
    if not messages:
        raise ChatError("there is no message to go on with.")
    writer = _Writer(chat_format or ChatFormat(), thinking)
    writer.num_media = {PieceKind.IMAGE: images_before, PieceKind.VIDEO: videos_before}
    writer.previous_role = "assistant"
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            raise ChatError(f"message {index}: only the assistant itself goes on with a message of the assistant's.")
        writer.write(index, message, being_written=False)
    writer.index = len(messages)
    writer.generation_prompt(bool(thinking))
    return writer.pieces


def to_text(pieces: Sequence[Piece]) -> str:
    """The chat string, with one placeholder for each image and video."""
    return "".join(piece.text for piece in pieces)


class _Writer:
    def __init__(self, chat_format: ChatFormat, thinking: bool | None):
        if thinking and not chat_format.think:
            raise ChatError("thinking is true, but this model's chat format has no thinking mode. Leave it out.")
        self.format = chat_format
        self.thinking = thinking
        self.pieces: list[Piece] = []
        self.index = NO_MESSAGE
        self.num_media = {PieceKind.IMAGE: 0, PieceKind.VIDEO: 0}
        self.previous_role: str | None = None

    def open(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.special(BEGIN_OF_SENTENCE)
        if not tools:
            return
        self.text(self.format.tool_list_start)
        self.special(TOOL_LIST)
        self.text("\n")
        self.text(_to_json(list(tools), "tools"), SpanKind.TOOLS)
        self.text("\n")
        self.special(END_TOOL_LIST)
        self.text(self.format.tool_list_stop)

    def write(self, index: int, message: Message, being_written: bool) -> None:
        self.index = index
        role = message.get("role")
        if role not in ROLES:
            raise ChatError(f"message {index}: role is {role!r}; it must be one of {', '.join(ROLES)}.")
        if role == "assistant":
            self.assistant(message, being_written)
        else:
            if self.previous_role == "user":
                self.text("\n")
            {"system": self.system, "user": self.user, "tool": self.tool}[role](message)
        self.previous_role = role

    # -------------------------------------------------------------------------------------------------------- turns

    def system(self, message: Message) -> None:
        self.content(message, SpanKind.SYSTEM)
        self.text("\n")

    def user(self, message: Message) -> None:
        self.text("User: ")
        self.content(message, SpanKind.USER)

    def tool(self, message: Message) -> None:
        """Results of several calls in a row share one "User: "."""
        if self.previous_role != "tool":
            self.text("User: \n")
        self.special(TOOL_OUTPUT)
        self.text("\n")
        self.content(message, SpanKind.TOOL_RESULT)
        self.text("\n")
        self.special(END_TOOL_OUTPUT)
        self.text("\n")

    def assistant(self, message: Message, being_written: bool) -> None:
        reasoning = (message.get("reasoning_content") or "").strip("\n")
        if reasoning and not self.format.think:
            raise ChatError(
                f"message {self.index} has reasoning_content, but this model's chat format has no thinking mode."
            )
        if being_written and self.thinking is False:
            reasoning = ""
        thinks = bool(reasoning) or (being_written and bool(self.thinking))
        prompted = being_written or bool(reasoning)
        if prompted:
            self.generation_prompt(thinks)
        else:
            self.text("\nAssistant: ")
        start = len(self.pieces)
        if thinks:
            self.text(f"\n{reasoning}\n", SpanKind.REASONING)
            self.special(END_THINK, SpanKind.REASONING)
            self.text("\n" if reasoning else "\n\n", SpanKind.REASONING)
        ends_line = self.answer(message)
        self.tool_calls(message.get("tool_calls") or (), ends_line)
        self.special(END_OF_SENTENCE, SpanKind.END)
        if prompted:
            turn = [_replace(piece, prompted=True) for piece in self.pieces[start:]]
            self.pieces[start:] = [_replace(turn[0], starts_generation=True), *turn[1:]]

    def generation_prompt(self, thinking: bool) -> None:
        """What precedes the assistant's first token."""
        self.text("\nAssistant: ")
        if self.format.think:
            self.special(THINK)
        if self.format.think and not thinking:
            self.text("\n\n")
            self.special(END_THINK)
            self.text("\n\n")

    def answer(self, message: Message) -> bool:
        """Write the text; True if whatever follows starts on a new line already."""
        texts = []
        for kind, value, _ in _parts(message, self.index):
            if kind is not PieceKind.TEXT:
                raise ChatError(
                    f"message {self.index}: an assistant message holds an {kind.value}; the model writes only text. "
                    "Move it to a user or tool message."
                )
            texts.append(value)
        text = "".join(texts)
        for number, piece in enumerate(_ANSWER_MARKUP.split(text)):
            if number % 2:
                self.special(piece, SpanKind.ANSWER)
            else:
                self.text(piece, SpanKind.ANSWER)
        return not text or text.endswith("\n")

    def tool_calls(self, calls: Sequence[Mapping[str, Any]], ends_line: bool) -> None:
        """`<tool_call>⏎{"name": ..., "arguments": {...}}⏎</tool_call>⏎` for each call."""
        if calls and not ends_line:
            self.text("\n", SpanKind.TOOL_CALL)
        for call in calls:
            function = call.get("function") or call
            if not isinstance(function.get("name"), str):
                raise ChatError(f"message {self.index}: a tool call has no name: {call!r}.")
            arguments = self.arguments(function.get("arguments"))
            body = {"name": function["name"], "arguments": arguments}
            self.special(TOOL_CALL, SpanKind.TOOL_CALL)
            self.text(f"\n{_to_json(body, f'message {self.index}: tool_calls')}\n", SpanKind.TOOL_CALL)
            self.special(END_TOOL_CALL, SpanKind.TOOL_CALL)
            self.text("\n", SpanKind.TOOL_CALL)

    def arguments(self, value: Any) -> Any:
        """OpenAI's API sends arguments as JSON text; the model must see the object, not a quoted text."""
        if value is None or value == "":
            return {}
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ChatError(
                f"message {self.index}: arguments of a tool call are not JSON ({error}): {value!r}"
            ) from error

    # ------------------------------------------------------------------------------------------------------- pieces

    def content(self, message: Message, span: SpanKind) -> None:
        for kind, value, sampling in _parts(message, self.index):
            if kind is PieceKind.TEXT:
                self.text(value, span)
            else:
                self.media(kind, value, sampling)

    def media(self, kind: PieceKind, media: Any, sampling: Mapping[str, Any] | None) -> None:
        """Pictures and videos are numbered separately, over the whole conversation."""
        self.num_media[kind] += 1
        image = kind is PieceKind.IMAGE
        self.text(f"{'Picture' if image else 'Video'} {self.num_media[kind]}:")
        text = IMAGE_START + IMAGE + IMAGE_END if image else VIDEO_START + VIDEO + VIDEO_END
        span = SpanKind.IMAGE if image else SpanKind.VIDEO
        self.pieces.append(Piece(kind, text, span, self.index, media=media, sampling=sampling))

    def text(self, text: str, span: SpanKind = SpanKind.TEMPLATE) -> None:
        if text:
            self.pieces.append(Piece(PieceKind.TEXT, text, span, self.index))

    def special(self, token: str, span: SpanKind = SpanKind.TEMPLATE) -> None:
        self.pieces.append(Piece(PieceKind.SPECIAL, token, span, self.index))


def _parts(message: Message, index: int) -> Iterator[tuple[PieceKind, Any, Mapping[str, Any] | None]]:
    """Kind, value, and for videos the sampling."""
    content = message.get("content")
    if content is None:
        return
    if isinstance(content, str):
        yield PieceKind.TEXT, content, None
        return
    kinds = {"text": PieceKind.TEXT, "image": PieceKind.IMAGE, "video": PieceKind.VIDEO}
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ChatError(f"message {index}: content is {repr(content)[:80]}; it must be a text or a list of parts.")
    for part in content:
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise ChatError(f"message {index}: a part has type {kind!r}; it must be one of {', '.join(kinds)}.")
        if part.get(kind) is None:
            raise ChatError(f"message {index}: a part of type {kind!r} has no key {kind!r}: {part!r}.")
        sampling = part.get("sampling")
        if sampling is not None and kind != "video":
            raise ChatError(f"message {index}: a part of type {kind!r} has `sampling`, which only videos have.")
        yield kinds[kind], part[kind], sampling


def _to_json(value: Any, where: str) -> str:
    """One line, as transformers' `tojson` prints it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ChatError(f"{where} cannot be written as JSON: {error}") from error


def _replace(piece: Piece, **changes: Any) -> Piece:
    return Piece(**(piece.__dict__ | changes))


# --------------------------------------------------------------------------------------- the same format, as Jinja text


def jinja_template(chat_format: ChatFormat) -> str:
    """The chat template that goes with a saved checkpoint; transformers and vLLM render what `render` renders.

    (With `every_turn` False. Arguments of tool calls must be objects, as everywhere in transformers.)
    """
    text = _JINJA
    if not chat_format.think:
        text = text.replace(_JINJA_PROMPT, "{{- '\\nAssistant: ' -}}")
        text = text.replace("being_written and enable_thinking", "false")
        text = text.replace("message.reasoning_content", "''")
    text = text.replace("TOOL_LIST_START", json.dumps(chat_format.tool_list_start)[1:-1])
    return text.replace("TOOL_LIST_STOP", json.dumps(chat_format.tool_list_stop)[1:-1])


_JINJA_PROMPT = r"""{{- '\nAssistant: <think>' -}}{%- if not thinks -%}{{- '\n\n</think>\n\n' -}}{%- endif -%}"""

_JINJA = (
    r"""{%- set state = namespace(images=0, videos=0, previous='') -%}
{%- macro generation_prompt(thinks) -%}
    """
    + _JINJA_PROMPT
    + r"""
{%- endmacro -%}
{%- macro print(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {%- set state.images = state.images + 1 -%}
                {{- 'Picture ' ~ state.images ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
            {%- elif part.type == 'video' -%}
                {%- set state.videos = state.videos + 1 -%}
                {{- 'Video ' ~ state.videos ~ ':<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set thinking_off = enable_thinking is defined and enable_thinking is not none and not enable_thinking -%}
{%- set enable_thinking = enable_thinking is defined and enable_thinking is not none and enable_thinking -%}
{{- '<|begin_of_sentence|>' -}}
{%- if tools -%}
    {{- 'TOOL_LIST_START<tool_list>\n' -}}{{- tools | tojson -}}{{- '\n</tool_list>TOOL_LIST_STOP' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if state.previous == 'user' and message.role != 'assistant' -%}
        {{- '\n' -}}
    {%- endif -%}
    {%- if message.role == 'system' -%}
        {{- print(message.content) -}}{{- '\n' -}}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' -}}{{- print(message.content) -}}
    {%- elif message.role == 'tool' -%}
        {%- if state.previous != 'tool' -%}
            {{- 'User: \n' -}}
        {%- endif -%}
        {{- '<tool_output>\n' -}}{{- print(message.content) -}}{{- '\n</tool_output>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set reasoning = (message.reasoning_content or '').strip('\n') -%}
        {%- set being_written = loop.last and not add_generation_prompt -%}
        {%- if being_written and thinking_off -%}
            {%- set reasoning = '' -%}
        {%- endif -%}
        {%- set thinks = reasoning or (being_written and enable_thinking) -%}
        {%- if being_written or reasoning -%}
            {{- generation_prompt(thinks) -}}
        {%- else -%}
            {{- '\nAssistant: ' -}}
        {%- endif -%}
        {%- if thinks -%}
            {{- '\n' ~ reasoning ~ '\n</think>\n' -}}{{- '' if reasoning else '\n' -}}
        {%- endif -%}
        {%- set text = print(message.content) -%}
        {{- text -}}
        {%- if message.tool_calls -%}
            {%- if text and not text.endswith('\n') -%}
                {{- '\n' -}}
            {%- endif -%}
            {%- for call in message.tool_calls -%}
                {%- set function = call.function or call -%}
                {{- '<tool_call>\n{"name": ' -}}{{- function.name | tojson -}}
                {{- ', "arguments": ' -}}{{- (function.arguments or {}) | tojson -}}{{- '}\n</tool_call>\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|end_of_sentence|>' -}}
    {%- endif -%}
    {%- set state.previous = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- generation_prompt(enable_thinking) -}}
{%- endif -%}
"""
)
