"""Where the batches of reinforcement learning come from: prompts are asked, attempts judged, and what is worth learning
is laid out in rows.

    rollout 0                                              rollout 1
    pick ─► collect ─► accept ─► rows of update 0 1 2 3    pick ─► ...
              ▲  too few that differ?  │
              └──── another round ─────┘ surplus waits, for `rollout.max_lag` rollouts

All ranks run the same sampler on the same outcomes. Group g is asked, and learned from, by rank g modulo ranks; which
groups are accepted depends on their numbers alone, not on who finished first. So neither the number of ranks nor their
speed changes what is learned.

The rows of a rollout's first update have no `old_logprob_T`: the policy that sampled them is the one that learns. Those
of later updates get theirs now, before the first update, by the forward pass that training makes.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from data.encode import Example
from data.pack import filler, pack
from data.quarantine import Quarantine
from ernie_model.inference.agent import Agent
from ernie_model.inference.request import SamplingParams
from ernie_model.processor import Processor
from train.checkpoint import everyones, generator_state, set_generator_state
from train.config import UserError
from train.loop import Interrupted
from train.parallel.layout import Layout
from train.policy import Policy, on_device
from train.reinforcement import keep
from train.reinforcement.advantage import advantages
from train.reinforcement.collect import Asked, collect
from train.reinforcement.difficulty import DifficultySampler
from train.reinforcement.engines import RolloutEngine
from train.reinforcement.examples import encode_group, with_advantages
from train.reinforcement.groups import Group, Summary, Ticket
from train.reinforcement.prompts import Prompts
from train.reinforcement.scoring import RewardPool
from train.reinforcement.stopping import agreed, never
from train.rl_config import RLConfig

MAX_BLIND = 3
"""Rollouts in a row without one score that end a run: a reward's server may be away for a while."""
NAMED = 3
"""How many reasons an error names."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What came of asking, for whoever records it. All ranks have it."""

    number: int
    """From 0."""
    summaries: Sequence[Summary]
    """Of all groups that were asked, in the order of their numbers."""
    usable: AbstractSet[int]
    """Of these groups, those that could be learned from."""
    accepted: Sequence[int]
    """Groups that are learned from, those that waited in the queue included."""
    waiting: AbstractSet[int]
    """Groups of the queue, after it."""
    stale: int
    """Groups that were dropped from the queue before it: they had waited too long."""
    groups: Sequence[Group]
    """This rank's, attempts and all."""
    advantages: Mapping[int, Sequence[float]]
    """By accepted group, of each attempt."""
    held: Mapping[int, AbstractSet[int]]
    """Of this rank's accepted groups, the attempts that are in rows; others fit in none."""
    seconds: Mapping[str, float]
    """asking, scoring (what goes on when all is asked), encoding, old_logprobs, and weights: what `begin` and `end` of
    the engine took."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RolloutReport:
    """How far the source has come; the metrics are of the last rollout."""

    last: Mapping[str, float]
    rollouts: int
    asked: int
    learned: int

    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def line(self) -> str:
        rollouts, asked = f"{self.rollouts} rollout{'s' * (self.rollouts != 1)}", self.asked
        return f"{rollouts}, {asked} group{'s' * (asked != 1)} asked, {self.learned} learned from"


@dataclass(kw_only=True)
class _Finished:
    """A group of this rank that waits to be learned from."""

    summary: Summary
    rollout: int
    examples: list[tuple[Example, list[int]]] = field(default_factory=list)


class RolloutSource:
    """
    Args:
        sampler: the same on all ranks.
    """

    def __init__(self, prompts: Prompts, sampler: DifficultySampler, config: RLConfig, layout: Layout):
        self.prompts, self.sampler, self.config, self.layout = prompts, sampler, config, layout
        self.updates = 0
        """Drawn so far."""
        self.rollouts = self.asked = self.learned = 0
        self._blind = 0
        """Rollouts in a row, up to the last, of which no attempt could be scored."""
        self._idle: list[dict[str, int]] = []
        """Of the last rollouts, all in a row that gave nothing to learn, the groups that were asked, by kind."""
        self.told: Callable[[Rollout], None] = lambda rollout: None
        """Hears of every rollout, on all ranks."""
        self.quarantine = Quarantine(num_records=len(prompts))
        """Of the run. Every rank adds what any of them finds."""
        self.stop: Callable[[], bool] = never
        """Is the rollout under way to be dropped, because the process ends?"""
        self._stale = 0
        """Groups that the queue has lost since the last rollout."""
        self._pending: list[list[PackedBatch]] = []
        """Rows of this rank for the updates that are left of the last rollout."""
        self._ready: list[_Finished] = []
        """This rank's groups of the queue."""
        self._waiting: list[tuple[int, int]] = []
        """(group, rollout) of the queue's groups, on all ranks, oldest first."""
        self._summaries: dict[int, Summary] = {}
        """Of the queue's groups, on all ranks."""
        self._metrics: dict[str, float] = {}
        self._flight: _Flight | None = None
        """The next rollout, when it is sampled ahead."""

    def attach(
        self,
        *,
        engine: RolloutEngine,
        agents: Callable[[RolloutEngine], Mapping[tuple[str, ...], Agent]],
        pool: RewardPool,
        processor: Processor,
        params: SamplingParams,
        policy: Policy,
        accelerator: Accelerator,
        runner: asyncio.Runner,
        steps: int,
    ) -> None:
        """Who samples, judges and learns. Before the first `next_step`.

        Args:
            steps: updates of the whole run; nothing is sampled ahead of its end.
            runner: of the one event loop that all rollouts run in; tools and workers belong to it.
        """
        self.engine, self.agents, self.pool, self.processor, self.params = engine, agents, pool, processor, params
        self.policy, self.accelerator, self.runner, self.steps = policy, accelerator, runner, steps

    # -------------------------------------------------------------------------------------------------- as a source

    def next_step(self) -> list[PackedBatch]:
        """Raises Interrupted: a rollout was due, and `stop` said so. It is asked again, with the same tickets and
        seeds, by whoever goes on from what is saved now (`DifficultySampler.load_state_dict`)."""
        if not self._pending:
            generators = generator_state()
            try:
                self._roll_out()
            except Interrupted:
                set_generator_state(generators)  # a reward or a tool in this process may have drawn from them
                raise
        self.updates += 1
        return self._pending.pop(0)

    def describe(self) -> str:
        return f"{len(self.prompts)} prompts of {self.prompts.name}"

    def count_steps(self, epochs: float) -> int:
        """Updates after which as many groups were learned from as `epochs` times all prompts."""
        rollouts = -(-int(epochs * len(self.prompts)) // self.config.rollout.groups)
        return max(1, rollouts) * self.config.rollout.updates

    @property
    def gives_up(self) -> str | None:
        """Why there is no use in going on, on all ranks alike."""
        most = self.config.rollout.max_idle
        if most is None or len(self._idle) < most:
            return None
        kinds = sum((Counter(of_rollout) for of_rollout in self._idle), Counter[str]())
        found = ", ".join(f"{kinds[kind]} {IDLE[kind]}" for kind in KINDS if kinds[kind])
        return (
            f"the last {len(self._idle)} rollouts gave nothing to learn, and rollout.max_idle allows {most}. Of "
            f"{kinds.total()} groups {found}. All right: these prompts have nothing left to teach, harder ones may. "
            "All wrong: easier prompts, a better start (`ernie sft`) or more rollout.attempts. The same command with a "
            "larger rollout.max_idle goes on, with null however long it takes."
        )

    @property
    def report(self) -> RolloutReport:
        return RolloutReport(last=self._metrics, rollouts=self.rollouts, asked=self.asked, learned=self.learned)

    def close(self) -> None:
        """The run is over, or was broken off: what is being sampled is given up."""
        if self._flight is not None:
            self._flight.give_up()
        self.pool.close()
        self.engine.close()
        self.runner.close()

    # ---------------------------------------------------------------------------------------------------- a rollout

    def _roll_out(self) -> None:
        config, clock = self.config.rollout, _Clock()
        flight = self._flight
        clock.seconds["weights"] = 0.0 if flight is None else flight.begin_s
        if flight is None:
            flight = self._depart()
            clock.lap("weights")
        need, tickets = flight.need, flight.tickets
        made: list[Group] = []
        summaries: list[Summary] = []
        rounds = 0
        while tickets:
            rounds += 1
            asking = flight.land if rounds == 1 else partial(self._ask, tickets, flight)
            try:
                groups = agreed(asking)
            except Interrupted:
                self.engine.end()
                raise
            self._flight = None
            made += groups
            own = [group.summary(self._domain(group.ticket.prompt)) for group in groups]
            summaries += [one for of_rank in everyones(own) for one in of_rank]
            usable = sum(self._usable(one) for one in summaries)
            if usable >= need or rounds == config.max_rounds:
                break
            tickets = self.sampler.top_up(need - usable)
        clock.lap("asking")
        self.engine.end()
        clock.lap("weights")
        clock.seconds["scoring"] = min(flight.scoring_s, clock.seconds["asking"])
        clock.seconds["asking"] -= clock.seconds["scoring"]
        summaries.sort(key=lambda one: one.outcome.group)
        self._check_scored(summaries)
        for one in summaries:
            if one.refused is not None:
                self.quarantine.add(one.refused)
        accepted = self._accept(made, summaries)
        self.sampler.update([one.outcome for one in summaries], trained=len(accepted))
        worth = self._advantages(accepted)
        updates = [accepted[number :: config.updates] for number in range(config.updates)]
        self._pending = [self._rows(groups, worth) for groups in updates]
        clock.lap("encoding")
        held = {
            one.summary.outcome.group: {attempt for _, held in one.examples for attempt in held}
            for one in self._ready
            if one.summary.outcome.group in worth
        }
        self._count_idle(summaries)
        taken = {group: self._summaries.pop(group) for group in accepted}
        self._ready = [one for one in self._ready if one.summary.outcome.group not in taken]
        self._add_old_logprobs()
        clock.lap("old_logprobs")
        self.asked += len(summaries)
        self.learned += len(accepted)
        self._metrics = rollout_metrics(summaries, list(taken.values()), rounds, clock.seconds, self.rollouts)
        self._metrics |= self.sampler.metrics() | self.engine.metrics()
        self._metrics["rollout_queue"] = float(len(self._waiting))
        self._metrics["rollout_lag"] = sum(self.updates - one.version for one in taken.values()) / max(len(taken), 1)
        self.told(
            Rollout(
                number=self.rollouts,
                summaries=summaries,
                usable={one.outcome.group for one in summaries if self._usable(one)},
                accepted=accepted,
                waiting={group for group, _ in self._waiting},
                stale=self._stale,
                groups=made,
                advantages=worth,
                held=held,
                seconds=clock.seconds,
                metrics=self._metrics,
            )
        )
        self.rollouts += 1
        self._stale = 0
        if config.ahead and self.updates + config.updates < self.steps:
            self._depart(ahead=True)

    def _depart(self, *, ahead: bool = False) -> "_Flight":
        """The first round of a rollout begins; `ahead`, in a thread, while the policy learns from the one before."""
        self._drop_stale()
        need, begin = self.config.rollout.groups - len(self._waiting), time.perf_counter()
        tickets = self.sampler.pick(need) if need > 0 else []
        self.engine.begin(self.updates)
        agents = self.agents(self.engine)
        flight = _Flight(need=need, tickets=tickets, version=self.updates, agents=agents)
        flight.begin_s = time.perf_counter() - begin
        if ahead:
            self._flight = flight  # first: whoever breaks the run off gives it up
        flight.depart(lambda: self._collect(tickets, flight), self.runner, ahead=ahead)
        return flight

    def _ask(self, tickets: Sequence[Ticket], flight: "_Flight") -> list[Group]:
        return self.runner.run(self._collect(tickets, flight))

    def settle(self) -> None:
        """Wait until nothing samples: the engine is free to answer other questions."""
        if self._flight is not None:
            self._flight.settle()

    async def _collect(self, tickets: Sequence[Ticket], flight: "_Flight") -> list[Group]:
        mine = [one for one in tickets if one.group % self.layout.data_world == self.layout.data_rank]
        attempts = range(self.config.rollout.attempts)
        asked = [
            Asked(
                ticket=one,
                question=self.prompts.questions[one.prompt],
                seeds=[self.sampler.attempt_seed(one.group, attempt) for attempt in attempts],
            )
            for one in mine
        ]
        return await collect(
            asked,
            self.engine,
            flight.agents,
            self.pool,
            self.processor,
            self.params,
            version=flight.version,
            stop=self.stop,
            scored=flight.scored,
        )

    def _check_scored(self, summaries: Sequence[Summary]) -> None:
        """Raises UserError, on all ranks: no attempt of the run's first rollout could be scored, or of the last few."""
        attempts = [attempt for one in summaries for attempt in one.attempts]
        scored = any(attempt.worth is not None for attempt in attempts)
        if not attempts:  # all of it is in the queue
            return
        self._blind = 0 if scored else self._blind + 1
        if self._blind and (self.rollouts == 0 or self._blind >= MAX_BLIND):
            reasons = Counter(attempt.problem or f"the attempt ended as {attempt.status}" for attempt in attempts)
            told = "\n  ".join(f"{count} x {reason}" for reason, count in reasons.most_common(NAMED))
            when = "in the first rollout" if self.rollouts == 0 else f"in {self._blind} rollouts, one after the other"
            raise UserError(
                f"none of the {len(attempts)} attempts could be scored {when}, so there is nothing to learn from:\n  "
                f"{told}\nPut that right, and start again. `ernie doctor rl ...` looks at every prompt beforehand."
            )

    def _count_idle(self, summaries: Sequence[Summary]) -> None:
        rows = [row.advantage_T for rows in self._pending for row in rows if row.advantage_T is not None]
        if any(everyones(any(bool(advantage_T.any()) for advantage_T in rows))):
            self._idle = []
        else:
            self._idle.append(dict(Counter(kind_of(one) for one in summaries)))

    def _domain(self, prompt: int) -> str:
        question = self.prompts.questions[prompt]
        return question.domain or question.task

    def _usable(self, summary: Summary) -> bool:
        outcome = summary.outcome
        return outcome.valid if self.config.rollout.keep_equal else outcome.trainable

    def _drop_stale(self) -> None:
        """Groups that have waited for too long."""
        oldest = self.rollouts - self.config.rollout.max_lag
        stale = {group for group, rollout in self._waiting if rollout < oldest}
        self._waiting = [one for one in self._waiting if one[0] not in stale]
        self._ready = [one for one in self._ready if one.summary.outcome.group not in stale]
        for group in stale:
            del self._summaries[group]
        self._stale += len(stale)

    def _accept(self, made: Sequence[Group], summaries: Sequence[Summary]) -> list[int]:
        """The groups that this rollout's updates learn from, in the order of their numbers; others wait."""
        config = self.config.rollout
        for one in summaries:
            if self._usable(one):
                self._waiting.append((one.outcome.group, self.rollouts))
                self._summaries[one.outcome.group] = one
        for group in made:
            if group.ticket.group in self._summaries:
                self._ready.append(self._finished(group))
        accepted = [group for group, _ in self._waiting[: config.groups]]
        self._waiting = self._waiting[config.groups :] if config.max_lag else []
        kept = {group for group, _ in self._waiting} | set(accepted)
        self._summaries = {group: one for group, one in self._summaries.items() if group in kept}
        self._ready = [one for one in self._ready if one.summary.outcome.group in kept]
        return accepted

    def _finished(self, group: Group) -> _Finished:
        question = self.prompts.questions[group.ticket.prompt]
        summary = self._summaries[group.ticket.group]
        wrote = [i for i, one in enumerate(group.attempts) if one.episode.num_sampled]
        learned = [self._learns(summary, i) for i in wrote]
        examples = encode_group(
            [group.attempts[i].episode for i in wrote],
            learned,
            self.policy.model.config,
            id=question.id,
            dataset=question.task,
            max_tokens=self.config.data.max_tokens,
            max_patches=self.config.data.max_patches,
        )
        return _Finished(
            summary=summary,
            rollout=self.rollouts,
            examples=[(example, [wrote[i] for i in held]) for example, held in examples],
        )

    def _learns(self, summary: Summary, attempt: int) -> bool:
        one = summary.attempts[attempt]
        cut = one.truncated and self.config.rollout.mask_truncated
        return one.worth is not None and not one.failed and not cut

    def _advantages(self, accepted: Sequence[int]) -> dict[int, list[float]]:
        summaries = [self._summaries[group] for group in accepted]
        values = advantages(
            [[one.worth for one in summary.attempts] for summary in summaries],
            self.config.objective,
            parts=[[one.parts for one in summary.attempts] for summary in summaries],
            weights=self.config.rewards.weights,
            domains=[summary.domain for summary in summaries],
        )
        return dict(zip(accepted, values, strict=True))

    def _rows(self, groups: Iterable[int], worth: Mapping[int, Sequence[float]]) -> list[PackedBatch]:
        ready = {one.summary.outcome.group: one for one in self._ready}
        examples = [
            with_advantages(example, [worth[group][i] for i in held], waited=self.rollouts - ready[group].rollout)
            for group in groups
            if group in ready
            for example, held in ready[group].examples
        ]
        if not examples:
            return [filler(self.processor.begin_id)]
        return pack(examples, max_tokens=self.config.data.max_tokens, max_patches=self.config.data.max_patches)

    @torch.no_grad()
    def _add_old_logprobs(self) -> None:
        """To the rows of all updates but the first. Where a forward takes all ranks, all make equally many."""
        modes = [(module, module.training) for module in self.policy.modules()]
        self.policy.eval()
        for number, rows in enumerate(self._pending[1:], 1):
            most = max(everyones(len(rows))) if self.layout.joint else len(rows)
            media = any(everyones(any(row.grids for row in rows))) if self.layout.joint else False
            for place in range(most):
                row = rows[place] if place < len(rows) else filler(0)
                batch, row_R = on_device(row, self.accelerator.device)
                old_T = self.policy(batch, row_R, join=self.layout.lockstep or media).logprob_T
                if place < len(rows):
                    self._pending[number][place] = replace(row, old_logprob_T=old_T.cpu())
        for module, training in modes:
            module.training = training

    # --------------------------------------------------------------------------------------------------- saving it

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the tensors that it speaks of are `files`. All ranks ask together."""
        return {
            "prompts": self.prompts.fingerprint,
            "updates": self.updates,
            "counts": [self.rollouts, self.asked, self.learned],
            "blind": self._blind,
            "idle": self._idle,
            "sampler": self.sampler.state_dict(),
            "waiting": self._waiting,
            "stale": self._stale,
            "quarantine": self.quarantine.state_dict(),
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError: other prompts, or other right answers, than those that the run began with."""
        if state["prompts"] != self.prompts.fingerprint:
            raise UserError(
                "cannot resume: the prompts, their right answers or rewards (data.*) are others than in the "
                "interrupted run. Restore them, or start a new run in another run.folder."
            )
        self.updates = state["updates"]
        self.rollouts, self.asked, self.learned = state["counts"]
        self._blind, self._idle = state["blind"], state["idle"]
        self.sampler.load_state_dict(state["sampler"])
        self._waiting = [(group, rollout) for group, rollout in state["waiting"]]
        self._stale = state["stale"]
        self.quarantine.load_state_dict(state["quarantine"])
        self._metrics = state["metrics"]

    def files(self) -> dict[str, Tensor]:
        """Rows that are still to be learned from, and groups that wait: this rank's."""
        ready = [keep.Kept(one.summary, one.rollout, one.examples) for one in self._ready]
        return keep.to_tensors(self._pending, ready)

    def load_files(self, files: Sequence[dict[str, Tensor]]) -> None:
        """What the ranks of the interrupted run kept, dealt out to those that there are now."""
        rank, world = self.layout.data_rank, self.layout.data_world
        rows_of: list[list[PackedBatch]] = []
        self._ready, self._summaries = [], {}
        for of_rank in files:
            pending, ready = keep.from_tensors(of_rank)
            rows_of += [[] for _ in range(len(pending) - len(rows_of))]
            for number, rows in enumerate(pending):
                rows_of[number] += rows
            for one in ready:
                group = one.summary.outcome.group
                self._summaries[group] = one.summary
                if group % world == rank:
                    self._ready.append(_Finished(summary=one.summary, rollout=one.rollout, examples=one.examples))
        same = len(files) == world
        if same:
            self._pending = keep.from_tensors(files[rank])[0]
        else:
            self._pending = [rows[rank::world] for rows in rows_of]


@dataclass(kw_only=True)
class _Flight:
    """The first round of a rollout, being asked."""

    need: int
    tickets: list[Ticket]
    version: int
    agents: Mapping[tuple[str, ...], Agent]
    begin_s: float = 0.0
    scoring_s: float = 0.0

    def __post_init__(self):
        self._flies = False
        self._landed = threading.Event()
        """Waited for in place of the thread: Ctrl-C while `Thread.join` waits makes older Pythons (3.11) believe that
        the thread has ended."""
        self._task: asyncio.Task[Any] | None = None
        self._given_up = False
        self._groups: list[Group] = []
        self._error: BaseException | None = None

    def scored(self, seconds: float) -> None:
        self.scoring_s += seconds

    def depart(
        self, asking: Callable[[], Coroutine[Any, Any, list[Group]]], runner: asyncio.Runner, *, ahead: bool
    ) -> None:
        self._asking, self._runner = asking, runner
        if ahead and self.tickets:
            runner.get_loop()  # made here: two threads must not
            self._flies = True
            threading.Thread(target=self._fly, name="rollout ahead").start()

    def _fly(self) -> None:
        try:
            self._groups = self._runner.run(self._fly_on())
        except BaseException as error:
            self._error = error
        finally:
            self._landed.set()

    async def _fly_on(self) -> list[Group]:
        self._task = asyncio.current_task()
        if self._given_up:
            raise asyncio.CancelledError
        return await self._asking()

    def give_up(self) -> None:
        """Nobody waits for it any longer. Between two steps of the engine it ends."""
        self._given_up = True
        if self._task is not None:
            self._runner.get_loop().call_soon_threadsafe(self._task.cancel)
        self.settle()

    def settle(self) -> None:
        if self._flies:
            self._landed.wait()

    def land(self) -> list[Group]:
        """Its groups; raises what asking raised."""
        if not self._flies:
            return self._runner.run(self._asking())
        self.settle()
        if self._error is not None:
            raise self._error
        return self._groups


class _Clock:
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._begin
        self._begin = now


def rollout_metrics(
    asked: Sequence[Summary],
    learned: Sequence[Summary],
    rounds: int,
    seconds: Mapping[str, float],
    rollout: int,
) -> dict[str, float]:
    """Numbers of one rollout.

    reward, accuracy           means over all attempts that could be scored; accuracy_DOMAIN where there are several
    reward_NAME                of each part
    groups_*                   asked, and of them: mixed (attempts differ), right, wrong (all alike), equal (alike, in
                               between), unscored; learned
    attempts_STATUS            share of the attempts that ended so
    tokens_mean, tokens_right, tokens_wrong   sampled per attempt
    tool_use, tool_success     share of the attempts that call a tool; of calls that worked
    seconds_*                  where the rollout's time went
    """
    attempts = [attempt for one in asked for attempt in one.attempts]
    metrics: dict[str, float] = {"rollout": float(rollout), "rollout_rounds": float(rounds)}
    metrics |= {f"seconds_{name}": value for name, value in seconds.items()}
    metrics["groups_asked"], metrics["groups_learned"] = float(len(asked)), float(len(learned))
    if not attempts:
        return metrics

    def mean(name: str, values: Sequence[float]) -> None:
        if values:
            metrics[name] = sum(values) / len(values)

    kinds = Counter(kind_of(one) for one in asked)
    for kind in KINDS:
        metrics[f"groups_{kind}"] = kinds[kind] / len(asked)
    mean("reward", [one.worth for one in attempts if one.worth is not None])
    mean("accuracy", [one.accuracy for one in attempts if one.accuracy is not None])
    domains = sorted({one.domain for one in asked})
    if len(domains) > 1:
        for domain in domains:
            own = [a.accuracy for one in asked if one.domain == domain for a in one.attempts if a.accuracy is not None]
            mean(f"accuracy_{domain}", own)
    for name in sorted({name for one in attempts for name in one.parts}):
        mean(f"reward_{name}", [value for one in attempts if (value := one.parts.get(name)) is not None])
    statuses = Counter(one.status for one in attempts)
    for status, count in sorted(statuses.items()):
        metrics[f"attempts_{status}"] = count / len(attempts)
    mean("tokens_mean", [one.tokens for one in attempts])
    mean("tokens_right", [one.tokens for one in attempts if one.accuracy is not None and one.accuracy >= 1])
    mean("tokens_wrong", [one.tokens for one in attempts if one.accuracy is not None and one.accuracy < 1])
    mean("tool_use", [float(one.calls > 0) for one in attempts])
    calls = sum(one.calls for one in attempts)
    if calls:
        metrics["tool_success"] = 1 - sum(one.failed_calls for one in attempts) / calls
    sampled, trained = (sum(a.tokens for one in part for a in one.attempts) for part in (asked, learned))
    if trained:
        metrics["tokens_sampled_per_learned"] = sampled / trained
    return metrics


KINDS = ("mixed", "right", "wrong", "equal", "unscored")
IDLE = {
    "mixed": "differ, but in nothing that was learned from",
    "right": "are all right",
    "wrong": "are all wrong",
    "equal": "are all alike, in between",
    "unscored": "could not be scored",
}
"""What groups that give nothing to learn are called."""


def kind_of(summary: Summary) -> str:
    """What a group's attempts are: see `rollout_metrics`."""
    outcome = summary.outcome
    if not outcome.valid:
        return "unscored"
    if outcome.trainable:
        return "mixed"
    value = outcome.scored[0]
    return "right" if value >= 1 else "wrong" if value <= 0 else "equal"
