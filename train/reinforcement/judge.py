"""The process that judges attempts (train/reinforcement/scoring.py). It imports rewards and nothing heavier.

python -m train.reinforcement.judge FILE_DESCRIPTOR PARENT MEMORY_GIB
"""

import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from train.rewards.base import Attempt
from train.rewards.registry import imported, reward_named
from train.rewards.shaping import ACCURACY, PARTS


@dataclass(frozen=True)
class Job:
    """One attempt, as it goes to a process."""

    reward: str
    options: dict[str, Any]
    expected: str
    attempt: Attempt
    parts: dict[str, dict[str, Any]]
    """Options of the parts that shape the reward, by name."""


def judge(job: Job) -> dict[str, float | None]:
    """Each part of the reward. Nothing is raised."""
    accuracy: float | None = 0.0
    if job.attempt.finished:
        accuracy = _reward(job.reward)(job.attempt, job.expected, **job.options)
    parts: dict[str, float | None] = {ACCURACY: accuracy}
    for name, options in job.parts.items():
        parts[name] = _shaped(name, job.attempt, accuracy, options)
    return parts


_reward = cache(reward_named)


def _shaped(name: str, attempt: Attempt, accuracy: float | None, options: dict[str, Any]) -> float | None:
    if name in PARTS:
        return PARTS[name](attempt, accuracy, **options)
    try:
        value = float(imported(name)(attempt, accuracy, **options))
    except Exception:
        return None
    return value if -1 <= value <= 1 else None


def serve(connection: Connection) -> None:
    """Judge until the other side is gone."""
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            outcome: dict[str, float | None] | str = judge(job)
        except MemoryError:
            outcome = "judging it took too much memory (rewards.memory_gib)"
        except Exception as error:  # of unpickling, or of a reward that breaks its promise
            outcome = f"judging it raised {type(error).__name__}: {error}"[:400]
        connection.send(outcome)


def _end_with_parent(parent: int) -> None:
    """A reward that hangs would outlive a run that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent(int(sys.argv[2]))
    limit = int(float(sys.argv[3]) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from train.reinforcement.judge import serve as serve_jobs  # jobs are pickled under the module's real name

    serve_jobs(Connection(int(sys.argv[1])))
