"""What a reward function sees and returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a model made of one question."""

    answer: str
    """The text that counts: after the thought, without tool calls."""
    text: str = ""
    """All it wrote, as it wrote it."""
    turns: tuple[str, ...] = ()
    """The same, turn by turn."""
    reasoning: str = ""
    thinking: bool = False
    """The prompt opens a thought in every turn, and the turn begins inside it."""
    num_calls: int = 0
    """Tool calls, of all turns."""
    num_failed_calls: int = 0
    """Those whose tool answered with an error, or not at all."""
    num_tokens: int = 0
    """Sampled tokens, of all turns."""
    token_ids: tuple[int, ...] = ()
    """These tokens."""
    finished: bool = True
    """False: cut off by a limit."""
    calls: tuple[Mapping[str, Any], ...] = field(default=())
    """{"name", "arguments", "failed", "images"} of each call, in order; images: how many its tool returned."""
    max_chars: int | None = None
    """A longer answer is none: it says everything at once."""
    problem: str | None = None
    """Why there is no attempt to judge, in words: the engine failed, not the model."""


Reward = Callable[..., float | None]
"""(attempt: Attempt, expected: str, **options) -> in [0, 1]; None when it cannot be told (the right answer cannot be
read), which is not 0. Whatever the attempt holds, nothing is raised.
"""

Part = Callable[..., float | None]
"""(attempt: Attempt, accuracy: float | None, **options) -> in [-1, 1]: how the attempt was made. None adds nothing to
the reward. Whatever the attempt holds, nothing is raised; options that make no sense raise ValueError.
"""
