"""What an attempt is worth by the question's reward: the suite's here, one of the user's own in a process with limits.

A function of the user's own may hang or die: then its attempt has no score, which is not 0, and the others theirs.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from train.evaluation.questions import AskedTask, Question
from train.inference_config import RewardLimits
from train.rewards.base import Attempt
from train.rewards.judge import Job, Judgement
from train.rewards.judging import Judges
from train.rewards.registry import OWN
from train.rewards.shaping import ACCURACY


class Scored(NamedTuple):
    value: float | None
    problem: str | None
    """Why there is no value, in words."""


class Scorer:
    """
    Args:
        judges: of the user's own rewards; None where there are none.
    """

    def __init__(self, judges: Judges | None):
        self.judges = judges

    async def score(self, question: Question, attempt: Attempt) -> Scored:
        if self.judges is None or not _own(question):
            return _here(question, attempt)
        return _read(question, await self.judges.judge(_job(question, attempt)))

    def score_now(self, question: Question, attempt: Attempt) -> Scored:
        """The same, outside an event loop."""
        if self.judges is None or not _own(question):
            return _here(question, attempt)
        return _read(question, self.judges.judge_now(_job(question, attempt)))


@contextmanager
def open_scorer(limits: RewardLimits, tasks: Sequence[AskedTask]) -> Iterator[Scorer]:
    """Processes for the user's own rewards, where tasks name any, as long as it lasts."""
    own = sorted({one.reward_name for task in tasks for one in task.questions if _own(one)})
    if not own:
        yield Scorer(None)
        return
    with closing(Judges(limits, own, {})) as judges:
        yield Scorer(judges)


def _own(question: Question) -> bool:
    return question.reward_name.startswith(OWN)


def _here(question: Question, attempt: Attempt) -> Scored:
    value = question.score(attempt)
    return Scored(value, f"reward {question.reward_name} cannot tell" if value is None else None)


def _job(question: Question, attempt: Attempt) -> Job:
    return Job(
        reward=question.reward_name,
        options=question.options,
        expected=question.expected,
        attempt=replace(attempt, thinking=question.thinking),
        parts={},
        lenient=True,
    )


def _read(question: Question, judgement: Judgement) -> Scored:
    value = judgement.parts[ACCURACY]
    why = judgement.problems.get(ACCURACY, "cannot tell")
    return Scored(value, None if value is not None else f"reward {question.reward_name} {why}")
