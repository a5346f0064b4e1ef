"""What the text of one turn holds: reasoning, answer, calls (reference 6.1, 6.2). Plain, until parsing.py is there."""

import json
import re
from dataclasses import dataclass
from typing import Any

from ernie_model.tokenizer import END_RESPONSE, END_THINK, END_TOOL_CALL, RESPONSE, TOOL_CALL

_CALL = re.compile(rf"{TOOL_CALL}\s*(.*?)\s*(?:{END_TOOL_CALL}|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCallText:
    name: str
    arguments: str
    """As JSON text."""
    parsed: Any


@dataclass(frozen=True)
class Parsed:
    reasoning: str | None
    content: str | None
    calls: tuple[ToolCallText, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    kind: str
    """reasoning or content."""
    text: str


def parse(text: str, *, in_reasoning: bool) -> Parsed:
    reasoning = None
    if in_reasoning:
        reasoning, end, text = text.partition(END_THINK)
        if not end:
            return Parsed(reasoning, None)
        text = text.lstrip("\n")
    if RESPONSE in text and END_RESPONSE in text:
        text = text[text.index(RESPONSE) + len(RESPONSE) : text.rindex(END_RESPONSE)]
    calls, errors = [], []
    for body in _CALL.findall(text):
        try:
            raw = json.loads(body)
            arguments = raw.get("arguments", {})
            calls.append(ToolCallText(str(raw.get("name", "")), json.dumps(arguments, ensure_ascii=False), arguments))
        except (ValueError, AttributeError, RecursionError) as error:
            errors.append(f"the tool call is not a JSON object: {error}")
    if errors:
        return Parsed(reasoning, text, (), tuple(errors))
    content = text.partition(TOOL_CALL)[0].rstrip("\n") if calls else text
    return Parsed(reasoning, content or None, tuple(calls))


class StreamParser:
    def __init__(self, *, in_reasoning: bool):
        self._in_reasoning = in_reasoning
        self._text = ""
        self._shown = {"reasoning": 0, "content": 0}

    def push(self, text: str, *, final: bool = False) -> list[Piece]:
        self._text += text
        parsed, pieces = parse(self._text, in_reasoning=self._in_reasoning), []
        for kind in ("reasoning", "content"):
            value = getattr(parsed, kind) or ""
            if not final and not (kind == "reasoning" and END_THINK in self._text):
                value = value.partition("<")[0].rstrip("\n")  # what may become a tag waits
            if len(value) > self._shown[kind]:
                pieces.append(Piece(kind, value[self._shown[kind] :]))
                self._shown[kind] = len(value)
        return pieces

    def finish(self) -> list[Piece]:
        return self.push("", final=True)
