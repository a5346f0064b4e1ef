"""Which prompts are asked: beliefs by hand, draws by a loop, states by going on."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from train.reinforcement.difficulty import DifficultySampler, PromptInfo
from train.reinforcement.groups import Outcome, Ticket
from train.rl_config import SamplerConfig

REFERENCE = [path for up in Path(__file__).parents if (path := up / "shared/reference/algorithms_check.py").exists()]


def sampler(count: int, attempts: int = 8, seed: int = 0, **settings) -> DifficultySampler:
    prompts = [PromptInfo(str(number)) for number in range(count)]
    return DifficultySampler(prompts, SamplerConfig(**settings), attempts=attempts, seed=seed)


def outcome(ticket: Ticket, right: int, attempts: int = 8) -> Outcome:
    return Outcome(group=ticket.group, prompt=ticket.prompt, accuracies=(1.0,) * right + (0.0,) * (attempts - right))


def right_of(ticket: Ticket, step: int, difficulty) -> int:
    """Right attempts of 8, of a policy whose ability grows. Depends on prompt, group and step alone."""
    p = 1 / (1 + math.exp(-(0.008 * step - difficulty[ticket.prompt])))
    return int((np.random.default_rng((11, ticket.group)).random(8) < p).sum())


def run(drawer: DifficultySampler, steps: int, difficulty, need: int = 32, reverse: bool = False):
    """Prompts of every rollout, and how many of their groups were useful."""
    rollouts = []
    for _ in range(steps):
        tickets = drawer.pick(need)
        told = [outcome(ticket, right_of(ticket, drawer.step, difficulty)) for ticket in tickets]
        drawer.update(told[::-1] if reverse else told)
        rollouts.append(([ticket.prompt for ticket in tickets], sum(one.trainable for one in told)))
    return rollouts


def test_a_state_goes_on_as_if_never_stopped_in_whatever_order_groups_finish():
    difficulty = np.random.default_rng(7).normal(0, 3.0, 300)
    whole = run(sampler(300), 60, difficulty)
    first = sampler(300)
    before = run(first, 30, difficulty, reverse=True)
    second = sampler(300, seed=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, 30, difficulty) == whole


@pytest.mark.skipif(not REFERENCE, reason="compares with a reference that lies beside the checkout, where there is one")
def test_draws_are_those_of_the_reference():
    spec = importlib.util.spec_from_file_location("algorithms_check", REFERENCE[0])
    module = sys.modules["algorithms_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference, ours = module.Sampler(2000), sampler(2000)
    difficulty = np.random.default_rng(7).normal(0, 3.0, 2000)
    for step in range(150):
        tickets = ours.pick(32)
        assert [ticket.prompt for ticket in tickets] == reference.pick(32)
        right = [right_of(ticket, step, difficulty) for ticket in tickets]
        reference.update([(ticket.group, ticket.prompt, k) for ticket, k in zip(tickets, right, strict=True)])
        ours.update([outcome(ticket, k) for ticket, k in zip(tickets, right, strict=True)])
        assert ours.z == [reference.z]
