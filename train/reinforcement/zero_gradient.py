"""Why is my gradient zero? Where attempts and tokens go on their way from the policy to an update.

    asked ──► failed, unscored, truncated? ──► all alike? ──► waiting, surplus ──► fits in a row? ──► learned from
                                                                                          │
         tokens of an update:  sampled ──► no advantage, masked, clipped, ... ──► taught ◄┘

Every attempt that was asked has one fate, the first of FATES that applies; so has every sampled token of an update
(train/objectives/policy_record.py counts those). What is left of the gradient is the share of the update's nominal
attempts that are in its rows with tokens to learn, times the share of those tokens that have a gradient.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any

from train.reinforcement.groups import Summary
from train.reinforcement.source import kind_of

FATES = {
    "failed": "could not be asked, or failed in the engine",
    "unscored": "could not be scored",
    "right": "in groups that are all right",
    "wrong": "in groups that are all wrong",
    "equal": "in groups that are all alike",
    "waiting": "wait in the queue",
    "surplus": "more than needed, thrown away",
    "truncated": "cut off, and masked for it",
    "left_out": "fit in no row, or wrote nothing",
    "learned": "learned from",
}
TOKENS = {
    "impossible": "impossible under the trainer's distribution",
    "zero_advantage": "without an advantage",
    "dropped": "of attempts that objective.opsm_delta drops",
    "masked": "masked: engine and trainer disagree",
    "clipped": "clipped",
    "taught": "with a gradient",
}
FEW = 0.1
"""Share of the gradient below which somebody should look."""
MANY = 0.1
"""Share of attempts that cannot be scored, of tokens that are masked, above which somebody should."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What became of a rollout's attempts."""

    rollout: int
    attempts: int
    """Asked in it."""
    fates: dict[str, int]
    """Of FATES, those that there are; they sum to `attempts`."""
    problems: dict[str, int] = field(default_factory=dict)
    """Why attempts failed or have no score, the most frequent first."""
    unreadable: int = 0
    """Attempts with a tool call that cannot be read, whatever else became of them."""
    cut: int = 0
    """Attempts that a limit of length or time cut off, whatever else became of them."""
    from_queue: int = 0
    """Groups of earlier rollouts that are learned from now."""
    stale: int = 0
    """Groups that waited too long and were dropped."""

    def metrics(self) -> dict[str, float]:
        """Shares of the attempts."""
        whole = max(self.attempts, 1)
        out = {f"zero_attempts_{fate}": self.fates.get(fate, 0) / whole for fate in FATES}
        out |= {"zero_attempts_unreadable": self.unreadable / whole, "zero_attempts_cut": self.cut / whole}
        return out | {"zero_groups_stale": float(self.stale)}


def fates_of(
    summary: Summary,
    *,
    usable: bool,
    accepted: bool,
    waiting: bool,
    held: AbstractSet[int],
    mask_truncated: bool,
) -> list[str]:
    """Of each attempt of a group.

    Args:
        usable: its attempts differ, or rollout.keep_equal takes it all the same.
        held: attempts that are in rows, of an accepted group.
    """
    kind = kind_of(summary)

    def fate(index: int) -> str:
        one = summary.attempts[index]
        if one.failed:
            return "failed"
        if one.worth is None or kind == "unscored":
            return "unscored"
        if not usable:
            return kind
        if not accepted:
            return "waiting" if waiting else "surplus"
        if one.truncated and mask_truncated:
            return "truncated"
        return "learned" if index in held else "left_out"

    return [fate(index) for index in range(len(summary.attempts))]


def asked_of(
    rollout: int, summaries: Sequence[Summary], fates: Sequence[Sequence[str]], *, from_queue: int = 0, stale: int = 0
) -> Asked:
    attempts = [one for summary in summaries for one in summary.attempts]
    of_attempt = [fate for of_group in fates for fate in of_group]
    counts = Counter(of_attempt)
    why = Counter(
        one.problem or "no reason given"
        for one, fate in zip(attempts, of_attempt, strict=True)
        if fate in ("failed", "unscored")
    )
    return Asked(
        rollout=rollout,
        attempts=len(attempts),
        fates={fate: counts[fate] for fate in FATES if counts[fate]},
        problems=dict(why.most_common(3)),
        unreadable=sum(one.unreadable > 0 for one in attempts),
        cut=sum(one.truncated for one in attempts),
        from_queue=from_queue,
        stale=stale,
    )


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What became of an update's tokens; all numbers are sums over it."""

    sampled: int
    fates: dict[str, int]
    """Of TOKENS; they sum to `sampled`."""
    clipped_low: int = 0
    """Clipped at the lower bound, where the advantage is negative; beside `fates`, as what follows."""
    clipped_high: int = 0
    below: int = 0
    """Whose k = p_old / p_engine (or their attempt's) is under objective.band,"""
    above: int = 0
    """and over it."""
    unknown: int = 0
    """The engine's log-probability is nan."""
    left: float = 0.0
    """Of the nominal gradient."""

    @staticmethod
    def of(metrics: Mapping[str, float], nominal: float) -> "Taught | None":
        """Of what an update reports (train/objectives/policy_record.py); None where it counts no tokens.

        Args:
            nominal: attempts of an update, whatever became of them.
        """
        if "tokens_sampled" not in metrics:
            return None
        sampled = metrics["tokens_sampled"]

        def tokens(share: str) -> int:
            return round(metrics.get(share, 0.0) * sampled)

        fates = {name: round(metrics.get(f"tokens_{name}", 0.0)) for name in TOKENS}
        attempts = sampled / metrics["attempt_tokens"] if metrics.get("attempt_tokens") else 0.0
        return Taught(
            sampled=round(sampled),
            fates=fates,
            clipped_low=tokens("clipped_low"),
            clipped_high=tokens("clipped_high"),
            below=tokens("correction_low"),
            above=tokens("correction_high"),
            unknown=round(metrics.get("tokens_unknown", 0.0)),
            left=attempts / max(nominal, 1) * fates["taught"] / max(sampled, 1),
        )

    def metrics(self) -> dict[str, float]:
        """Shares of the tokens."""
        whole = max(self.sampled, 1)
        out = {f"zero_tokens_{name}": count / whole for name, count in self.fates.items()}
        for name in ("clipped_low", "clipped_high", "below", "above", "unknown"):
            out[f"zero_tokens_{name}"] = getattr(self, name) / whole
        return out | {"zero_left": self.left}


