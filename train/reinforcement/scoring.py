"""What attempts are worth: the reward that the question names, and parts that shape it, added up by weight.

    here                                there:  python -m train.reinforcement.judge
    RewardPool.score
      name, options, attempt  ────────►  the functions
                              ◄────────  {"accuracy": 1.0, "format": -1.0}
      late, dead, too much memory: the process is killed, the attempt has no score, the next one gets a new process

A reward that hangs, or that takes the machine's memory, costs its own attempt and nothing else. No score is None, never
0: a verifier's weakness must not teach that an answer is wrong. What a user's function prints goes to stderr.
"""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe as pipe

from train.config import UserError
from train.evaluation.questions import Question
from train.reinforcement.groups import Scores
from train.reinforcement.judge import Job, judge
from train.rewards.base import Attempt
from train.rewards.registry import OWN, imported
from train.rewards.shaping import ACCURACY
from train.rl_config import RewardsConfig

MODULE = "train.reinforcement.judge"
START_S = 60.0
"""Importing rewards may take so long; it does not count as an attempt's time."""


class RewardPool:
    """
    Args:
        questions: that will be asked.

    Raises:
        UserError: a function of the user's own that cannot be imported.
    """

    def __init__(self, config: RewardsConfig, questions: Sequence[Question]):
        self.config = config
        self.parts = {name: dict(config.options.get(name, {})) for name in config.weights if name != ACCURACY}
        for name in self.parts:
            if name.startswith(OWN):
                imported(name)
        self.names = sorted({one.reward_name for one in questions})
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(config.workers):
            self._free.put(None)

    async def score(self, question: Question, attempt: Attempt) -> Scores:
        """An attempt that a limit cut off is wrong, whatever it has written until then."""
        job = Job(question.reward_name, question.options, question.expected, attempt, self.parts)
        if not self.config.workers:
            return self._weighed(judge(job))
        return self._weighed(await asyncio.to_thread(self._in_process, job))

    def _weighed(self, parts: dict[str, float | None] | str) -> Scores:
        if isinstance(parts, str):
            return Scores(parts={}, accuracy=None, total=None, problem=parts)
        accuracy = parts[ACCURACY]
        if accuracy is None:
            return Scores(parts=parts, accuracy=None, total=None, problem="its reward cannot tell")
        # A part that cannot be told adds nothing.
        total = sum(weight * (parts[name] or 0.0) for name, weight in self.config.weights.items())
        return Scores(parts=parts, accuracy=accuracy, total=total)

    def _in_process(self, job: Job) -> dict[str, float | None] | str:
        process = self._free.get()
        try:
            if process is None or not process.alive:
                process = _Process(self.config.memory_gib)
            return process.judge(job, self.config.time_s)
        except TimeoutError:
            return f"judging it took longer than {self.config.time_s:g} s (rewards.time_s)"
        except (EOFError, OSError):
            return "judging it ended the process (rewards.memory_gib?)"
        finally:
            self._free.put(process if process is not None and process.alive else None)

    def close(self) -> None:
        """The run is over: no process outlives it."""
        with suppress(queue.Empty):
            while True:
                process = self._free.get_nowait()
                if process is not None:
                    process.kill()


class _Process:
    """One that judges, one attempt at a time."""

    def __init__(self, memory_gib: float):
        ours, theirs = pipe()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid()), str(memory_gib)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        self._pipe = ours
        self._end = weakref.finalize(self, _kill, self._popen)  # at the latest when the program ends
        if not self._pipe.poll(START_S):
            self.kill()
            raise UserError(f"a process for rewards did not start within {START_S:g} s.")
        self._pipe.recv()

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def judge(self, job: Job, time_s: float) -> dict[str, float | None] | str:
        """Raises TimeoutError, EOFError, OSError; the process is dead then."""
        try:
            self._pipe.send(job)
            if not self._pipe.poll(time_s):
                raise TimeoutError
            return self._pipe.recv()
        except (TimeoutError, EOFError, OSError):
            self.kill()
            raise

    def kill(self) -> None:
        self._end()
        self._pipe.close()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
