"""What the text of one answer holds: reasoning, content, tool calls (reference 6.1, 6.2).

    Six times seven ...                           reasoning: the prompt ended with <think>
    </think>
                                                  then either content, in tags or not,
    <response>
    42
    </response>
                                                  or calls, any number, with or without content before them
    <tool_call>
    {"name": "multiply", "arguments": {"a": 6, "b": 7}}
    </tool_call>

Two readers. `parse` has the whole text and reads it as vLLM's `ernie45` reasoning and tool parsers do: to the letter in
`split_reasoning` and `split_calls`. `StreamParser` shows what is certain as it comes; however the text is cut, it gives
the same. The two agree on every answer of the form above, cut off anywhere, and on calls that are not JSON. They differ
where only the end tells what the beginning was: on `<think>` or `<response>` behind other text, on what follows
`</response>`, and on a broken call behind a good one. The stream then leaves standing what it has shown.

Nothing here raises on a text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from ernie_model.tokenizer import END_RESPONSE, END_THINK, END_TOOL_CALL, RESPONSE, THINK, TOOL_CALL


@dataclass(frozen=True)
class ToolCallText:
    """A call as it was written."""

    name: str
    arguments: str
    """As JSON text."""
    parsed: dict[str, Any] | None
    """The arguments; None if they are no object. An object written as a text, as OpenAI's API has it, is read."""


@dataclass(frozen=True)
class Parsed:
    reasoning: str | None
    """None: the answer did not think."""
    content: str | None
    """None: there is nothing but reasoning and calls."""
    calls: tuple[ToolCallText, ...] = ()
    errors: tuple[str, ...] = ()
    """Why something that begins like a call is none."""


# ------------------------------------------------------------------------------------------------------ the whole text


def parse(text: str, *, in_reasoning: bool, calls: bool = True) -> Parsed:
    """Read a finished answer. Newlines that the format puts around the content are not part of it.

    Args:
        in_reasoning: the prompt ended with `<think>`: the text begins inside the reasoning, and without `</think>` all
            of it is reasoning. If false, only a text that itself begins with `<think>` has reasoning.
        calls: False where no tools were offered: what looks like a call is content.
    """
    start = text.lstrip("\n")
    if in_reasoning or start.startswith(THINK):
        reasoning, rest = _split_at_end_of_thought(text)
        inside = _inside_response(rest or "")
    else:
        reasoning, rest = None, text
        inside = _inside_response(text) if start.startswith(RESPONSE) else text
    _, content, found = split_calls(inside) if calls else (False, inside, ())
    content = (content or "").lstrip("\n")
    if inside != rest:
        content = content.rstrip("\n")
    elif content.startswith(RESPONSE):  # cut off before its end
        content = content.removeprefix(RESPONSE).lstrip("\n")
    read = [_read_call(body) for body in _bodies(inside)] if calls else []
    return Parsed(reasoning, content or None, found, tuple(error for error in read if isinstance(error, str)))


def split_reasoning(text: str) -> tuple[str, str | None]:
    """Reasoning and content, as vLLM's `ernie45` reasoning parser splits a whole text."""
    reasoning, rest = _split_at_end_of_thought(text)
    return reasoning, _inside_response(rest or "") or None


def split_calls(text: str) -> tuple[bool, str | None, tuple[ToolCallText, ...]]:
    """Whether tools are called, the content, and the calls, as vLLM's `ernie45` tool parser splits a whole text.

    One call between braces that is not JSON makes content of everything. What is not between braces, or has no end, is
    passed over.
    """
    if TOOL_CALL not in text:
        return False, text, ()
    calls = []
    for body in _bodies(text):
        call = _read_call(body)
        if isinstance(call, ToolCallText):
            calls.append(call)
        elif body.whole:
            return False, text, ()
    return True, text.partition(TOOL_CALL)[0].rstrip("\n") or None, tuple(calls)


def _split_at_end_of_thought(text: str) -> tuple[str, str | None]:
    before, opened, behind = text.partition(THINK)
    reasoning, closed, rest = (behind if opened else before).partition(END_THINK)
    return reasoning, rest if closed else None