def entry(step: int, asked: Asked | None, taught: Taught | None) -> dict[str, Any]:
    """A line of zero_gradient.jsonl."""
    return {
        "step": step,
        "attempts": None if asked is None else asdict(asked),
        "tokens": None if taught is None else asdict(taught),
    }


def off(asked: Asked | None, taught: Taught | None) -> dict[str, str]:
    """What somebody should look at: name -> words."""
    found = {}
    if asked is not None and asked.attempts:
        fates, whole = asked.fates, asked.attempts
        why = "".join(f"; {problem}" for problem in list(asked.problems)[:1])
        if failed := fates.get("failed", 0):
            found["failed"] = f"{failed} attempts could not be asked, or failed in the engine{why}"
        if (unscored := fates.get("unscored", 0)) > MANY * whole:
            found["unscored"] = f"{unscored} of {whole} attempts could not be scored{why}"
        if lost := fates.get("left_out", 0):
            found["left_out"] = f"{lost} attempts fit in no row (data.max_tokens, max_patches) or wrote nothing"
        for kind in ("right", "wrong"):
            if fates.get(kind, 0) > (1 - FEW) * whole:
                found[kind] = f"{fates[kind]} of {whole} attempts are in groups that are all {kind}"
        if asked.unreadable > MANY * whole:
            found["unreadable"] = f"{asked.unreadable} of {whole} attempts call a tool in a way that cannot be read"
    if taught is not None:
        if not taught.sampled:
            found["nothing"] = "the update has no token to learn from"
        elif taught.left < FEW:
            found["left"] = f"{taught.left:.1%} of the nominal gradient is left"
        for name, words in (("masked", "are masked"), ("impossible", "have probability 0 for the trainer")):
            if taught.fates.get(name, 0) > MANY * taught.sampled:
                share = taught.fates[name] / taught.sampled
                found[name] = f"{share:.0%} of the sampled tokens {words}"
        if taught.unknown:
            found["unknown"] = f"{taught.unknown} sampled tokens have no log-probability of the engine"
    return found


Line = tuple[str, int | None, float | None]
"""Words, number, share."""


def table(asked: Asked | None, taught: Taught | None) -> list[Line]:
    """Whole numbers first, then their parts; a line without a number is a heading."""
    lines: list[Line] = []
    if asked is not None:
        whole = max(asked.attempts, 1)
        lines.append((f"attempts asked in rollout {asked.rollout}", asked.attempts, None))
        lines += [(FATES[fate], count, count / whole) for fate, count in asked.fates.items()]
        lines += [(f"  {count} x {problem}", None, None) for problem, count in asked.problems.items()]
        for words, count in (("with calls that cannot be read", asked.unreadable), ("cut off by a limit", asked.cut)):
            if count:
                lines.append((f"of all, {words}", count, count / whole))
        if asked.from_queue:
            lines.append(("groups from the queue, learned from now", asked.from_queue, None))
        if asked.stale:
            lines.append(("groups that waited too long, dropped", asked.stale, None))
    if taught is not None:
        whole = max(taught.sampled, 1)
        lines.append(("tokens sampled, in the rows of the update", taught.sampled, None))
        lines += [(TOKENS[name], count, count / whole) for name, count in taught.fates.items() if count]
        for words, count in (
            ("clipped, where the advantage is negative", taught.clipped_low),
            ("clipped, where it is positive", taught.clipped_high),
            ("k under objective.band", taught.below),
            ("k over objective.band", taught.above),
            ("the engine's log-probability is nan", taught.unknown),
        ):
            if count:
                lines.append((f"of all, {words}", count, count / whole))
        lines.append(("of the nominal gradient is left", None, taught.left))
    return lines


def table_text(asked: Asked | None, taught: Taught | None) -> str:
    """For a terminal."""
    out = []
    for words, count, share in table(asked, taught):
        number = "" if count is None else f"{count:,}"
        percent = "" if share is None else f"{share:.1%}"
        if count is None and share is None:
            out.append(f"{'':>17}    {words.strip()[:100]}")
        elif share is None:
            out.append(f"{number:>9}  {words}")
        else:
            out.append(f"{number:>9} {percent:>7}  {words}")
    return "\n".join(out)
