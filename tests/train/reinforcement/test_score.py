"""What an evaluation on held-out questions says where some, or all, could not be scored."""

from tests.train.reinforcement.asked import attempt
from train.reinforcement.groups import AttemptSummary
from train.reinforcement.score import score_of


def of(*worths: float | None):
    ones = [attempt("7", worth, problem="it hangs" if worth is None else None) for worth in worths]
    return score_of([AttemptSummary.of(one) for one in ones])


def test_what_cannot_be_scored_is_told_and_counts_for_nothing():
    score = of(1.0, 0.0, None)
    assert (score.perfect, score.total, score.unscored, score.accuracy) == (1, 2, 1, 0.5)
    assert score.line().endswith("; 1 could not be scored: it hangs")
    assert score.metrics()["eval_unscored"] == 1.0
    assert score.cells()[3:5] == ("0%", "-")  # no call was made, so none worked
    assert "scored" not in of(1.0).line() and "eval_unscored" not in of(1.0).metrics()


def test_no_score_at_all_is_not_nought():
    score = of(None, None)
    assert score.line() == "held out: none of 2 could be scored; it hangs"
    assert score.metrics() == {"eval_unscored": 2.0}
    assert score.accuracy == -1  # never the best
    assert score.cells()[0] == "0 of 0"
