"""What judges attempts: here, or in a process of its own (train/rewards/judging.py). It imports no torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from ernie_model.worker import limit_memory
from train.config import UserError
from train.rewards import equation
from train.rewards.base import Attempt
from train.rewards.registry import REWARDS, RewardProblem, check_part, part_named, raised, raising_reward
from train.rewards.shaping import ACCURACY, too_long

PROBLEM_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt."""

    reward: str
    options: Mapping[str, Any]
    expected: str
    attempt: Attempt
    parts: Mapping[str, Mapping[str, Any]]
    """Options of the parts that shape the reward, by name."""
    lenient: bool = False
    """The reward also looks at an attempt that a limit cut off, and at an answer that is too long."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    parts: dict[str, float | None]
    """By name, the accuracy among them."""
    problems: dict[str, str]
    """By part, why it failed, where it did; it is None then."""
    spent: bool = False
    """Memory ran out: what judges next should be another process."""


def judge(job: Job) -> Judgement:
    """Nothing is raised. An attempt that a limit cut off, and an answer that is too long, are wrong, unless the job is
    lenient."""
    values: dict[str, float | None] = {}
    problems: dict[str, str] = {}
    spent = False

    def compute(name: str, function: Callable[..., float | None], *given: Any, **options: Any) -> float | None:
        nonlocal spent
        values[name] = None
        try:
            values[name] = function(*given, **options)
        except RewardProblem as error:
            problems[name] = str(error)[:PROBLEM_CHARS]
        except MemoryError:
            problems[name] = "took too much memory (rewards.memory_gib)"
            spent = True
        except (Exception, SystemExit) as error:
            problems[name] = raised(function, error)[:PROBLEM_CHARS]
        return values[name]

    attempt = job.attempt
    if not job.lenient and (not attempt.finished or too_long(attempt)):
        accuracy = values[ACCURACY] = 0.0
    else:
        accuracy = compute(ACCURACY, _reward(job.reward), attempt, job.expected, **job.options)
    for name, options in job.parts.items():
        compute(name, _part(name), attempt, accuracy, **options)
    return Judgement(parts=values, problems=problems, spent=spent)


_reward = cache(raising_reward)
_part = cache(part_named)


def check_jobs(rewards: list[str], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError: a function that cannot be imported, a part that does not take its options."""
    for name in rewards:
        _reward(name)
    for name, options in parts.items():
        check_part(name, options)


# ---------------------------------------------------------------------------------------------------------------- there


def serve(connection: Connection, memory_gib: str, needed: str) -> None:
    """Judge until the other side is gone.

    Args:
        needed: JSON of the arguments of `check_jobs`.
    """
    rewards, parts = json.loads(needed)
    try:
        check_jobs(rewards, parts)
        if any(REWARDS.get(name) is equation.math for name in rewards):
            equation.compare_here()
    except UserError as error:
        connection.send(str(error))
        return
    limit_memory(float(memory_gib))
    connection.send(None)
    while True:
        try:
            connection.send(judge(connection.recv()))
        except EOFError:
            return
