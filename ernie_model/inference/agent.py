"""One question to its answer: write, use tools, look at what they return, write on.

    messages ──► prompt ids ──► engine ──► sampled ids ──► parse ──► no calls: the answer
                     ▲                                       │
                     │                                       ▼ calls, all at once
                     └── ids of the results  ◄── processor ◄── tools
                         "User: ⏎<tool_output>⏎Picture 2:[crop]⏎</tool_output>⏎⏎Assistant: <think>"

    Episode.token_ids   | prompt | sampled         | results  | sampled    |      sampled ids are never decoded and
    Episode.action_T      0 0 0    1 1 1 1 1 1 1 1   0 0 0 0    1 1 1 1 1         tokenised again to go on

Evaluation, reinforcement learning, chat and the server run this same loop.

A turn ends its message with `<|end_of_sentence|>`. Where the model ended it otherwise (`</s>`, a stop text), that token
stands before the results as part of them: not sampled, and the model goes on behind the text it knows. An episode never
ends with results: when there is no room for an answer to them, they are not appended.

Shape letters:  T tokens of the episode
"""

import asyncio
import hashlib
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ernie_model.chat import ChatError
from ernie_model.images import ImageSize, MediaError, load_image
from ernie_model.inference.moderation import Blocked, Guard, Moderation, check
from ernie_model.inference.parsing import StreamParser, ToolCallText, parse
from ernie_model.inference.request import (
    Completion,
    ContextExceeded,
    Delta,
    EngineFull,
    Finish,
    Generates,
    MediaItem,
    Prompt,
    RequestError,
    SamplingParams,
)
from ernie_model.inference.tools import ERROR_CHARS, Limits, ToolBox, ToolContext, ToolResult
from ernie_model.processor import Processor

__all__ = ["Agent", "AgentEvent", "Episode", "EventKind", "Limits", "Status", "Turn"]

MAX_TOKENS = "agent.max_tokens, or the engine's longest context where that is less"
RETRY_S = 0.25
"""How long a conversation in progress waits for a place in the engine before it asks again."""


