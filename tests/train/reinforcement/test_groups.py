"""What every rank knows of an attempt is what rewards see of it."""

import pytest

from ernie_model.inference.agent import Episode, Status, Turn
from ernie_model.inference.parsing import ToolCallText
from ernie_model.inference.request import Completion, Finish
from ernie_model.inference.tools import ToolResult
from train.evaluation.asking import to_attempt
from train.reinforcement.groups import AttemptSummary, Scored, Scores

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
