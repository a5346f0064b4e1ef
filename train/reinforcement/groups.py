"""The words of a rollout: a ticket is drawn, attempts are made and scored, and a group of them is learned from."""

from dataclasses import dataclass

from data.errors import Refusal
from ernie_model.inference.agent import Episode, Status

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
    """The weighted sum; None where the accuracy is, and where a part failed."""
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
    """Of the oldest weights that a token was sampled with: updates done before."""
    attempts: tuple[Scored, ...]
    refused: Refusal | None = None
    """The record cannot be asked: a picture that cannot be read. Its attempts have failed."""

    @property
    def outcome(self) -> Outcome:
        return Outcome(
            group=self.ticket.group,
            prompt=self.ticket.prompt,
            accuracies=tuple(one.scores.accuracy for one in self.attempts),
        )

    def summary(self, domain: str) -> "Summary":
        return Summary(
            outcome=self.outcome,
            domain=domain,
            version=self.version,
            attempts=tuple(AttemptSummary.of(one) for one in self.attempts),
            refused=self.refused,
        )


@dataclass(frozen=True, kw_only=True)
class AttemptSummary:
    """What every rank knows of an attempt."""

    worth: float | None
    accuracy: float | None
    parts: dict[str, float | None]
    status: str
    """`agent.Status`."""
    tokens: int
    """Sampled."""
    calls: int
    failed_calls: int
    """Those that a tool answered with an error, or not at all, unreadable ones among them: as `Attempt` counts them."""
    unreadable: int
    """Turns whose call cannot be read."""
    pictures: int
    """That tools returned."""
    problem: str | None

    @staticmethod
    def of(one: Scored) -> "AttemptSummary":
        episode, scores = one.episode, one.scores
        results = [result for turn in episode.turns for result in turn.results]
        calls = sum(max(len(turn.calls), turn.problem is not None) for turn in episode.turns)
        return AttemptSummary(
            worth=scores.total,
            accuracy=scores.accuracy,
            parts=scores.parts,
            status=episode.status.value,
            tokens=episode.num_sampled,
            calls=calls,
            failed_calls=calls - sum(not result.error for result in results),
            unreadable=sum(turn.problem is not None for turn in episode.turns),
            pictures=sum(len(result.images) for result in results),
            problem=scores.problem or episode.error,
        )

    @property
    def truncated(self) -> bool:
        """A limit of length or time cut it off."""
        return self.status in (Status.TRUNCATED.value, Status.TIMEOUT.value)

    @property
    def failed(self) -> bool:
        """It was not the model that ended it."""
        return self.status == Status.FAILED.value


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What every rank knows of a group, wherever it was made."""

    outcome: Outcome
    domain: str
    version: int
    attempts: tuple[AttemptSummary, ...]
    refused: Refusal | None = None
