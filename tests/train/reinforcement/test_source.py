"""Rollouts of made-up attempts: what is learned from, in which update, by which weights it was sampled, and what a run
that was interrupted still knows."""

import asyncio
import json
import math
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ernie_model.config import ErnieConfig
from tests.test_configs import load
from tests.train.reinforcement.asked import PROCESSOR, attempt, question
from train.config import UserError
from train.loop import Interrupted
from train.reinforcement import source
from train.reinforcement.collect import Asked
from train.reinforcement.difficulty import DifficultySampler
from train.reinforcement.groups import Group
from train.reinforcement.prompts import Prompts
from train.reinforcement.source import MAX_BLIND, RolloutSource
from train.rl_config import RLConfig

QUICK = ("data=files", "data.path=-", "run.steps=8", "rollout.groups=4", "rollout.attempts=2", "rollout.updates=2")
World = Callable[[int, int], Sequence[float | None]]
"""(group, weights' version) -> what its two attempts are worth."""


def mixed(group: int, version: int) -> Sequence[float | None]:
    return 1.0, 0.0


def right(group: int, version: int) -> Sequence[float | None]:
    return 1.0, 1.0


def unscored(group: int, version: int) -> Sequence[float | None]:
    return None, None


class Engine:
    """Whose attempts are made up. It says when it began, and with which weights."""

    def __init__(self, world: World, gate: threading.Event | None):
        self.world, self.gate = world, gate
        self.begun: list[int] = []
        self.busy = False
        self.groups: list[Group] = []

    async def collect(self, asked: Sequence[Asked], version: int) -> list[Group]:
        if self.gate is not None:
            assert await asyncio.to_thread(self.gate.wait, 20), "sampling goes on beside learning"
        made = []
        for one in asked:
            attempts = tuple(attempt("7", total) for total in self.world(one.ticket.group, version))
            made.append(Group(ticket=one.ticket, version=version, attempts=attempts))
        self.groups += made
        return made

    def begin(self, version: int) -> None:
        assert not self.busy
        self.busy = True
        self.begun.append(version)

    def end(self) -> None:
        assert self.busy
        self.busy = False

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Policy:
    """Whose log-probabilities are minus the number of updates that were done when they were asked for."""

    def __init__(self, config: ErnieConfig):
        self.model = SimpleNamespace(config=config)
        self.source: RolloutSource

    def modules(self) -> list[Any]:
        return []

    def eval(self) -> None:
        pass

    def __call__(self, batch: Any, row_R: Any, join: bool) -> Any:
        return SimpleNamespace(logprob_T=torch.full((batch.num_tokens,), -float(self.source.updates)))


class Made:
    """A source over a made-up world.

    Args:
        gate: sampling waits for it.
    """

    def __init__(self, make: Callable[..., "Made"], world: World, *settings: str, gate: threading.Event | None = None):
        self.make = make
        config = load(*QUICK, *settings, entry="rl")
        assert isinstance(config, RLConfig)
        self.engine, policy = Engine(world, gate), Policy(PROCESSOR.config)
        prompts = Prompts([question(number) for number in range(400)], "made")
        sampler = DifficultySampler(
            prompts.infos, config.sampler, attempts=2, seed=0, keep_equal=config.rollout.keep_equal
        )
        layout: Any = SimpleNamespace(data_rank=0, data_world=1, joint=False, lockstep=False)
        self.source = policy.source = RolloutSource(prompts, sampler, config, layout)
        self.rollouts: list[source.Rollout] = []
        self.source.told = self.rollouts.append
        keys: dict[str, Any] = dict(engine=self.engine, agents=lambda engine: {}, pool=self.engine, policy=policy)
        keys |= dict(processor=PROCESSOR, params=None, runner=asyncio.Runner(), steps=config.run.steps)
        self.source.attach(accelerator=SimpleNamespace(device=torch.device("cpu")), **keys)  # type: ignore[arg-type]

    def steps(self, count: int) -> list[list[Any]]:
        return [self.source.next_step() for _ in range(count)]

    def resumed(self, world: World, *settings: str) -> "Made":
        """Another source, with what this one would save now."""
        other = self.make(world, *settings)
        other.source.load_state_dict(json.loads(json.dumps(self.source.state_dict())))
        other.source.load_files([self.source.files()])
        return other


