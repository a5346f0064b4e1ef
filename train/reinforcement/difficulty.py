"""Which prompts are asked: those whose attempts are likely to differ, for the others teach nothing.

    fresh ──► active ◄────────────┐             a group of attempts that are all right, or all wrong, has no advantages
                │ useless twice,  │ rested
                │ of one kind     │
                ├──► resting ─────┤             50 rollouts, then 100, 200, 400
                └──► retired ─────┘ not right   after 4 rests of a prompt that is always right; seldom asked
                               any more

Of every prompt a Beta belief says how often an attempt is right: what was seen, older attempts counting less because
the policy was another one then, on top of a prior that counts as a few attempts. Active prompts are drawn without
replacement in proportion to the expected probability that a group of them is mixed,

    E[1 - p^A - (1 - p)^A] = 1 - B(a + A, b) / B(a, b) - B(a, b + A) / B(a, b),        p ~ Beta(a, b), A attempts

with a floor of uniform draws; a share of the draws is for prompts that nobody has tried. Because useless groups are
left out, more are asked than needed: 1 / (1 - z) times, z being the smoothed share of useless ones in a domain.

All of it is a function of the seed and of what came out, whatever the order and whichever process sampled it, and
state_dict() holds all of it: a run that was interrupted, even in the middle of a rollout, draws what it would have.

Over-sampling: DAPO (arXiv 2503.14476), GLM-4.1V-Thinking (arXiv 2507.01006, section 5). Drawing without replacement by
keys log(u) / w: Efraimidis and Spirakis 2006. ERNIE-4.5-VL-Thinking's model card names "dynamic difficulty sampling"
and no details; beliefs, rests and audits are ours.

Arrays over prompts are indexed by a prompt's number. A *lane* is what is drawn from apart: a domain.
"""

import base64
import difflib
import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.special import betaln

from data.errors import DataError
from train.config import UserError
from train.reinforcement.groups import SAME, Outcome, Ticket
from train.rl_config import SamplerConfig, SamplerKind
from train.telemetry import plain_names

VERSION = 1
"""Of the state."""
LATE = 16
"""Rollouts that a group may be late; then its prompt counts as never asked."""
BINS = 10
"""Of beliefs: [0, 0.1), ... [0.9, 1]."""
RATES = 48
"""Steps in which the history knows pass rates; most numbers of attempts divide it."""
SPANS = 256
"""Entries of the history, at most. When it is full, neighbours become one."""
CHUNKS = 64
"""Parts of the data whose identity is kept apart, to say where it has changed."""


class Verdict(IntEnum):
    """Of a group."""

    MIXED = 0
    """Its attempts differ: it can be trained on."""
    RIGHT = 1
    """All of them are."""
    WRONG = 2
    EQUAL = 3
    """All alike, and in between."""
    UNSCORED = 4
    """Fewer than half of the attempts could be scored."""


class Status(IntEnum):
    """Of a prompt."""

    FRESH = 0
    ACTIVE = 1
    RESTING_RIGHT = 2
    """Rests because its last groups, sampler.rest_after of them, were all right."""
    RESTING_WRONG = 3
    RESTING_EQUAL = 4
    RESTING_UNSCORED = 5
    RETIRED = 6


RESTS = {
    Verdict.RIGHT: Status.RESTING_RIGHT,
    Verdict.WRONG: Status.RESTING_WRONG,
    Verdict.EQUAL: Status.RESTING_EQUAL,
    Verdict.UNSCORED: Status.RESTING_UNSCORED,
}
RESTING = tuple(RESTS.values())


def verdict(outcome: Outcome) -> Verdict:
    if not outcome.valid:
        return Verdict.UNSCORED
    if outcome.trainable:
        return Verdict.MIXED
    if min(outcome.scored) >= 1 - SAME:
        return Verdict.RIGHT
    return Verdict.WRONG if max(outcome.scored) <= SAME else Verdict.EQUAL


