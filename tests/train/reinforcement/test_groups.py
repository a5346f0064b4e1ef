"""What every rank knows of attempts: what rewards see of them, and which weights they come from."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ernie_model.inference.agent import Episode, Status, Turn
from ernie_model.inference.parsing import ToolCallText
from ernie_model.inference.request import Completion, Finish, SamplingParams
from ernie_model.inference.tools import ToolBox, ToolResult
from tests.train.reinforcement.asked import PROCESSOR, question
from train.evaluation.asking import to_attempt
from train.reinforcement.collect import Asked, collect
from train.reinforcement.groups import AttemptSummary, Scored, Scores, Ticket
from train.reinforcement.scoring import RewardPool
from train.rl_config import RewardsConfig

CALL = ToolCallText("image_zoom_in_tool", "{}", None)
WORKED, FAILED = ToolResult(()), ToolResult.failure("no")


def turn(calls: int = 0, results: tuple[ToolResult, ...] = (), problem: str | None = None) -> Turn:
    return Turn("", "", "", (CALL,) * calls, Completion((), "", Finish.STOP, (), ()), results, problem)


@pytest.mark.parametrize(
    ("status", "turns", "calls", "failed"),
    [
        (Status.ANSWERED, [turn(2, (WORKED, FAILED)), turn()], 2, 1),
        (Status.ANSWERED, [turn(0, (FAILED,), "unreadable"), turn()], 1, 1),
        (Status.TURN_LIMIT, [turn(1, (WORKED,)), turn(1)], 2, 1),
        (Status.TOOL_LIMIT, [turn(5)], 5, 5),
        (Status.PARSE_ERROR, [turn(1, (WORKED,)), turn(problem="unreadable")], 2, 1),
    ],
    ids=lambda value: value.value if isinstance(value, Status) else "",
)
def test_calls_that_were_never_run_have_not_worked(status, turns, calls, failed):
    episode = Episode([], [], [], turns=turns, status=status)
    scored = Scored(episode=episode, scores=Scores(parts={}, accuracy=0.0, total=0.0))
    summary, attempt = AttemptSummary.of(scored), to_attempt(episode)
    assert (summary.calls, summary.failed_calls) == (calls, failed)
    assert (attempt.num_calls, attempt.num_failed_calls) == (calls, failed)


class Agent:
    """Whose episodes are made already, by their seeds."""

    toolbox = ToolBox(())

    def __init__(self, *episodes: Episode):
        self.episodes = episodes

    async def run(self, chat: Any, *, params: SamplingParams, **keys: Any) -> Episode:
        assert params.seed is not None
        return self.episodes[params.seed]


async def together(attempts: Any, stop: Any) -> list[Any]:
    return [await attempt for attempt in attempts]


def test_time_that_was_over_before_the_first_token_is_no_wrong_answer_and_versions_are_those_of_tokens():
    """A rollout may be longer than agent.time_s; then those at the end of the line are never asked."""
    late, cut, right = (
        Episode([1, 2, 2], [], [], sampled=[False, of, of], versions=[-1, *[4 * of - (not of)] * 2], status=status)
        for of, status in ((False, Status.TIMEOUT), (True, Status.TIMEOUT), (True, Status.ANSWERED))
    )
    late.error, right.answer, right.versions[2] = "the question took longer", "7", 5
    pool, asked = RewardPool(RewardsConfig(workers=0)), replace(question(), tools=())
    given: Any = SimpleNamespace(together=together), {(): Agent(late, cut, right)}, pool, PROCESSOR, SamplingParams()
    tickets = [
        Asked(ticket=Ticket(group=n, prompt=0), question=asked, seeds=seeds) for n, seeds in ((0, [0, 1, 2]), (1, [0]))
    ]
    both, none = asyncio.run(collect(tickets, *given, version=9))
    assert both.outcome.accuracies == (None, 0.0, 1.0)
    assert both.attempts[0].scores.problem == "the question took longer"
    assert (both.version, none.version) == (4, 9)
    pool.close()


@pytest.mark.parametrize(
    ("sampled", "waited"), [([0], True), ([0, 1, 1], False), ([0, 1, 1, 0, 0], True), ([0, 1, 0, 1], False)]
)
def test_a_turn_that_waited_in_line_until_the_time_was_over_is_no_wrong_answer(sampled, waited):
    """The first turn, or one after a tool's result; where the turn had begun, or its tool took too long, it is."""
    episode = Episode([1] * len(sampled), [], [], sampled=[*map(bool, sampled)], status=Status.TIMEOUT)
    assert (to_attempt(episode).problem is not None) == waited