@pytest.fixture
def make(monkeypatch) -> Iterator[Callable[..., Made]]:
    every: list[Made] = []

    def collect(asked: Sequence[Asked], engine: Engine, *_: Any, version: int, **__: Any) -> Coroutine[Any, Any, list]:
        return engine.collect(asked, version)

    monkeypatch.setattr(source, "collect", collect)

    def made(world: World, *settings: str, gate: threading.Event | None = None) -> Made:
        every.append(Made(made, world, *settings, gate=gate))
        return every[-1]

    yield made
    for one in every:
        if one.engine.gate is not None:
            one.engine.gate.set()
        one.source.close()


def learned(rows: Sequence[Any]) -> int:
    """Attempts with an advantage."""
    ids = [row.advantage_T.split(row.lengths) for row in rows if row.advantage_T is not None]
    return sum(bool(part.any()) for parts in ids for part in parts)


def test_updates_share_what_there_is_and_later_ones_are_told_who_sampled(make):
    """Three of four groups are found: two and one, and nothing in their place."""
    made = make(lambda group, _: (1.0, float(group >= 3)), "rollout.max_rounds=1", "sampler.max_expansion=1")
    first, second = made.steps(2)
    assert [learned(first), learned(second)] == [4, 2]
    assert all(row.old_logprob_T is None for row in first)
    assert all((row.old_logprob_T == 0).all() for row in second)  # by the weights before the first update
    third, fourth = made.steps(2)
    assert all((row.old_logprob_T == -2).all() for row in fourth) and not learned(third)


def test_one_rollout_ahead(make):
    gate = threading.Event()
    made = make(mixed, "rollout.ahead=1", gate=gate)
    gate.set()
    made.steps(1)
    # The second rollout has begun, before the first update, with the weights that have seen none.
    assert made.engine.begun == [0, 0]
    made.source.settle()
    gate.clear()
    (second,) = made.steps(1)
    assert all((row.old_logprob_T == 0).all() for row in second)
    (third,) = made.steps(1)  # the rollout that was sampled meanwhile; the next one waits for the gate
    assert made.engine.begun == [0, 0, 2] and len(made.engine.groups) == 8
    assert all(row.old_logprob_T is None and not row.waited for row in third)
    assert made.rollouts[1].metrics["rollout_lag"] == 2 and {group.version for group in made.engine.groups} == {0}
    gate.set()
    made.steps(5)
    assert made.engine.begun == [0, 0, 2, 4]  # none beyond the last update
    assert [one.metrics["rollout_lag"] for one in made.rollouts] == [0, 2, 2, 2]
    assert [one.number for one in made.rollouts] == [0, 1, 2, 3]
    assert [group.ticket.group for group in made.engine.groups] == list(range(16))


def test_a_rollout_on_its_way_is_sampled_again_and_counts_once(make):
    made = make(mixed, "rollout.ahead=1")
    made.steps(1)
    made.source.settle()
    again = made.resumed(mixed, "rollout.ahead=1")
    made.steps(2)
    again.steps(2)
    assert again.engine.begun[0] == 2 and again.rollouts[0].metrics["rollout_lag"] == 0  # by the weights of now
    for one in (made, again):
        last = one.rollouts[-1]
        assert [group.ticket for group in last.groups] == [group.ticket for group in made.rollouts[1].groups]
        assert one.source.sampler.visits.sum() == 8 and one.source.report.asked == 8


@pytest.mark.parametrize("place", [0, -1])
def test_a_rollout_that_is_dropped_is_asked_again_and_counts_once(make, place):
    """In its first round and in its second. The queue has lost groups before it, and a reward draws from generators."""
    settings, ends_at = ("rollout.max_lag=1", "rollout.max_rounds=2"), -1

    def world(group: int, version: int) -> Sequence[float | None]:
        random.random()
        if group == ends_at:
            raise Interrupted
        return 1.0, float(group >= 10 and group % 3 > 0)

    def begin() -> Made:
        made = make(world, *settings)
        made.source.sampler.z = [0.6] * len(made.source.sampler.lanes)
        random.seed(7)
        made.steps(4)
        return made

    whole, broken = begin(), begin()
    whole.steps(4)
    dropped = whole.rollouts[2]
    assert dropped.metrics["rollout_rounds"] == 2 and dropped.stale == 2
    ends_at, drawn = [one.outcome.group for one in dropped.summaries][place], random.getstate()
    with pytest.raises(Interrupted):
        broken.steps(1)
    assert not broken.engine.busy and broken.source.updates == 4 and random.getstate() == drawn
    ends_at = -1
    on = broken.resumed(world, *settings)
    on.steps(4)
    assert on.source.report.asked == whole.source.report.asked
    assert on.source.sampler.state_dict() == whole.source.sampler.state_dict()
    for one, other in zip(whole.rollouts[2:], on.rollouts, strict=True):
        for name in ("number", "accepted", "waiting", "usable", "stale", "advantages"):
            assert getattr(one, name) == getattr(other, name), name