def _inside_response(text: str) -> str:
    """Between the first opening and the last closing tag; the text itself if there are none, or in the wrong order."""
    start, end = text.find(RESPONSE), text.rfind(END_RESPONSE)
    return text[start + len(RESPONSE) : end] if 0 <= start < end else text


# -------------------------------------------------------------------------------------------------------------- a call


@dataclass(frozen=True)
class _Body:
    """What follows a `<tool_call>`."""

    text: str
    whole: bool
    """It goes from a brace to a brace and `</tool_call>`."""
    end: int = 0
    """Where the text goes on behind it."""


_NOT_SPACE = re.compile(r"\S")


def _bodies(text: str) -> Iterator[_Body]:
    at = text.find(TOOL_CALL)
    while at >= 0:
        start = at + len(TOOL_CALL)
        body = _body(text, start)
        yield body or _Body(text[start : start + 100], False)
        at = text.find(TOOL_CALL, body.end) if body else -1


def _body(text: str, start: int, searched: int = 0) -> _Body | None:
    """The body from `start` on; None if it has no end yet.

    Args:
        searched: before this place there is no `</tool_call>` that ends it.
    """
    first = _NOT_SPACE.search(text, start)
    if first is None:
        return None
    if first[0] != "{":
        return _Body(text[start : start + 100], False, start)
    close = text.find(END_TOOL_CALL, max(first.start(), searched))
    while close >= 0:
        last = close
        while text[last - 1].isspace():
            last -= 1
        if text[last - 1] == "}":
            return _Body(text[first.start() : last], True, close + len(END_TOOL_CALL))
        close = text.find(END_TOOL_CALL, close + 1)
    return None


def _read_call(body: _Body) -> ToolCallText | str:
    """The call, or why it is none."""
    shown = body.text.strip()
    shown = repr(shown if len(shown) <= 60 else shown[:60] + "...")
    if not body.whole:
        return f"{TOOL_CALL} is not followed by a JSON object and {END_TOOL_CALL}, but by {shown}"
    try:
        call = json.loads(body.text)
        arguments = call.get("arguments", {})
        text = json.dumps(arguments, ensure_ascii=False)
        name = call.get("name", "")
        (name + text).encode()  # half of a surrogate pair is no text
    except (ValueError, TypeError, RecursionError) as error:
        return f"a tool call is not a JSON object with a `name`: {shown} ({error})"
    return ToolCallText(name, text, _object(arguments))


def _object(arguments: Any) -> dict[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) else None


# ----------------------------------------------------------------------------------------------------- as it is written


