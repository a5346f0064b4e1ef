"""The words of a rollout: a ticket is drawn, attempts are made and scored, and a group of them is learned from."""

from dataclasses import dataclass, field
from typing import Any

from ernie_model.inference.agent import Episode

SAME = 1e-6
"""Accuracies closer than this are equal."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A prompt that is to be asked."""

    group: int
    """Counts up over the whole run, in the order in which prompts were drawn."""
    prompt: int
    """Which one, counted over all prompts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one group turned out: what the sampler learns of it. Every rank knows those of all."""

    group: int
    prompt: int
    accuracies: tuple[float | None, ...]
    """Of each attempt, in [0, 1]; None: it cannot be told. Truncated ones are 0."""

    @property
    def scored(self) -> list[float]:
        return [one for one in self.accuracies if one is not None]

    @property
    def valid(self) -> bool:
        """At least half of the attempts could be scored."""
        return 2 * len(self.scored) >= len(self.accuracies)

    @property
    def trainable(self) -> bool:
        """Its attempts differ in accuracy. Other parts of the reward do not count here (reference 3.4): a group that is
        all right or all wrong teaches nothing about the task, however its formats differ."""
        return self.valid and max(self.scored) - min(self.scored) > SAME


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one attempt is worth."""

    parts: dict[str, float | None]
    """By name, before weights."""
    accuracy: float | None
    """The part that the question asks for; None: it cannot be told (a verifier hung, a gold answer is unreadable)."""
    total: float | None
    """The weighted sum; None where the accuracy is."""
    problem: str | None = None
    """Why there is no score, in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """One attempt, done."""

    episode: Episode
    scores: Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """All attempts at one prompt."""

    ticket: Ticket
    version: int
    """Of the weights that the first token was sampled with: updates done before the rollout."""
    attempts: tuple[Scored, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        return Outcome(
            group=self.ticket.group,
            prompt=self.ticket.prompt,
            accuracies=tuple(one.scores.accuracy for one in self.attempts),
        )