def test_what_fails_ahead_is_told_when_it_is_needed(make):
    def fails(group: int, version: int) -> Sequence[float | None]:
        if group >= 4:
            raise RuntimeError("the engine broke")
        return 1.0, 0.0

    made = make(fails, "rollout.ahead=1")
    made.steps(2)
    with pytest.raises(RuntimeError, match="the engine broke"):
        made.steps(1)


def test_rows_say_how_long_their_attempts_have_waited(make):
    """Ten groups are found in the first rollout, of which four are learned from at once, four after it, two later."""
    made = make(mixed, "rollout.max_lag=2")
    made.source.sampler.z = [0.6] * len(made.source.sampler.lanes)
    waited = [[set(row.waited) for row in rows] for rows in made.steps(6)]
    assert len(made.engine.groups) - len(made.rollouts[2].groups) == 10
    assert waited[:4] == [[set()]] * 2 + [[{1}]] * 2
    assert set().union(*waited[4], *waited[5]) == {0, 2}


def test_a_stretch_without_anything_to_learn_ends_the_run_and_survives_a_resume(make):
    settings = ("rollout.max_idle=3", "rollout.max_rounds=1", "sampler.max_expansion=1")
    made = make(lambda group, _: (1.0, float(group != 0)), *settings)
    made.steps(6)
    assert made.source.gives_up is None  # the first rollout had a group to learn from
    again = made.resumed(right, *settings)
    again.steps(2)
    assert again.source.gives_up is not None and "12 are all right" in again.source.gives_up
    assert "the last 3 rollouts" in again.source.gives_up
    assert again.resumed(right, "rollout.max_idle=4", *settings[1:]).source.gives_up is None
    assert again.resumed(right, "rollout.max_idle=null", *settings[1:]).source.gives_up is None
    on = again.resumed(mixed, *settings)
    on.steps(2)
    assert on.source.gives_up is None


def test_groups_that_are_alike_give_nothing_to_learn_when_they_are_kept_either(make):
    made = make(right, "rollout.keep_equal=true", "rollout.max_idle=2")
    made.steps(4)
    assert made.source.report.learned == 8 and made.source.gives_up is not None
    # A group that takes a place is not useless: no more are asked than there are places.
    assert made.source.report.asked == 8


def test_rollouts_without_a_score_are_counted_over_a_resume(make):
    blind = make(lambda group, _: (1.0, 0.0) if group < 4 else (None, None), "rollout.max_rounds=1")
    blind.steps(2 * MAX_BLIND)
    again = blind.resumed(unscored, "rollout.max_rounds=1")
    with pytest.raises(UserError, match=f"in {MAX_BLIND} rollouts, one after the other"):
        again.steps(1)


def test_the_divisor_of_deviations_is_that_of_what_is_learned_from(make):
    """Four groups are learned from, two of them of the queue; the group that is all right has no part in it."""
    worth = {0: (1.0, 0.0), 1: (1.0, 1.0), 2: (0.5, 0.0), 3: (1.0, 0.0), 4: (0.25, 0.0)}
    settings = ("objective.advantage=batch_std", "objective.advantage_eps=0", "sampler.max_expansion=1")
    made = make(lambda group, _: worth[group], *settings)
    made.steps(2)
    values = [value for group in (0, 2, 3, 4) for value in worth[group]]
    mean = sum(values) / 8
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / 7)
    for group in (0, 2, 3, 4):
        half = (worth[group][0] - worth[group][1]) / 2
        assert made.rollouts[0].advantages[group] == pytest.approx([half / std, -half / std])
