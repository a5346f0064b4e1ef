"""What attempts are worth: the reward that the question names, and parts that shape it, added up by weight.

No score is None, never 0: a verifier's weakness (train/rewards/judging.py) must not teach that an answer is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from train.evaluation.asking import to_attempt
from train.evaluation.questions import Question
from train.reinforcement.groups import Scored, Scores
from train.rewards.base import Attempt
from train.rewards.judge import Job, Judgement
from train.rewards.judging import Judges
from train.rewards.shaping import ACCURACY, COMPARISONS
from train.rl_config import RewardsConfig

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
        self.judges = Judges(config, list({one.reward_name for one in questions}), self.parts)

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
        return self._scores(await self.judges.judge(job), question.reward_name)

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
        """The run is over."""
        self.judges.close()
