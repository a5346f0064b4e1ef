"""What attempts are worth: the reward that the question names, and parts that shape it, added up by weight.

    here                                there:  ernie_model/worker.py, train/reinforcement/judge.py
    RewardPool.score
      one attempt             ────────►  the functions, within rewards.memory_gib
                              ◄────────  {"accuracy": 1.0, "format": -1.0}
      late, or dead: the process is killed, the attempt has no score, another process takes its place

A reward that hangs, or that takes the machine's memory, costs its own attempt and nothing else. No score is None, never
0: a verifier's weakness must not teach that an answer is wrong.
"""

import asyncio
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ernie_model.worker import Worker
from train.config import UserError
from train.evaluation.asking import to_attempt
from train.evaluation.questions import Question
from train.reinforcement.groups import Scored, Scores
from train.reinforcement.judge import Job, Judgement, check_jobs, judge
from train.rewards.base import Attempt
from train.rewards.shaping import ACCURACY, COMPARISONS
from train.rl_config import RewardsConfig

START_S = 60.0
"""Importing rewards may take so long; it does not count as an attempt's time."""
ROOM = 4
"""An answer may be so many times as long as the right one, where that is more than rewards.longest_answer."""


class RewardPool:
    """Any number of attempts at once; more than there are processes wait, which does not count as their time.

    Args:
        questions: that will be asked.

    Raises:
        UserError: a function of the user's own that cannot be imported, options that a part does not take.
    """

    def __init__(self, config: RewardsConfig, questions: Sequence[Question] = ()):
        self.config = config
        options = {name: dict(config.options.get(name, {})) for name in config.weights if name != ACCURACY}
        self.parts = {name: given for name, given in options.items() if name not in COMPARISONS}
        self.comparisons = {name: given for name, given in options.items() if name in COMPARISONS}
        self._rewards = sorted({one.reward_name for one in questions})
        # One thread for each process; one where they are computed here, which blocks no event loop.
        self._threads = ThreadPoolExecutor(max(1, config.workers), thread_name_prefix="rewards")
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[Worker] = []
        """All that run."""
        self._free: queue.SimpleQueue[_Judge] = queue.SimpleQueue()
        if not config.workers:
            check_jobs(self._rewards, self.parts)
        judges = [_Judge(self) for _ in range(config.workers)]
        try:
            for one in judges:
                one.wait()
                self._free.put(one)
        except UserError:
            self.close()
            raise

    async def score(self, question: Question, attempt: Attempt) -> Scores:
        """An attempt that a limit cut off is wrong, whatever it has written until then; one that the engine could not
        make has no score."""
        if attempt.problem is not None:
            return Scores(parts={}, accuracy=None, total=None, problem=attempt.problem)
        longest = max(self.config.longest_answer, ROOM * len(question.expected))
        job = Job(
            reward=question.reward_name,
            options=question.options,
            expected=question.expected,
            attempt=replace(attempt, thinking=question.thinking, max_chars=longest),
            parts=self.parts,
        )
        loop = asyncio.get_running_loop()
        return self._scores(await loop.run_in_executor(self._threads, self._judge, job), question.reward_name)

    def _judge(self, job: Job) -> Judgement:
        if not self.config.workers:
            return judge(job)
        one = self._free.get()
        try:
            one.wait()
            return one.judge(job)
        finally:
            self._free.put(one)

    def _scores(self, judgement: Judgement, reward_name: str) -> Scores:
        parts, names = judgement.parts, {ACCURACY: f"reward {reward_name}"}
        problem = "; ".join(f"{names.get(name, name)} {why}" for name, why in judgement.problems.items()) or None
        accuracy = parts.get(ACCURACY)
        total = None
        if accuracy is None:
            problem = problem or f"reward {reward_name} cannot tell"
        elif not judgement.problems:
            # A part that has nothing to say of this attempt adds nothing.
            total = self._sum(parts)
        return Scores(parts=parts, accuracy=accuracy, total=total, problem=problem)

    def _sum(self, parts: Mapping[str, float | None]) -> float:
        return sum(weight * (parts.get(name) or 0.0) for name, weight in self.config.weights.items())

    def compared(self, group: Sequence[Scored]) -> tuple[Scored, ...]:
        """All attempts at one question, with the parts that compare them."""
        if not self.comparisons:
            return tuple(group)
        attempts = [to_attempt(one.episode) for one in group]
        accuracies = [one.scores.accuracy for one in group]
        values = {
            name: COMPARISONS[name](attempts, accuracies, **options) for name, options in self.comparisons.items()
        }
        done = []
        for place, one in enumerate(group):
            parts = one.scores.parts | {name: of_all[place] for name, of_all in values.items()}
            total = None if one.scores.total is None else self._sum(parts)
            done.append(replace(one, scores=replace(one.scores, parts=parts, total=total)))
        return tuple(done)

    def close(self) -> None:
        """The run is over: no process outlives it, whatever it computes."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.kill()

    def started(self, instead_of: Worker | None) -> Worker:
        """A process that begins to import rewards. Raises UserError when the pool is closed."""
        needed = json.dumps([self._rewards, self.parts])
        with self._lock:
            if instead_of is not None:
                instead_of.kill()
                self._workers.remove(instead_of)
            if self._closed:
                raise UserError("rewards: the run is over.")
            worker = Worker(
                "train.reinforcement.judge",
                str(self.config.memory_gib),
                needed,
                environment={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},  # the same, whichever judges
            )
            self._workers.append(worker)
        return worker


class _Judge:
    """One process, and the one after it."""

    def __init__(self, pool: RewardPool):
        self.pool = pool
        self.worker = pool.started(None)
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
        config = self.pool.config
        try:
            judgement: Judgement = self.worker.call(job, config.time_s)
            if not judgement.spent:
                return judgement
        except TimeoutError:
            judgement = _failed(f"took longer than {config.time_s:g} s (rewards.time_s)")
        except (EOFError, OSError):
            self.worker.end()
            judgement = _failed(f"ended its process{self.worker.how_it_ended()}")
        self.ready = False
        self.worker = self.pool.started(self.worker)
        return judgement


def _failed(problem: str) -> Judgement:
    return Judgement(parts={ACCURACY: None}, problems={ACCURACY: problem})