class Status(Enum):
    """How an episode ended."""

    ANSWERED = "answered"
    """The last turn calls no tool, and the model ended it."""
    CALLS = "calls"
    """The last turn calls tools that the caller gave and only the caller can run."""
    TRUNCATED = "truncated"
    """No room: `max_new_tokens` of a turn, `Limits.max_tokens`, or the model's longest context."""
    TOOL_LIMIT = "tool_limit"
    """One turn has more calls than `Limits.max_calls`; none of them was run."""
    TURN_LIMIT = "turn_limit"
    """The last turn that `Limits.max_turns` allows still calls tools."""
    PARSE_ERROR = "parse_error"
    """The last turn that `Limits.max_turns` allows holds a tool call that cannot be read."""
    TIMEOUT = "timeout"
    """`Limits.time_s`."""
    BLOCKED = "blocked"
    """A moderation filter has found something."""
    FAILED = "failed"
    """The engine could not go on; `Episode.error` says why."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One answer written, and what its tool calls returned."""

    text: str
    """All that was written, special tokens such as `</think>` included."""
    reasoning: str | None
    content: str | None
    calls: tuple[ToolCallText, ...]
    """None of them where one cannot be read."""
    completion: Completion
    results: tuple[ToolResult, ...] = ()
    """One for each call, in order; or one error for calls that cannot be read. Empty when nothing was run."""
    problem: str | None = None
    """Why a call cannot be read."""

    def message(self) -> dict[str, Any]:
        """The assistant's message, in OpenAI's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or ""}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


@dataclass(eq=False)
class Episode:
    """All that happened. Per-token fields are as long as `token_ids`."""

    token_ids: list[int]
    """Prompt, turns and results, placeholders of pictures and videos included."""
    media: list[MediaItem]
    """In order of appearance."""
    images: list[Image.Image]
    """Pictures as they were given, or returned by tools, in order of appearance."""
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of sampled tokens, under the distribution they were sampled from; 0 elsewhere."""
    versions: list[int] = field(default_factory=list)
    """Weights that each token was sampled with; -1 where none was."""
    experts: list[Tensor] = field(default_factory=list)
    """What each turn adds to what is known of the experts that tokens visited, (t, L, K); see `expert_TLK`."""
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.FAILED
    answer: str = ""
    """Content of the last turn: whole when `status` is ANSWERED or CALLS, and what there is of it when TRUNCATED."""
    reasoning: str = ""
    """Of the last turn."""
    error: str | None = None
    """What ended it, in words, where it was not the model."""
    num_prompt_tokens: int = 0
    """Before the first turn."""

    @property
    def action_T(self) -> Tensor:
        """bool: True where the model wrote the token."""
        return torch.tensor(self.sampled, dtype=torch.bool)

    @property
    def expert_TLK(self) -> Tensor | None:
        """int16: the experts of each sparse layer that each token visited when it was first computed, vision experts
        after the text experts; -1 where nothing was computed, as of the last token. None unless the engine reports them
        (`SamplingParams.routed_experts`)."""
        if not self.experts:
            return None
        known_TLK = torch.cat(self.experts)
        unknown = len(self.token_ids) - len(known_TLK)
        return torch.cat([known_TLK, known_TLK.new_full((unknown, *known_TLK.shape[1:]), -1)])

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    @property
    def finished(self) -> bool:
        return self.status in (Status.ANSWERED, Status.CALLS)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the episode adds to the conversation, as the processor takes it."""
        return [
            message
            for turn in self.turns
            for message in (turn.message(), *(result.message() for result in turn.results))
        ]

    def append(self, token_ids: Sequence[int], *, completion: Completion | None = None) -> None:
        count = len(token_ids)
        self.token_ids += token_ids
        self.sampled += [completion is not None] * count
        self.logprobs += completion.logprobs if completion else [0.0] * count
        self.versions += completion.versions if completion else [-1] * count
        if completion is not None and completion.experts is not None:
            self._add_experts(completion.experts)

    def _add_experts(self, expert_TLK: Tensor) -> None:
        """Those of prompt and answer. What is known already stays: it is what led to the tokens sampled until then."""
        if len(expert_TLK) != len(self.token_ids):
            raise RuntimeError(
                f"the engine told the experts of {len(expert_TLK)} tokens; there are {len(self.token_ids)}."
            )
        new_TLK = expert_TLK[sum(map(len, self.experts)) :]
        computed = int((new_TLK >= 0).all(dim=(1, 2)).sum())
        self.experts.append(new_TLK[:computed].clone())


class EventKind(Enum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"
    RESULT = "result"


@dataclass(frozen=True, eq=False)
class AgentEvent:
    """Something that happened just now."""

    kind: EventKind
    turn: int
    """From 0."""
    text: str = ""
    """REASONING, CONTENT: what was written since the last such event."""
    call: ToolCallText | None = None
    """CALL, and the RESULT of it (None: of calls that cannot be read)."""
    index: int = 0
    """Which call of the turn, from 0."""
    result: ToolResult | None = None


OnEvent = Callable[[AgentEvent], Awaitable[None] | None]


class Agent:
    """Runs any number of conversations at once, in one event loop.

    Args:
        toolbox: None offers no tools.
        params: for turns of which the caller says nothing else.
        thinking: prompts open a thought.
        moderation: filters; None passes everything.
    """

    def __init__(
        self,
        engine: Generates,
        processor: Processor,
        toolbox: ToolBox | None = None,
        limits: Limits | None = None,
        params: SamplingParams | None = None,
        thinking: bool = False,
        moderation: Moderation | None = None,
    ):
        self.engine = engine
        self.processor = processor
        self.toolbox = toolbox or ToolBox(())
        limits = limits or Limits()
        # An episode that outgrows the context ends as truncated, rather than refused in the middle.
        self.limits = replace(limits, max_tokens=min(limits.max_tokens, engine.max_context))
        self.params = params or SamplingParams()
        self.thinking = thinking
        self.moderation = moderation or Moderation()

    async def run(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        params: SamplingParams | None = None,
        thinking: bool | None = None,
        prompt: Prompt | None = None,
        on_event: OnEvent | None = None,
    ) -> Episode:
        """Answer the last of `messages`.

        Args:
            messages: as `Processor.encode` takes them.
            tools: definitions shown to the model, in OpenAI's form; None: the toolbox's; empty: none. A call of one
                that the toolbox lacks ends the episode with `Status.CALLS`.
            params: `max_new_tokens` counts each turn for itself. A `seed` gives every turn random numbers of its own.
            prompt: what `messages` are with these tools and this thinking, where that is computed already.
            on_event: called as things happen, and awaited if it can be; the next token waits for it.

        Raises:
            ChatError, MediaError: messages that cannot be honoured.
            RequestError: a prompt or parameters that the engine refuses, or a prompt longer than `Limits.max_tokens`.
            EngineFull: no place in the engine. A conversation that has begun waits for one.
        """
        run = _Run(self, tools, params or self.params, self.thinking if thinking is None else thinking, on_event)
        return await run.episode(messages, prompt)


class _Run:
    """One episode being made."""

    def __init__(
        self,
        agent: Agent,
        tools: Sequence[Mapping[str, Any]] | None,
        params: SamplingParams,
        thinking: bool,
        on_event: OnEvent | None,
    ):
        self.agent, self.limits, self.params, self.thinking = agent, agent.limits, params, thinking
        self.processor, self.toolbox, self.moderation = agent.processor, agent.toolbox, agent.moderation
        self.definitions = list(self.toolbox.definitions() if tools is None else tools)
        self.offered = [str(definition.get("function", definition).get("name")) for definition in self.definitions]
        self.on_event = on_event
        self.deadline = time.monotonic() + agent.limits.time_s
        self.from_user: list[bool] = []
        self.num_videos = 0

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    async def episode(self, messages: Sequence[Mapping[str, Any]], prompt: Prompt | None) -> Episode:
        for text in _others_texts(messages):
            try:
                check(self.moderation.input, text)
            except Blocked as finding:
                return Episode([], [], [], status=Status.BLOCKED, error=f"input: {finding}")
        prompt = await asyncio.to_thread(self._begin, messages, prompt)
        if len(prompt.token_ids) >= self.limits.max_tokens:
            raise ContextExceeded(
                f"the prompt has {len(prompt.token_ids)} tokens; with its answer it may have "
                f"{self.limits.max_tokens} ({MAX_TOKENS}). Shorten it, use smaller pictures, or raise the limit."
            )
        episode = Episode([], list(prompt.media), self.images, num_prompt_tokens=len(prompt.token_ids))
        episode.append(prompt.token_ids)
        while True:
            ended = await self._turn(episode)
            if ended is not None:
                episode.status, episode.error = ended
                break
        last = episode.turns[-1] if episode.turns else None
        if last is not None and episode.status is not Status.BLOCKED:
            episode.answer, episode.reasoning = last.content or "", last.reasoning or ""
        return episode

    def _begin(self, messages: Sequence[Mapping[str, Any]], prompt: Prompt | None) -> Prompt:
        messages, self.images = self._open(messages)
        if prompt is not None:
            return prompt
        encoded = self.processor.encode(
            messages, tools=self.definitions, thinking=self.thinking, add_generation_prompt=True
        )
        return Prompt.of(encoded)

    def _open(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Image.Image]]:
        """Decode pictures once, for the processor and for tools."""
        opened: list[Mapping[str, Any]] = []
        images: list[Image.Image] = []
        for index, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) or not isinstance(content, Sequence):
                opened.append(message)
                continue
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                self.num_videos += kind == "video"
                if kind == "image" and not isinstance(part.get("image"), ImageSize | None):
                    unnamed = f"image {len(images) + 1} of the conversation (message {index})"
                    source = part["image"]
                    name = unnamed if isinstance(source, bytes) else None
                    picture = load_image(source, name or getattr(source, "filename", "") or str(source))
                    images.append(picture)
                    self.from_user.append(message.get("role") != "tool")
                    part = {**part, "image": picture}
                parts.append(part)
            opened.append({**message, "content": parts})
        return opened, images

    # --------------------------------------------------------------------------------------------------------- a turn

    async def _turn(self, episode: Episode) -> tuple[Status, str | None] | None:
        """Write one turn and run what it calls. None: go on; else how the episode ends."""
        number = len(episode.turns)
        room = self.limits.max_tokens - len(episode.token_ids)
        params = replace(
            self.params, max_new_tokens=min(self.params.max_new_tokens, room), seed=_seed(self.params.seed, number)
        )
        prompt = Prompt(tuple(episode.token_ids), tuple(episode.media))
        try:
            completion = await self._write(prompt, params, number)
        except _Stopped as stopped:
            completion, blocked = stopped.completion, stopped.reason
        except EngineFull:
            if number == 0:
                raise
            return Status.TIMEOUT, f"no place in the engine within {self.limits.time_s:g} s."
        except RequestError as error:
            if number == 0:
                raise
            return Status.FAILED, str(error)
        else:
            blocked = None
        episode.append(completion.token_ids, completion=completion)
        completion = replace(completion, experts=None)  # the episode has them; each turn has those of all before it
        parsed = parse(completion.text, in_reasoning=self.thinking, calls=bool(self.definitions))
        turn = Turn(
            completion.text,
            parsed.reasoning,
            parsed.content,
            () if parsed.errors else parsed.calls,
            completion,
            problem="; ".join(parsed.errors)[:ERROR_CHARS] or None,
        )
        episode.turns.append(turn)
        if blocked is None:
            blocked = self._finding(turn)
        if blocked is not None:
            return Status.BLOCKED, f"output: {blocked}"
        match completion.finish:
            case Finish.LENGTH:
                return Status.TRUNCATED, f"turn {number + 1} has no room for more tokens."
            case Finish.TIMEOUT:
                return Status.TIMEOUT, f"the question took longer than {self.limits.time_s:g} s (agent.time_s)."
            case Finish.CANCELLED | Finish.ERROR:
                return Status.FAILED, completion.error or completion.finish.value
        return await self._use_tools(episode, turn, number)

    async def _use_tools(self, episode: Episode, turn: Turn, number: int) -> tuple[Status, str | None] | None:
        calls = turn.calls
        if not calls and turn.problem is None:
            return Status.ANSWERED, None
        if turn.problem is None:
            for index, call in enumerate(calls):
                await self._tell(AgentEvent(EventKind.CALL, number, call=call, index=index))
            if any(call.name in self.offered and call.name not in self.toolbox for call in calls):
                return Status.CALLS, None
            if len(calls) > self.limits.max_calls:
                rule = f"{len(calls)} calls in one turn; there may be {self.limits.max_calls} (agent.max_calls)."
                return Status.TOOL_LIMIT, rule
        if number + 1 >= self.limits.max_turns:
            rule = f"turn {number + 1} is the last that agent.max_turns allows"
            if turn.problem is not None:
                return Status.PARSE_ERROR, f"{rule}, and its call cannot be read: {turn.problem}"
            return Status.TURN_LIMIT, f"{rule}, and calls tools."
        results = await self._results(episode, turn)
        results, observation = await asyncio.to_thread(self._observe, episode, results)
        for index, result in enumerate(results):
            call = calls[index] if calls else None
            await self._tell(AgentEvent(EventKind.RESULT, number, call=call, index=index, result=result))
        episode.turns[-1] = replace(turn, results=tuple(results))
        if self.left_s <= 0:
            return Status.TIMEOUT, f"the question took longer than {self.limits.time_s:g} s (agent.time_s)."
        ended = episode.token_ids[-1] == self.processor.end_id
        token_ids = [*([] if ended else [self.processor.end_id]), *observation.token_ids]
        if len(episode.token_ids) + len(token_ids) >= self.limits.max_tokens:
            rule = f"{len(episode.token_ids)} tokens and {len(token_ids)} of results leave no room for an answer"
            return Status.TRUNCATED, f"{rule} within {self.limits.max_tokens} ({MAX_TOKENS})."
        episode.append(token_ids)
        episode.media += observation.media
        for result in results:
            episode.images += result.images
            self.from_user += [False] * len(result.images)
        return None

    async def _results(self, episode: Episode, turn: Turn) -> list[ToolResult]:
        if turn.problem is not None:
            return [ToolResult.failure(turn.problem)]
        left_s = max(0.001, self.left_s)
        limits = replace(self.limits, time_s=left_s, tool_time_s=min(self.limits.tool_time_s, left_s))
        context = ToolContext(tuple(episode.images), tuple(self.from_user), limits)

        async def run(call: ToolCallText) -> ToolResult:
            if call.name not in self.offered:  # the toolbox may hold more
                return ToolResult.failure(f"there is no tool {call.name!r}; there is {', '.join(self.offered)}.")
            return await self.toolbox.run(call.name, call.parsed, context)

        return await asyncio.gather(*map(run, turn.calls))

    def _observe(self, episode: Episode, results: list[ToolResult]) -> tuple[list[ToolResult], Prompt]:
        """The results as the model reads them. One that it cannot be shown becomes an error."""
        images = len(episode.images)

        def prompt_of(results: Sequence[ToolResult]) -> Prompt:
            encoded = self.processor.encode_continuation(
                [result.message() for result in results],
                images_before=images,
                videos_before=self.num_videos,
                thinking=self.thinking,
            )
            return Prompt.of(encoded)

        try:
            return results, prompt_of(results)
        except (ChatError, MediaError):
            pass
        for index, result in enumerate(results):
            try:
                prompt_of([result])
            except (ChatError, MediaError) as error:
                problem = error.problem if isinstance(error, MediaError) else str(error)
                results[index] = ToolResult.failure(f"the result cannot be shown: {problem}"[:ERROR_CHARS])
        return results, prompt_of(results)

    def _finding(self, turn: Turn) -> str | None:
        """What the filters of a whole turn say."""
        try:
            for text in (turn.reasoning, turn.content, *(call.arguments for call in turn.calls)):
                check(self.moderation.output, text or "")
        except Blocked as finding:
            return str(finding)
        return None

    # -------------------------------------------------------------------------------------------------------- writing

    async def _write(self, prompt: Prompt, params: SamplingParams, number: int) -> Completion:
        while True:
            try:
                if self.on_event is None:
                    return await self.agent.engine.generate(prompt, params, timeout_s=max(0.001, self.left_s))
                return await self._stream(prompt, params, number)
            except EngineFull:
                if number == 0 or self.left_s < RETRY_S:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _stream(self, prompt: Prompt, params: SamplingParams, number: int) -> Completion:
        """Raises _Stopped: a filter has found something."""
        parser = StreamParser(in_reasoning=self.thinking, calls=bool(self.definitions))
        guards = {kind: Guard(self.moderation.output) for kind in (EventKind.REASONING, EventKind.CONTENT)}
        token_ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        stream = self.agent.engine.stream(prompt, params, timeout_s=max(0.001, self.left_s))
        async with aclosing(cast("AsyncGenerator[Delta, None]", stream)) as deltas:
            try:
                async for delta in deltas:
                    token_ids += delta.token_ids
                    logprobs += delta.logprobs
                    text += delta.text
                    pieces = parser.push(delta.text)
                    if delta.completion is not None:
                        pieces = [*pieces, *parser.finish()]
                    for piece in pieces:
                        kind = _KINDS.get(piece.kind)
                        if kind is EventKind.CONTENT:  # the thought is over
                            await self._show(EventKind.REASONING, number, guards[EventKind.REASONING].finish())
                        if kind is not None:
                            await self._show(kind, number, guards[kind].push(piece.text))
                    if delta.completion is not None:
                        for kind, guard in guards.items():
                            await self._show(kind, number, guard.finish())
                        return delta.completion
            except Blocked as finding:
                versions = (-1,) * len(token_ids)
                completion = Completion(tuple(token_ids), text, Finish.CANCELLED, tuple(logprobs), versions)
                raise _Stopped(completion, str(finding)) from finding
        raise RuntimeError("the engine's stream ended without its completion")

    async def _show(self, kind: EventKind, number: int, text: str) -> None:
        if text:
            await self._tell(AgentEvent(kind, number, text))

    async def _tell(self, event: AgentEvent) -> None:
        if self.on_event is not None:
            answer = self.on_event(event)
            if inspect.isawaitable(answer):
                await answer


_KINDS = {"reasoning": EventKind.REASONING, "content": EventKind.CONTENT}


class _Stopped(Exception):
    """A turn that a filter ended: what was written until then, and why."""

    def __init__(self, completion: Completion, reason: str):
        super().__init__(reason)
        self.completion = completion
        self.reason = reason


def _seed(seed: int | None, turn: int) -> int | None:
    """Turns of one episode draw different random numbers, and the same again when it is repeated."""
    if seed is None or turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {turn}".encode(), digest_size=8).digest()) >> 1


def _others_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every text that the assistant did not write."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "assistant" or content is None:
            continue
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
    return texts