@dataclass(frozen=True)
class PromptInfo:
    """What the sampler knows of a prompt before it is asked. Its number is its place in the list."""

    id: str
    domain: str = ""
    tier: int | None = None
    """Difficulty that the record names, 0 for easy."""


class Span(NamedTuple):
    """What happened in one rollout, or in several that follow each other."""

    step: int
    """Rollouts done before."""
    rollouts: int
    asked: int
    """Groups that came back."""
    fresh: int
    """Of prompts that were asked for the first time."""
    verdicts: tuple[int, ...]
    """Groups, by `Verdict`."""
    trained: int
    """Groups that were learned from; -1: not told."""
    accuracy: float
    """Sum over groups of the mean accuracy of their scored attempts."""
    scored: int
    """Groups with scored attempts."""
    rates: tuple[int, ...]
    """Of these, by mean accuracy: 0, 1/RATES, ... 1."""
    statuses: tuple[int, ...]
    """Prompts by `Status`, at the end."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Span":
        """From JSON, which has no tuples."""
        own: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
        return cls(**own)

    def before(self, later: "Span") -> "Span":
        """This one and the one behind it, together."""
        together = lambda mine, theirs: tuple(a + b for a, b in zip(mine, theirs, strict=True))  # noqa: E731
        return Span(
            step=self.step,
            rollouts=self.rollouts + later.rollouts,
            asked=self.asked + later.asked,
            fresh=self.fresh + later.fresh,
            verdicts=together(self.verdicts, later.verdicts),
            trained=-1 if -1 in (self.trained, later.trained) else self.trained + later.trained,
            accuracy=self.accuracy + later.accuracy,
            scored=self.scored + later.scored,
            rates=together(self.rates, later.rates),
            statuses=later.statuses,
        )


def mixed_probability(a: NDArray, b: NDArray, attempts: int) -> NDArray[np.float64]:
    """Expected probability that attempts are neither all right nor all wrong, under beliefs Beta(a, b)."""
    same = betaln(a, b)
    right, wrong = np.exp(betaln(a + attempts, b) - same), np.exp(betaln(a, b + attempts) - same)
    return np.clip(1 - right - wrong, 0, 1)


def expansion(z: float, most: float) -> float:
    """How many times more prompts to ask when a share z of the groups turns out useless."""
    return most if z >= 1 else min(most, 1 / (1 - z))


class _Queue:
    """The prompts of a lane in an order of chance: each once, or (endless) epoch after epoch."""

    def __init__(self, members: NDArray[np.int64], order: NDArray[np.int64], seed: tuple[int, ...], endless: bool):
        self.members, self.first, self.order, self.seed, self.endless = members, order, order, seed, endless
        self.epoch = self.cursor = 0
        self.returned: list[int] = []
        """Come before the rest of the order: skipped in it, or asked in vain."""

    @property
    def left(self) -> int:
        return len(self.returned) + len(self.order) - self.cursor

    def take(self, count: int, asked: Mapping[int, int]) -> list[int]:
        """The next ones that are not in `asked`; fewer where there are no more."""
        seen = set(asked)
        most = len(self.members) - int(np.isin(self.members, list(seen)).sum()) if self.endless else self.left
        taken, skipped = [], []
        while len(taken) < min(count, most) and (self.left or self.endless):
            if self.returned:
                prompt = self.returned.pop(0)
            elif self.cursor < len(self.order):
                prompt = int(self.order[self.cursor])
                self.cursor += 1
            else:
                self.turn(self.epoch + 1)
                continue
            (skipped if prompt in seen else taken).append(prompt)
            seen.add(prompt)
        self.returned = skipped + self.returned
        return taken

    def turn(self, epoch: int) -> None:
        """An epoch begins."""
        self.epoch, self.cursor = epoch, 0
        chance = np.random.Generator(np.random.PCG64([*self.seed, epoch]))
        self.order = chance.permutation(self.members) if epoch else self.first


class DifficultySampler:
    """Draws prompts, rollout after rollout: `pick`, `top_up` while useful groups are missing, `update`.

    Args:
        prompts: all there are.
        attempts: answers to each prompt.
        seed: of the run.
        keep_equal: groups whose attempts are alike are learned from, too, so that none is asked in their place.

    Raises:
        DataError: no prompts, two with one id, a tier that the settings don't know.
        UserError: quotas of other domains than the prompts'.
    """

    def __init__(
        self,
        prompts: Sequence[PromptInfo],
        config: SamplerConfig,
        *,
        attempts: int,
        seed: int,
        keep_equal: bool = False,
    ):
        _check_prompts(prompts, config)
        self.config, self.attempts, self.seed = config, attempts, seed
        self._useful = {one for one in Verdict if one is not Verdict.UNSCORED} if keep_equal else {Verdict.MIXED}
        self.step = 0
        """Rollouts done."""
        self.next_group = 0
        self.prompts = tuple(prompts)
        count = len(prompts)

        tiers = np.array([-1 if prompt.tier is None else prompt.tier for prompt in prompts])
        # The last entry is found by tier -1: prompts without one.
        self._prior = np.array([*config.tier_prior, config.prior])[tiers]
        self._gain = np.array([*(config.tier_gain or [1.0] * len(config.tier_prior)), 1.0])[tiers]

        # Uniform draws know no domains, unless they shall have shares.
        apart = config.kind is SamplerKind.difficulty or bool(config.quotas)
        domains = [prompt.domain if apart else "" for prompt in prompts]
        self.lanes = sorted(set(domains))
        number = {lane: n for n, lane in enumerate(self.lanes)}
        self._lane = np.array([number[domain] for domain in domains])
        self._members = [np.flatnonzero(self._lane == n) for n in range(len(self.lanes))]

        self.successes, self.trials = np.zeros(count), np.zeros(count)
        self.last, self.visits, self.wake, self.streak, self.rests, self.rests_right = np.zeros((6, count), np.int64)
        self.status, self.verdict = np.zeros((2, count), np.int8)
        """The verdict is that of the last group; the streak, how many in a row had it since the last rest."""

        self.z: list[float | None] = [None] * len(self.lanes)
        """Smoothed share of useless groups, of each lane; None before the first."""
        self._credit = [0.0] * len(self.lanes)
        self._rounds: list[list[Ticket]] = []
        """Of the rollout that is going on."""
        self._issued = 0
        """Rounds of these that were handed out; fewer after the state was loaded."""
        self._late: dict[int, tuple[int, int]] = {}
        """Groups of earlier rollouts that are still out: prompt, rollout."""
        self.history: list[Span] = []
        self._span = 1
        """Rollouts in an entry of the history."""
        self._start(seed)

    def _start(self, seed: int) -> None:
        self.seed = seed
        self._rng = np.random.Generator(np.random.PCG64(seed))
        endless = self.config.kind is SamplerKind.uniform
        self._queues = [
            _Queue(members, self._rng.permutation(members), (seed, lane), endless)
            for lane, members in enumerate(self._members)
        ]

    # ------------------------------------------------------------------------------------------------------- drawing

    def pick(self, need: int) -> list[Ticket]:
        """The first round of a rollout.

        Args:
            need: groups still wanted, beyond finished ones that wait.
        """
        if self._issued:
            raise RuntimeError("pick begins a rollout, and one is going on: top_up asks more, update ends it")
        return self._issue(need)

    def top_up(self, missing: int) -> list[Ticket]:
        """One more round. It repeats a prompt of this rollout only where there are no others.

        Args:
            missing: useful groups that the rounds before did not give.
        """
        if not self._issued:
            raise RuntimeError("top_up goes on with a rollout, and none has begun: pick begins it")
        return self._issue(missing)

    def _issue(self, need: int) -> list[Ticket]:
        if self._issued == len(self._rounds):
            prompts = self._draw(need) if need > 0 else []
            first = self.next_group
            self._rounds.append([Ticket(group=first + n, prompt=prompt) for n, prompt in enumerate(prompts)])
            self.next_group += len(prompts)
        self._issued += 1
        return list(self._rounds[self._issued - 1])

    def _draw(self, need: int) -> list[int]:
        resting = np.isin(self.status, RESTING)
        self.status[resting & (self.wake <= self.step)] = Status.ACTIVE
        asked: dict[int, int] = {}
        """How often in this rollout."""
        for ticket in (ticket for tickets in self._rounds for ticket in tickets):
            asked[ticket.prompt] = asked.get(ticket.prompt, 0) + 1

        drawn: list[int] = []
        waiting = [self._waiting(lane, asked) for lane in range(len(self.lanes))]
        shares = self._shares(waiting)
        wanted = [share * need * self.oversampling(lane, share * need) for lane, share in enumerate(shares)]
        missing = math.ceil(sum(wanted) - 1e-9)
        drawn += self._audits(missing, asked)
        missing -= len(drawn)
        while missing > 0 and sum(wanted) > 0:
            slots = self._slots(missing, wanted)
            lanes = [
                iter(self._choose(lane, slots.count(lane), asked) if lane in slots else [])
                for lane in range(len(self.lanes))
            ]
            found = [prompt for lane in slots if (prompt := next(lanes[lane], None)) is not None]
            asked.update(dict.fromkeys(found, 1))
            drawn += found
            missing -= len(found)
            # What a lane could not give, others do.
            waiting = [self._waiting(lane, asked) for lane in range(len(self.lanes))]
            wanted = self._shares(waiting)
        return drawn + self._others(need - len(drawn), asked)

    def oversampling(self, lane: int, need: float) -> float:
        """How many times more prompts of a lane are asked than groups are needed."""
        z, most = self.z[lane] or 0.0, self.config.max_expansion
        times = expansion(z, most)
        if self.config.margin and need > 0:
            times += self.config.margin * math.sqrt(times * z * (1 - z) / need)
        return min(times, most)

    def _waiting(self, lane: int, asked: Mapping[int, int]) -> int:
        """Prompts of a lane that may be drawn."""
        members = self._members[lane]
        if self.config.kind is SamplerKind.uniform:
            return len(members) - sum(self._lane[prompt] == lane for prompt in asked)
        active = sum(self._lane[prompt] == lane and self.status[prompt] == Status.ACTIVE for prompt in asked)
        return self._queues[lane].left + int((self.status[members] == Status.ACTIVE).sum()) - int(active)

    def _shares(self, waiting: Sequence[int]) -> list[float]:
        """What part of the groups each lane gives; 0 for one that has no more."""
        quotas = self.config.quotas
        wish = [quotas[lane] * (n > 0) if quotas else float(n) for lane, n in zip(self.lanes, waiting, strict=True)]
        return [one / (sum(wish) or 1.0) for one in wish]

    def _slots(self, count: int, wanted: Sequence[float]) -> list[int]:
        """Lanes in turn, evenly mixed: any stretch holds about as many of each as its share is, over all rollouts.

        Groups are trained in this order until there are enough, so no domain may stand behind the others.
        """
        total, slots = sum(wanted), []
        for _ in range(count):
            self._credit = [credit + one / total for credit, one in zip(self._credit, wanted, strict=True)]
            lane = max((n for n, one in enumerate(wanted) if one > 0), key=self._credit.__getitem__)
            self._credit[lane] -= 1
            slots.append(lane)
        return slots

    def _choose(self, lane: int, count: int, asked: Mapping[int, int]) -> list[int]:
        """Prompts of one lane, each once."""
        queue, config = self._queues[lane], self.config
        if config.kind is SamplerKind.uniform:
            return queue.take(count, asked)
        members = self._members[lane]
        free = np.ones(len(members), bool)
        if asked:
            free[np.isin(members, list(asked))] = False
        active = members[(self.status[members] == Status.ACTIVE) & free]
        num_fresh = min(max(math.ceil(config.fresh * count), count - len(active)), queue.left)
        fresh = queue.take(num_fresh, {})
        num_active = min(count - len(fresh), len(active))
        drawn: list[int] = []
        if num_active > 0:
            with np.errstate(divide="ignore"):  # log(0) comes once in 2^53 times, and last
                keys = np.log(self._rng.random(len(active))) / self.probabilities(active)
            drawn = active[np.argsort(-keys)[:num_active]].tolist()
        return fresh + drawn

    def _audits(self, count: int, asked: dict[int, int]) -> list[int]:
        """A few of the retired prompts, whatever their domain."""
        free = self._allowed()
        free[list(asked)] = False
        retired = np.flatnonzero((self.status == Status.RETIRED) & free)
        if not len(retired):
            return []
        num = min(int(self._rng.binomial(count, self.config.audit)), len(retired))
        audits = self._rng.choice(retired, num, replace=False).tolist()
        asked.update(dict.fromkeys(audits, 1))
        return audits

    def _allowed(self) -> NDArray[np.bool_]:
        """Prompts of domains that have a quota."""
        quotas = self.config.quotas
        return np.array([not quotas or quotas[lane] > 0 for lane in self.lanes])[self._lane]

    def _others(self, count: int, asked: dict[int, int]) -> list[int]:
        """When nobody else is left: whoever has rested longest, then the retired, then those asked in this rollout."""
        if count <= 0:
            return []
        free = self._allowed()
        allowed = np.flatnonzero(free)
        free[list(asked)] = False
        resting = np.flatnonzero(np.isin(self.status, RESTING) & free)
        resting = resting[np.argsort(self.wake[resting], kind="stable")][:count]
        retired = np.flatnonzero((self.status == Status.RETIRED) & free)
        retired = retired[np.argsort(self.last[retired], kind="stable")][: count - len(resting)]
        found = [*resting.tolist(), *retired.tolist()]
        asked.update(dict.fromkeys(found, 1))
        times = np.array([asked.get(prompt, 0) for prompt in allowed.tolist()])
        while len(found) < count:
            again = int(np.argmin(times))
            times[again] += 1
            found.append(int(allowed[again]))
        return found

    def beliefs(self, prompts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """a and b of the Beta beliefs about how often attempts at these prompts are right, as of now."""
        left = self.config.decay ** (self.step - self.last[prompts]).astype(float)
        successes, trials = self.successes[prompts] * left, self.trials[prompts] * left
        prior, strength = self._prior[prompts], self.config.prior_attempts
        return successes + strength * prior, (trials - successes) + strength * (1 - prior)

    def probabilities(self, prompts: NDArray[np.int64]) -> NDArray[np.float64]:
        """With which each of these is drawn first, if these are all that is active. Sums to 1."""
        weights = mixed_probability(*self.beliefs(prompts), self.attempts) * self._gain[prompts]
        total, floor = weights.sum(), self.config.floor
        if total <= 0:
            return np.full(len(prompts), 1 / len(prompts))
        return (1 - floor) * weights / total + floor / len(prompts)

    def attempt_seed(self, group: int, attempt: int) -> int:
        """Of the chance that an attempt is sampled with, in 0 ... 2^63 - 1. The same whoever samples it, and when."""
        name = f"{self.seed}/{group}/{attempt}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1

    # ------------------------------------------------------------------------------------------------------ learning

    def update(self, outcomes: Iterable[Outcome], *, trained: int | None = None) -> None:
        """The rollout is over: what came of all its groups, also of those that are not trained on.

        A group counts once, in whatever order and however often it is told. One that is missing may come with a later
        rollout, up to LATE of them.

        Args:
            trained: groups that are learned from, for the history; None leaves it open.

        Raises:
            ValueError: an outcome of a group that was never asked, or of another prompt.
        """
        out = {ticket.group: (ticket.prompt, self.step) for tickets in self._rounds for ticket in tickets}
        out |= self._late
        told: list[Outcome] = []
        for outcome in sorted(outcomes, key=lambda one: one.group):
            if outcome.group >= self.next_group:
                raise ValueError(f"group {outcome.group} was never asked; the last was {self.next_group - 1}")
            if outcome.group in out:
                prompt, _ = out.pop(outcome.group)
                if outcome.prompt != prompt:
                    raise ValueError(f"group {outcome.group} asked prompt {prompt}, not {outcome.prompt}")
                told.append(outcome)

        fresh = sum(int(self._learn(outcome)) for outcome in told)
        verdicts = [verdict(outcome) for outcome in told]
        for lane in range(len(self.lanes)):
            here = [v for v, one in zip(verdicts, told, strict=True) if self._lane[one.prompt] == lane]
            if here:
                now = 1 - sum(one in self._useful for one in here) / len(here)
                before, rho = self.z[lane], self.config.smoothing
                self.z[lane] = now if before is None else (1 - rho) * before + rho * now

        self._late = {group: one for group, one in out.items() if self.step - one[1] < LATE}
        for prompt in sorted({prompt for group, (prompt, _) in out.items() if group not in self._late}):
            if self.config.kind is SamplerKind.uniform or self.status[prompt] == Status.FRESH:
                self._queues[self._lane[prompt]].returned.append(prompt)
        self._rounds, self._issued = [], 0
        self._remember(told, verdicts, fresh, trained)
        self.step += 1

    def _learn(self, outcome: Outcome) -> bool:
        """Whether it was the first group of its prompt."""
        i, scored, found, config = outcome.prompt, outcome.scored, verdict(outcome), self.config
        left = config.decay ** int(self.step - self.last[i])
        self.successes[i] = self.successes[i] * left + sum(scored)
        self.trials[i] = self.trials[i] * left + len(scored)
        self.last[i] = self.step
        self.visits[i] += 1
        before = self.status[i]
        self.streak[i] = self.streak[i] + 1 if found == self.verdict[i] else 1
        self.verdict[i] = found
        if before == Status.RETIRED and found in (Verdict.RIGHT, Verdict.UNSCORED):
            return False
        self.status[i] = Status.ACTIVE
        rests = config.kind is SamplerKind.difficulty and found in RESTS
        if rests and self.streak[i] >= config.rest_after:
            self._rest(i, found)
        return before == Status.FRESH

    def _rest(self, i: int, why: Verdict) -> None:
        doublings = min(int(self.rests[i]), 30)
        self.wake[i] = self.step + min(self.config.rest * 2**doublings, self.config.max_rest)
        self.rests[i] += 1
        self.streak[i] = 0
        self.status[i] = RESTS[why]
        if why is Verdict.RIGHT:
            self.rests_right[i] += 1
            if self.config.retire_after is not None and self.rests_right[i] > self.config.retire_after:
                self.status[i] = Status.RETIRED

    def _remember(self, told: list[Outcome], verdicts: list[Verdict], fresh: int, trained: int | None) -> None:
        means = [sum(outcome.scored) / len(outcome.scored) for outcome in told if outcome.scored]
        now = Span(
            step=self.step,
            rollouts=1,
            asked=len(told),
            fresh=fresh,
            verdicts=tuple(verdicts.count(kind) for kind in Verdict),
            trained=-1 if trained is None else trained,
            accuracy=float(sum(means)),
            scored=len(means),
            rates=tuple(np.bincount(np.rint(np.array(means) * RATES).astype(int), minlength=RATES + 1).tolist()),
            statuses=tuple(np.bincount(self.status, minlength=len(Status)).tolist()),
        )
        if self.history and self.history[-1].rollouts < self._span:
            self.history[-1] = self.history[-1].before(now)
            return
        if len(self.history) == SPANS:
            pairs = zip(self.history[::2], self.history[1::2], strict=True)
            self.history = [first.before(second) for first, second in pairs]
            self._span *= 2
        self.history.append(now)

    # ------------------------------------------------------------------------------------------------------- telling

    def metrics(self) -> dict[str, float]:
        """Numbers for the trackers: prompts by status; effective_prompts, from how many a uniform draw would repeat
        them as often; belief, how often attempts are right, mean over all prompts that were asked; of each domain
        the smoothed share of useless groups, and how many times more are asked because of it.
        """
        counts = np.bincount(self.status, minlength=len(Status))
        out = {f"sampler_{status.name.lower()}": float(counts[status]) for status in Status}
        out["sampler_late"] = float(len(self._late))
        active = np.flatnonzero(self.status == Status.ACTIVE)
        if len(active):
            out["sampler_effective_prompts"] = 1 / float((self.probabilities(active) ** 2).sum())
        visited = np.flatnonzero(self.visits > 0)
        if len(visited):
            out["sampler_belief"] = float(self.means(visited).mean())
        behind = [f"_{name}" for name in plain_names(name or "other" for name in self.lanes)]
        for lane, z in enumerate(self.z):
            name = behind[lane] if len(self.lanes) > 1 else ""
            if z is not None:
                out[f"sampler_useless{name}"] = z
            out[f"sampler_expansion{name}"] = self.oversampling(lane, 0)
        return out

    def means(self, prompts: NDArray[np.int64]) -> NDArray[np.float64]:
        """How often attempts at these prompts are right, as far as we know."""
        a, b = self.beliefs(prompts)
        return a / (a + b)

    def pass_rates(self) -> tuple[int, ...]:
        """Prompts that were asked, by how often attempts are right now, as far as we know: BINS bins."""
        means = self.means(np.flatnonzero(self.visits > 0))
        return tuple(np.histogram(means, BINS, (0, 1))[0].tolist())

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything, for JSON. Arrays are compressed: 2.3 MB for 100,000 prompts that were all asked often."""
        return {
            "version": VERSION,
            "kind": self.config.kind.value,
            "seed": self.seed,
            "prompts": self._identity(),
            "step": self.step,
            "next_group": self.next_group,
            "chance": self._rng.bit_generator.state,
            "z": dict(zip(self.lanes, self.z, strict=True)),
            "credit": list(self._credit),
            "queues": [[queue.epoch, queue.cursor, list(queue.returned)] for queue in self._queues],
            "rounds": [[[ticket.group, ticket.prompt] for ticket in tickets] for tickets in self._rounds],
            "late": [[group, *one] for group, one in self._late.items()],
            "arrays": {name: _packed(getattr(self, name)) for name in ARRAYS},
            "span": self._span,
            "history": [span._asdict() for span in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called. A rollout that was going on begins anew: `pick` and `top_up` hand out
        the tickets again that they handed out before.

        Raises:
            DataError: other prompts, with what differs.
            UserError: another sampler.kind, or lanes.
        """
        if state["version"] != VERSION:
            raise UserError(
                f"the sampler's state has version {state['version']}, and this release reads {VERSION}. Go on with the "
                "release that wrote it, or start a new run from the trained weights."
            )
        kind = self.config.kind.value
        if state["kind"] != kind:
            raise UserError(
                f"sampler.kind is {kind}, and the run that goes on began with {state['kind']}, which leaves prompts in "
                f"another order. Set sampler.kind={state['kind']}, or start a new run from the trained weights."
            )
        self._check_identity(state["prompts"])
        if sorted(state["z"]) != self.lanes:
            raise UserError(
                "sampler.quotas was set when this run began and is not now, or the other way round; the order of "
                "sampler.kind=uniform depends on it. Set it as it was, or start a new run."
            )
        self._start(state["seed"])
        self._rng.bit_generator.state = state["chance"]
        self.step, self.next_group = state["step"], state["next_group"]
        self.z = [state["z"][lane] for lane in self.lanes]
        self._credit = list(state["credit"])
        for queue, (epoch, cursor, returned) in zip(self._queues, state["queues"], strict=True):
            queue.turn(epoch)
            queue.cursor, queue.returned = cursor, list(returned)
        self._rounds = [[Ticket(group=group, prompt=prompt) for group, prompt in one] for one in state["rounds"]]
        self._issued = 0
        self._late = {group: (prompt, step) for group, prompt, step in state["late"]}
        for name in ARRAYS:
            own = getattr(self, name)
            own[:] = _unpacked(state["arrays"][name], own)
        self._span = state["span"]
        self.history = [Span.of(span) for span in state["history"]]

    def _identity(self) -> dict[str, Any]:
        parts = [
            "\1".join(f"{prompt.id}\0{prompt.domain}\0{prompt.tier}" for prompt in self.prompts[chunk])
            for chunk in self._chunks()
        ]
        return {"count": len(self.prompts), "digests": [xxhash.xxh3_64_hexdigest(part.encode()) for part in parts]}

    def _chunks(self) -> list[slice]:
        size = -(-len(self.prompts) // CHUNKS)
        return [slice(at, min(at + size, len(self.prompts))) for at in range(0, len(self.prompts), size)]

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        mine = self._identity()
        if saved == mine:
            return
        way_out = "Go on with the data of the first start, or start a new run from the trained weights."
        if saved["count"] != mine["count"]:
            raise DataError(
                f"the run that goes on had {saved['count']} prompts and there are {mine['count']} now; what it knows "
                f"of each cannot be carried over. {way_out}"
            )
        part = next(n for n, (a, b) in enumerate(zip(saved["digests"], mine["digests"], strict=True)) if a != b)
        chunk = self._chunks()[part]
        first, last = self.prompts[chunk.start].id, self.prompts[chunk.stop - 1].id
        raise DataError(
            "the prompts are not those of the run that goes on: ids, order, domains or tiers differ, first among "
            f"prompts {chunk.start} to {chunk.stop - 1} (now {first!r} to {last!r}). {way_out}"
        )


ARRAYS = (
    "successes",
    "trials",
    "last",
    "visits",
    "wake",
    "verdict",
    "streak",
    "rests",
    "rests_right",
    "status",
)
"""Of the state, one entry a prompt."""


def _packed(array: NDArray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


def _unpacked(text: str, like: NDArray) -> NDArray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), like.dtype)


def _check_prompts(prompts: Sequence[PromptInfo], config: SamplerConfig) -> None:
    if not prompts:
        raise DataError("there are no prompts to ask; give records whose answers can be checked.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"two prompts have the id {prompt.id!r}; give each its own, by which it is known again.")
        seen.add(prompt.id)
        if prompt.tier is not None and not 0 <= prompt.tier < len(config.tier_prior):
            raise DataError(
                f"prompt {prompt.id!r} has tier {prompt.tier}; sampler.tier_prior knows tiers 0 to "
                f"{len(config.tier_prior) - 1}. Give it one of these, or extend sampler.tier_prior."
            )
    domains = sorted({prompt.domain for prompt in prompts})
    for name in config.quotas:
        if name not in domains:
            near = difflib.get_close_matches(name, domains, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"sampler.quotas names the domain {name}, and no prompt has it; there are {', '.join(domains)}.{hint}"
            )
    missing = [name for name in domains if config.quotas and name not in config.quotas]
    if missing:
        raise UserError(
            f"sampler.quotas says nothing of the domain {missing[0]!r}; give each a share, or 0 to leave it out."
        )