@dataclass(frozen=True)
class Piece:
    """Something that is certain now."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCallText | None = None


class _At(Enum):
    START = auto()
    """Only newlines so far; `<think>` may follow."""
    REASONING = auto()
    HEAD = auto()
    """Before the content: only newlines; `<response>` may follow."""
    CONTENT = auto()
    CALL = auto()
    """Behind `<tool_call>`."""
    BETWEEN = auto()
    """Behind a call: nothing is shown but further calls."""
    OVER = auto()
    """Behind `</response>`: nothing is shown any more."""


class StreamParser:
    """Reads an answer piece by piece. Put together, the pieces of any way to cut it are the same.

    Args: see `parse`.
    """

    def __init__(self, *, in_reasoning: bool, calls: bool = True):
        self._at = _At.START
        self._in_reasoning = in_reasoning
        self._in_response = False
        self._calls_read = calls
        """False also once a call was not JSON: from then on all is content."""
        self._num_calls = 0
        self._buffer = ""
        self._withheld = ""
        """What is not shown unless a call turns out to be no JSON."""
        self._searched = 0
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What is certain now that `text` has come."""
        self._buffer += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """No more text comes: what was held back."""
        if self._at is _At.START and self._in_reasoning:
            self._show("reasoning", self._buffer)
        elif self._at is _At.REASONING:
            self._show("reasoning", self._buffer)
        elif self._at in (_At.START, _At.HEAD):
            self._show("content", self._buffer.lstrip("\n"))
        elif self._at is _At.CONTENT:
            self._show("content", self._buffer)
        self._buffer = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _show(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if not text:
            return
        if self._pieces and self._pieces[-1].kind == kind:
            text = self._pieces.pop().text + text
        self._pieces.append(Piece(kind, text))

    def _step(self) -> bool:
        """One move; False when nothing more can be said about the buffer."""
        return {
            _At.START: self._start,
            _At.REASONING: self._reasoning,
            _At.HEAD: self._head,
            _At.CONTENT: self._content,
            _At.CALL: self._call,
            _At.BETWEEN: self._between,
            _At.OVER: self._over,
        }[self._at]()

    def _start(self) -> bool:
        text = self._buffer.lstrip("\n")
        if text.startswith(THINK):
            self._buffer, self._at = text.removeprefix(THINK), _At.REASONING
            return True
        if THINK.startswith(text):
            return False
        self._at = _At.REASONING if self._in_reasoning else _At.HEAD
        return True

    def _reasoning(self) -> bool:
        tag = self._up_to("reasoning", (END_THINK, THINK))
        if tag == END_THINK:
            self._at = _At.HEAD
        return tag is not None

    def _head(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        if not self._in_response and self._buffer.startswith(RESPONSE):
            self._buffer, self._in_response = self._buffer.removeprefix(RESPONSE), True
            return True
        if not self._buffer or (not self._in_response and RESPONSE.startswith(self._buffer)):
            return False
        self._at = _At.CONTENT
        return True

    def _content(self) -> bool:
        tags = (TOOL_CALL,) * self._calls_read + (END_RESPONSE,) * self._in_response
        tag = self._up_to("content", tags)
        if tag == TOOL_CALL:
            self._withheld += TOOL_CALL
            self._at = _At.CALL
        elif tag == END_RESPONSE:
            self._at = _At.OVER
        return tag is not None

    def _call(self) -> bool:
        body = _body(self._buffer, 0, self._searched)
        if body is None:
            self._searched = max(len(self._buffer) - len(END_TOOL_CALL) + 1, 0)
            return False
        written, self._buffer = self._buffer[: body.end], self._buffer[body.end :]
        self._searched, self._at = 0, _At.BETWEEN
        self._withheld += written
        call = _read_call(body)
        if isinstance(call, ToolCallText):
            self._pieces.append(Piece("call", call=call))
            self._num_calls += 1
            self._withheld = ""
        elif body.whole and not self._num_calls:
            self._show("content", self._withheld)
            self._calls_read, self._at = False, _At.CONTENT
        return True

    def _between(self) -> bool:
        tags = (TOOL_CALL,) + (END_RESPONSE,) * self._in_response
        place, tag = _first(self._buffer, tags)
        if tag is None:
            place = len(self._buffer) - _longest_start(self._buffer, tags)
        behind = place + len(tag or "")
        if not self._num_calls:
            self._withheld += self._buffer[:behind]
        self._buffer = self._buffer[behind:]
        if tag is not None:
            self._at = _At.CALL if tag == TOOL_CALL else _At.OVER
        return tag is not None

    def _over(self) -> bool:
        self._buffer = ""
        return False

    def _up_to(self, kind: Literal["reasoning", "content"], tags: tuple[str, ...]) -> str | None:
        """Show the text before the first of `tags` and drop the tag; without one, what cannot be the start of one.

        Newlines before a tag belong to it in the content, and are not shown.
        """
        place, tag = _first(self._buffer, tags)
        if tag is None:
            place = len(self._buffer) - _longest_start(self._buffer, tags)
        text, self._buffer = self._buffer[:place], self._buffer[place + len(tag or "") :]
        if kind == "content":
            shown = text.rstrip("\n")
            if tag is None:
                self._buffer = text[len(shown) :] + self._buffer
            elif tag == TOOL_CALL:
                self._withheld = text[len(shown) :]
            text = shown
        self._show(kind, text)
        return tag


def _first(text: str, tags: tuple[str, ...]) -> tuple[int, str | None]:
    found = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    return min(found) if found else (-1, None)


def _longest_start(text: str, tags: tuple[str, ...]) -> int:
    """How much of the end of `text` may be the start of a tag."""
    lengths = range(min(len(text), max(map(len, tags), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in tags)), 0)
