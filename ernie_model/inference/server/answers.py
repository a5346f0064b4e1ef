"""What the engine wrote -> OpenAI's completion, or the chunks of a stream.

Both go through the same reader, piece by piece, so a stream put together is the completion.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from ernie_model.inference.agent import Episode, EventKind, Status
from ernie_model.inference.moderation import Blocked, Guard, Moderation, check
from ernie_model.inference.parsing import Piece, StreamParser
from ernie_model.inference.request import Completion, Delta, Finish
from ernie_model.inference.server.prompts import Job
from ernie_model.inference.server.steps import Step, StepDelta, Told
from ernie_model.tokenizer import END_THINK, END_TOOL_CALL, Tokenizer

Progress = Delta | Told | Episode
"""What an attempt hands over: of the engine, or of the agent, whose last piece is the episode."""

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(BaseModel):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    """Of all tokens that were sampled and show in the text: thought, answer and calls."""
    refusal: None = None


class Function(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: Function


class CallDelta(Call):
    index: int


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None
    steps: list[Step] | None = None
    """What the server's tools did (steps.py)."""


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason
    status: str | None = None
    """How an answer with the server's tools ended, more exactly: a value of agent.Status."""


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class MessageDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    steps: list[StepDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    status: str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


# ------------------------------------------------------------------------------------------------------- one answer


@dataclass
class _Written:
    """What one attempt has written so far."""

    parser: StreamParser
    guards: dict[str, Guard]
    """Of reasoning and content: what a filter may still find something in waits."""
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    turn: int = 0
    begun: bool = False
    blocked: bool = False
    """A filter has found something: nothing more is said."""
    num_tokens: int = 0
    completion: Completion | None = None
    episode: Episode | None = None
    """Instead of a completion, where the server's tools were at hand."""

    @property
    def finished(self) -> bool:
        return self.blocked or self.completion is not None or self.episode is not None

    @property
    def completions(self) -> list[Completion]:
        if self.episode is not None:
            return [turn.completion for turn in self.episode.turns]
        return [] if self.completion is None else [self.completion]

    @property
    def num_result_tokens(self) -> int:
        """What the model was shown of tools."""
        episode = self.episode
        return 0 if episode is None else len(episode.token_ids) - episode.num_prompt_tokens - episode.num_sampled


class Answer:
    """The answer to one request, as it comes."""

    def __init__(self, job: Job, tokenizer: Tokenizer, moderation: Moderation):
        self.job = job
        self.tokenizer = tokenizer
        self.filters = moderation.output
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = job.request.model
        self._end_call_id = tokenizer.special_id(END_TOOL_CALL)
        self._written = [self._unwritten() for _ in job.attempts]

    def _unwritten(self) -> _Written:
        parser = StreamParser(in_reasoning=self.job.in_reasoning, calls=self.job.offers_tools)
        return _Written(parser, {kind: Guard(self.filters) for kind in ("reasoning", "content")})

    def take(self, batch: Sequence[tuple[int, Progress]]) -> Iterator[ChatChunk]:
        """The chunks that say it."""
        for number, piece in batch:
            written = self._written[number]
            if written.blocked:
                continue
            logprobs = None
            match piece:
                case Delta():
                    written.num_tokens += len(piece.token_ids)
                    said = self._said(written, piece)
                    logprobs = self._logprobs(piece) if self.job.request.logprobs else None
                    written.completion = piece.completion
                case Told():
                    said = self._told(written, piece)
                case Episode():
                    said = []
                    written.num_tokens, written.episode = piece.num_sampled, piece
                    written.blocked = piece.status is Status.BLOCKED
            changes: list[MessageDelta] = []
            for change in said:
                if not written.begun:
                    change.role = "assistant"
                    written.begun = True
                changes.append(change)
            if logprobs is not None and logprobs.content and not changes:
                changes.append(MessageDelta(content=""))
            for place, change in enumerate(changes):
                shown = logprobs if place == 0 else None
                yield self._chunk([ChunkChoice(index=number, delta=change, logprobs=shown, finish_reason=None)])
            if written.finished:
                end = ChunkChoice(index=number, delta=MessageDelta(), finish_reason=_reason(written))
                if written.episode is not None:
                    end.status = written.episode.status.value
                if not written.begun:
                    end.delta = MessageDelta(role="assistant", content="")
                yield self._chunk([end])

    @property
    def finished(self) -> bool:
        """All attempts are; those that a filter has stopped, before the engine is."""
        return all(written.finished for written in self._written)

    def whole(self) -> ChatCompletion:
        """When all attempts are finished."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(number, written) for number, written in enumerate(self._written)],
            usage=self.usage(),
        )

    def usage(self) -> Usage:
        completions = [written.completions for written in self._written if written.completions]
        prompt_tokens = len(self.job.prompt.token_ids) + sum(written.num_result_tokens for written in self._written)
        sampled = sum(written.num_tokens for written in self._written)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=sampled,
            total_tokens=prompt_tokens + sampled,
            # What none of the attempts had to compute; they share the rest among themselves.
            prompt_tokens_details=PromptDetails(
                cached_tokens=min((turns[0].num_cached_tokens for turns in completions), default=0)
            ),
            completion_tokens_details=CompletionDetails(
                reasoning_tokens=sum(self._reasoning_tokens(turn) for turns in completions for turn in turns)
            ),
        )

    def usage_chunk(self) -> ChatChunk:
        return self._chunk([], self.usage())

    # --------------------------------------------------------------------------------------------------------- parts

    def _said(self, written: _Written, delta: Delta) -> list[MessageDelta]:
        pieces = written.parser.push(delta.text)
        if delta.completion is not None:
            if self.job.one_call and delta.completion.stop == self._end_call_id:
                pieces += written.parser.push(END_TOOL_CALL)  # the stop that ended it is not in the text
            pieces += written.parser.finish()
        changes: list[MessageDelta] = []
        try:
            for piece in pieces:
                changes += self._changes(written, piece)
            if delta.completion is not None:
                changes += self._held(written, "reasoning") + self._held(written, "content")
        except Blocked:
            written.blocked = True
        return changes

    def _told(self, written: _Written, told: Told) -> list[MessageDelta]:
        """What filters hold back, the agent has held back."""
        event = told.event
        anew, written.turn = event.turn > written.turn, event.turn
        if event.kind is EventKind.CONTENT:
            return self._text(written, "content", event.text)
        if event.kind is EventKind.REASONING:
            apart = "\n" if anew and written.reasoning and not written.reasoning.endswith("\n") else ""
            return self._text(written, "reasoning", apart + event.text)
        call = event.call
        of_turn = [number for number, step in enumerate(written.steps) if step.turn == event.turn]
        if event.index < len(of_turn):
            index = of_turn[event.index]
            step = written.steps[index] = written.steps[index].model_copy(update={"result": told.result})
        else:
            index = len(written.steps)
            name, arguments = (None, None) if call is None else (call.name, call.arguments)
            step = Step(turn=event.turn, content=written.content or None, name=name, arguments=arguments)
            step.result = told.result
            written.content = ""
            written.steps.append(step)
        return [MessageDelta(steps=[StepDelta(index=index, **step.model_dump())])]

    def _changes(self, written: _Written, piece: Piece) -> list[MessageDelta]:
        """Raises Blocked."""
        if piece.kind == "reasoning":
            return self._text(written, "reasoning", written.guards["reasoning"].push(piece.text))
        changes = self._held(written, "reasoning")
        if piece.call is None:
            return changes + self._text(written, "content", written.guards["content"].push(piece.text))
        changes += self._held(written, "content")
        check(self.filters, piece.call.arguments)
        function = Function(name=piece.call.name, arguments=piece.call.arguments)
        call = Call(id=f"call_{secrets.token_hex(12)}", function=function)
        index = len(written.calls)
        written.calls.append(call)
        return [*changes, MessageDelta(tool_calls=[CallDelta(index=index, **call.model_dump())])]

    def _held(self, written: _Written, kind: str) -> list[MessageDelta]:
        """What a filter had wait, now that this text is at its end. Raises Blocked."""
        return self._text(written, kind, written.guards[kind].finish())

    def _text(self, written: _Written, kind: str, text: str) -> list[MessageDelta]:
        if not text:
            return []
        if kind == "reasoning":
            written.reasoning += text
            return [MessageDelta(reasoning_content=text)]
        written.content += text
        return [MessageDelta(content=text)]

    def _choice(self, number: int, written: _Written) -> Choice:
        completion, logprobs = written.completion, None
        if self.job.request.logprobs and completion is not None:
            logprobs = self._logprobs(
                Delta("", completion.token_ids, completion.logprobs, completion.top_logprobs, completion)
            )
        message = AnswerMessage(
            content=written.content if written.content or not written.calls else None,
            reasoning_content=written.reasoning or None,
            tool_calls=written.calls or None,
            steps=written.steps or None,
        )
        status = None if written.episode is None else written.episode.status.value
        return Choice(index=number, message=message, logprobs=logprobs, finish_reason=_reason(written), status=status)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        # `object` is said, as what is not said is not sent
        about = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return ChatChunk(**about, choices=choices, usage=usage)

    def _logprobs(self, delta: Delta) -> Logprobs:
        count = len(delta.token_ids)
        completion = delta.completion
        if count and completion is not None and completion.finish is Finish.STOP and isinstance(completion.stop, int):
            count -= 1  # the id that ended it writes nothing
        content = []
        for place in range(count):
            one = self._named(delta.token_ids[place], delta.logprobs[place])
            top = delta.top_logprobs[place] if delta.top_logprobs else None
            tops = [] if top is None else list(map(self._named, top.token_ids, top.logprobs))
            content.append(TokenLogprob(**one.model_dump(), top_logprobs=tops))
        return Logprobs(content=content)

    def _named(self, token_id: int, logprob: float) -> TopLogprob:
        written = self.tokenizer.token_bytes[token_id] or b""
        return TopLogprob(token=written.decode("utf-8", "replace"), bytes=list(written), logprob=logprob)

    def _reasoning_tokens(self, completion: Completion) -> int:
        if not self.job.in_reasoning:
            return 0
        end = self.tokenizer.special_id(END_THINK)
        if end in completion.token_ids:
            return completion.token_ids.index(end) + 1
        return len(completion.token_ids)


def _reason(written: _Written) -> FinishReason:
    if written.blocked:
        return "content_filter"
    if written.episode is not None:
        return "stop" if written.episode.status is Status.ANSWERED else "length"
    assert written.completion is not None
    if written.completion.finish is Finish.LENGTH:
        return "length"
    return "tool_calls" if written.calls else "stop"
