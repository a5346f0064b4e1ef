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
    reasoning: str = ""
    num_calls: int = 0
    """Tool calls, of all turns."""
    num_failed_calls: int = 0
    """Those whose tool answered with an error."""
    num_tokens: int = 0
    """Sampled tokens, of all turns."""
    finished: bool = True
    """False: cut off by a limit."""
    calls: tuple[Mapping[str, Any], ...] = field(default=())
    """{"name", "arguments", "failed"} of each call, in order."""


Reward = Callable[..., float | None]
"""(attempt: Attempt, expected: str, **options) -> in [0, 1]; None when it cannot be told (the right answer cannot be
read), which is not 0. Whatever the attempt holds, nothing is raised.
"""
