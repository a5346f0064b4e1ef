"""Processes that judge attempts, each attempt within a time and a memory.

    here                                there:  ernie_model/worker.py, train/rewards/judge.py
    Judges.judge
      one attempt             ────────►  the functions, within rewards.memory_gib
                              ◄────────  {"accuracy": 1.0, "format": -1.0}
      late, or dead: the process is killed, the attempt has no score, another process takes its place

A reward that hangs, or that takes the machine's memory, costs its own attempt and nothing else.
"""

import asyncio
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ernie_model.worker import Worker
from train.config import UserError
from train.inference_config import RewardLimits
from train.rewards.judge import Job, Judgement, check_jobs, judge
from train.rewards.shaping import ACCURACY

START_S = 60.0
"""Importing rewards may take so long; it does not count as an attempt's time."""


class Judges:
    """Any number of attempts at once; more than there are processes wait, which does not count as their time.

    Args:
        rewards: names of those that will be asked for.
        parts: that shape them, with their options.

    Raises:
        UserError: a function of the user's own that cannot be imported, options that a part does not take.
    """

    def __init__(self, limits: RewardLimits, rewards: Sequence[str], parts: Mapping[str, Mapping[str, Any]]):
        self.limits = limits
        self._rewards, self._parts = sorted(rewards), parts
        # One thread for each process; one where they are computed here, which blocks no event loop.
        self._threads = ThreadPoolExecutor(max(1, limits.workers), thread_name_prefix="rewards")
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[Worker] = []
        """All that run."""
        self._free: queue.SimpleQueue[_Judge] = queue.SimpleQueue()
        if not limits.workers:
            check_jobs(self._rewards, self._parts)
        judges = [_Judge(self) for _ in range(limits.workers)]
        try:
            for one in judges:
                one.wait()
                self._free.put(one)
        except UserError:
            self.close()
            raise

    async def judge(self, job: Job) -> Judgement:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.judge_now, job)

    def judge_now(self, job: Job) -> Judgement:
        if not self.limits.workers:
            return judge(job)
        one = self._free.get()
        try:
            one.wait()
            return one.judge(job)
        finally:
            self._free.put(one)

    def close(self) -> None:
        """No process outlives it, whatever it computes."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.kill()

    def started(self, instead_of: Worker | None) -> Worker:
        """A process that begins to import rewards. Raises UserError when the judges are closed."""
        needed = json.dumps([self._rewards, self._parts])
        with self._lock:
            if instead_of is not None:
                instead_of.kill()
                self._workers.remove(instead_of)
            if self._closed:
                raise UserError("rewards: the run is over.")
            worker = Worker(
                "train.rewards.judge",
                str(self.limits.memory_gib),
                needed,
                environment={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},  # the same, whichever judges
            )
            self._workers.append(worker)
        return worker


class _Judge:
    """One process, and the one after it."""

    def __init__(self, judges: Judges):
        self.judges = judges
        self.worker = judges.started(None)
        self.ready = False

    def wait(self) -> None:
        """Until it can judge. Raises UserError: it cannot."""
        if self.ready:
            return
        try:
            problem = self.worker.hello(START_S)
        except TimeoutError:
            problem = f"a process for rewards did not start within {START_S:g} s."
        except (EOFError, OSError):
            problem = "a process for rewards ended while it was starting; it says why above."
        if problem is not None:
            raise UserError(problem)
        self.ready = True

    def judge(self, job: Job) -> Judgement:
        limits = self.judges.limits
        try:
            judgement: Judgement = self.worker.call(job, limits.time_s)
            if not judgement.spent:
                return judgement
        except TimeoutError:
            judgement = _failed(f"took longer than {limits.time_s:g} s (rewards.time_s)")
        except (EOFError, OSError):
            self.worker.end()
            judgement = _failed(f"ended its process{self.worker.how_it_ended()}")
        self.ready = False
        self.worker = self.judges.started(self.worker)
        return judgement


def _failed(problem: str) -> Judgement:
    return Judgement(parts={ACCURACY: None}, problems={ACCURACY: problem})
