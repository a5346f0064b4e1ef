"""What goes into the engine and what comes out: the words that engine, agent, evaluation and server share.

    Prompt + SamplingParams  ──►  engine  ──►  Delta, Delta, ..., Completion

Tokens in, tokens out. A prompt is ids with one `MediaItem` for each image or video, in order of appearance; a
completion holds the ids that were sampled. Nobody decodes an answer and tokenises it again to go on: the next prompt of
a conversation is `prompt.extended(completion.token_ids + observation ids, media)`, and shares what was computed.

Shape letters:  T tokens   P patches   X numbers in a patch   L sparse layers   K experts per token
"""

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from ernie_model.processor import Encoded
from ernie_model.rope import Grid


class RequestError(ValueError):
    """A request that cannot be honoured; it names the field, its value, the rule and the way out. Others go on."""


class ContextExceeded(RequestError):
    """The prompt, with the answer that it may get, is longer than there is room for."""


class ConstraintError(RequestError):
    """A schema or pattern that no answer can be held to."""


class EngineFull(Exception):
    """The engine takes no further request now (`EngineSettings.max_waiting`); later it will."""


@dataclass(frozen=True, eq=False)
class MediaItem:
    """One image or video."""

    grid: Grid
    patch_PX: Tensor  # float32, on the CPU

    @cached_property
    def digest(self) -> bytes:
        """Names the content: equal pixels may share what was computed for them."""
        return hashlib.blake2b(self.patch_PX.contiguous().numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Prompt:
    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...] = ()
    """One for each run of placeholders, in order of appearance."""

    @staticmethod
    def of(encoded: Encoded) -> "Prompt":
        """What `Processor.encode(..., add_generation_prompt=True)` made."""
        media, at = [], 0
        for grid in encoded.grids:
            assert encoded.patch_PX is not None
            patches = grid[0] * grid[1] * grid[2]
            media.append(MediaItem(grid, encoded.patch_PX[at : at + patches]))
            at += patches
        return Prompt(tuple(encoded.token_T.tolist()), tuple(media))

    def extended(self, token_ids: Sequence[int], media: Sequence[MediaItem] = ()) -> "Prompt":
        return Prompt((*self.token_ids, *token_ids), (*self.media, *media))


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """The answer is a JSON text that this schema allows."""

    schema: dict[str, Any] | str


@dataclass(frozen=True, kw_only=True)
class Regex:
    """The answer matches this pattern from its first to its last character."""

    pattern: str


Constraint = JsonSchema | Regex


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Order: penalties, bias and bans, constraint, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of all tokens of prompt and answer are divided by it where positive, multiplied where negative."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    stop_ids: tuple[int, ...] = ()
    """Besides the two terminators `<|end_of_sentence|>` and `</s>`."""
    ignore_end: bool = False
    """Go on after terminators, up to `max_new_tokens` (benchmarks)."""
    seed: int | None = None
    """The same seed, prompt and weights give the same text, whatever else is sampled beside it; None draws one."""
    banned_ids: tuple[int, ...] = ()
    """Besides placeholders and their start and end tokens, which are never sampled."""
    top_logprobs: int = 0
    """How many of the most likely tokens are reported at each place."""
    prompt_logprobs: bool = False
    """Log-probabilities of the prompt's own tokens, at temperature 1 without truncation."""
    routed_experts: bool = False
    """Report which experts each token visited."""
    constraint: Constraint | None = None
    constrain_after: str | None = None
    """The constraint holds from this text on, for example `</think>`; None: from the first token."""

    def __post_init__(self):
        """Raises RequestError: a value outside its range."""
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        for name in ("temperature", "top_k", "top_logprobs"):
            _at_least(name, getattr(self, name), 0)
        _rule(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1; 1 keeps all tokens")
        _rule(0 <= self.min_p <= 1, "min_p", self.min_p, "at least 0 and at most 1; 0 keeps all tokens")
        _rule(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "positive")
        for name in ("presence_penalty", "frequency_penalty"):
            _rule(abs(getattr(self, name)) <= 2, name, getattr(self, name), "between -2 and 2")
        _rule(all(self.stop), "stop", self.stop, "texts that are not empty")


def _at_least(name: str, value: float, least: int) -> None:
    _rule(least <= value < float("inf"), name, value, f"a finite number, {least} or more")


def _rule(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {value}; it must be {rule}.")


class Finish(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """By a terminator, a stop id or a stop text."""
    LENGTH = "length"
    """`max_new_tokens`. (A request that could outgrow the context is refused: `RequestError`.)"""
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """The likeliest tokens at one place, best first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Completion:
    """A finished answer. Per-token fields are as long as `token_ids`."""

    token_ids: tuple[int, ...]
    """All that were sampled, the terminator included, and what lies behind the start of a stop text."""
    text: str
    """Decoded, special tokens such as `</think>` included; without the terminator, and cut before a stop text."""
    finish: Finish
    logprobs: tuple[float, ...]
    """Under the distribution that was sampled from: after penalties, bans, temperature and truncation. At temperature
    0: after penalties and bans, as if the temperature were 1."""
    versions: tuple[int, ...]
    """Which weights each was sampled with (`Engine.version`)."""
    stop: str | int | None = None
    """The text or id that ended it."""
    top_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[float | None, ...] = ()
    """Of each prompt token; None for the first, which nothing precedes."""
    experts: Tensor | None = None  # int16 (T, L, K), prompt and answer; -1 where nothing was computed (the last token)
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, found in the cache."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What was written since the last one."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TokenLogprobs, ...] = ()
    completion: Completion | None = None
    """The whole answer, in the last one."""


class Generates(Protocol):
    """What agent, evaluation and server need of an engine (`async_engine.AsyncEngine`)."""

    @property
    def max_context(self) -> int:
        """Longest prompt with its answer, in tokens."""
        ...

    async def generate(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Completion:
        """Raises RequestError, EngineFull. Cancelling the task cancels the request."""
        ...

    def stream(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> AsyncIterator[Delta]:
        """Leaving the iterator cancels the request."""
        ...
