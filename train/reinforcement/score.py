"""How well a policy answers held-out questions: asked for real, tools and all, each once, with the likeliest tokens."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ernie_model.inference.agent import Agent
from ernie_model.inference.request import SamplingParams
from ernie_model.processor import Processor
from train import score
from train.checkpoint import everyones
from train.parallel.layout import Layout
from train.reinforcement.collect import Asked, collect
from train.reinforcement.engines import RolloutEngine
from train.reinforcement.groups import AttemptSummary, Ticket
from train.reinforcement.prompts import Prompts
from train.reinforcement.scoring import RewardPool
from train.reinforcement.stopping import agreed, never


@dataclass(frozen=True)
class RolloutScore(score.Score):
    perfect: int
    """Questions with the highest reward."""
    total: int
    """That could be scored."""
    reward: float
    """Mean of the questions' own reward, in [0, 1]."""
    spread: float
    """Its standard deviation over questions."""
    tool_use: float
    """Share of the questions that a tool was called for."""
    tool_success: float
    """Share of the calls that worked; 1 where there were none."""
    tokens: float
    """Sampled per question."""
    unscored: int = 0
    """Questions beside `total`, whose attempt has no score,"""
    problem: str = ""
    """and the commonest reason."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "held-out questions",
        "right",
        "mean reward",
        "95 % interval",
        "tool used",
        "calls that work",
        "tokens",
    )

    @property
    def right(self) -> int:
        return self.perfect

    @property
    def accuracy(self) -> float:
        """-1 where nothing could be scored: such weights are never the best."""
        return self.reward if self.total else -1.0

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total or math.isclose(self.reward * self.total, self.perfect):  # every reward is 0 or 1
            return score.wilson(self.perfect, self.total)
        half = 1.959964 * self.spread / math.sqrt(self.total)
        return max(self.reward - half, 0.0), min(self.reward + half, 1.0)

    def metrics(self) -> dict[str, float]:
        unscored = {"eval_unscored": float(self.unscored)} if self.unscored else {}
        if not self.total:
            return unscored
        return (
            self.accuracy_metrics()
            | unscored
            | {
                "eval_perfect": self.perfect / self.total,
                "eval_tool_use": self.tool_use,
                "eval_tool_success": self.tool_success,
                "eval_tokens": self.tokens,
            }
        )

    def line(self) -> str:
        if not self.total:
            return f"held out: none of {self.unscored} could be scored; {self.problem}"
        left_out = f"; {self.unscored} could not be scored: {self.problem}" if self.unscored else ""
        return (
            f"held out {self.perfect}/{self.total} right, mean reward {self.reward:.3f} "
            f"(95 % interval {self.interval_text}), tool used {self.tool_use:.0%}{left_out}"
        )

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.perfect} of {self.total}",
            f"{self.reward:.3f}",
            self.interval_text,
            f"{self.tool_use:.0%}",
            f"{self.tool_success:.0%}" if self.tool_use else "-",
            f"{self.tokens:.1f}",
        )


def measure(
    prompts: Prompts,
    engine: RolloutEngine,
    agents: Mapping[tuple[str, ...], Agent],
    pool: RewardPool,
    processor: Processor,
    params: SamplingParams,
    layout: Layout,
    runner: asyncio.Runner,
    stop: Callable[[], bool] = never,
) -> RolloutScore:
    """All ranks call it between `begin` and `end` of the engine; each asks its share and all get the same.

    Raises:
        Interrupted: on all ranks; `stop` said so on one of them.
    """
    asked = [
        Asked(ticket=Ticket(group=number, prompt=number), question=question, seeds=[number])
        for number, question in enumerate(prompts.questions)
        if number % layout.data_world == layout.data_rank
    ]
    greedy = replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    asking = collect(asked, engine, agents, pool, processor, greedy, version=0, stop=stop)
    groups = agreed(lambda: runner.run(asking))
    own = [AttemptSummary.of(group.attempts[0]) for group in groups]
    return score_of([one for of_rank in everyones(own) for one in of_rank])


def score_of(attempts: Sequence[AttemptSummary]) -> RolloutScore:
    rewards = [one.accuracy for one in attempts if one.accuracy is not None]
    problems = Counter(one.problem or f"it ended as {one.status}" for one in attempts if one.accuracy is None)
    mean = sum(rewards) / max(len(rewards), 1)
    variance = sum((value - mean) ** 2 for value in rewards) / max(len(rewards) - 1, 1)
    calls, failed = sum(one.calls for one in attempts), sum(one.failed_calls for one in attempts)
    return RolloutScore(
        perfect=sum(value >= 1 for value in rewards),
        total=len(rewards),
        reward=mean,
        spread=math.sqrt(variance),
        tool_use=sum(one.calls > 0 for one in attempts) / len(attempts),
        tool_success=1 - failed / calls if calls else 1.0,
        tokens=sum(one.tokens for one in attempts) / len(attempts),
        unscored=problems.total(),
        problem=problems.most_common(1)[0][0] if problems else "",
    )
