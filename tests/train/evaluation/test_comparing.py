"""Two evaluations of the same questions."""

import pytest
from rich.console import Console

from train.config import UserError
from train.evaluation.comparing import compare
from train.evaluation.statistics import mcnemar
from train.evaluation.terminal import comparison_table
from train.inference_config import CompareConfig, SamplingConfig


@pytest.fixture
def two(run, sums, adds, tmp_path):
    """The first answers 3 and 9 wrongly (as text of the answer), the second only the sum 13."""

    def run_both(**second):
        first, after = (lambda p: "x" if adds(p) in ("3", "9") else adds(p)), lambda p: adds(p).replace("13", "x")
        run([sums], first, output=str(tmp_path / "a"))
        run([sums], after, output=str(tmp_path / "b"), **second)
        return tmp_path / "a", tmp_path / "b"

    return run_both


def test_question_by_question(two, tmp_path):
    comparison = compare(*two(), seed=0)
    one = comparison["tasks"]["sums"]
    assert (one["before"], one["after"]) == pytest.approx((10 / 12, 11 / 12))
    assert one["better_ids"] == ["q3", "q9"] and one["worse_ids"] == ["q11"]
    assert (one["better"], one["worse"], one["test"], one["p_value"]) == (2, 1, "mcnemar", mcnemar(2, 1))
    assert one["low"] < one["difference"] < one["high"]
    with (tmp_path / "table.txt").open("w") as file:
        Console(file=file, width=100).print(comparison_table(comparison))
    line = next(line for line in (tmp_path / "table.txt").read_text().splitlines() if "sums" in line).split()
    assert line[:6] == ["sums", "12", "83.3", "%", "91.7", "%"] and "+8.3" in line and line[-1] == "1.000"
    assert "p by mcnemar: sums" in (tmp_path / "table.txt").read_text()


def test_the_table_fits_a_terminal_of_80_columns(tmp_path):
    one = dict(questions=10000, before=1.0, after=0.9, difference=-0.1, low=-0.12, high=-0.1, better=1000, worse=2000)
    tasks = {
        "documents": one | dict(p_value=1e-9, test="mcnemar"),
        "video": one | dict(p_value=0.5, test="permutation"),
    }
    with (tmp_path / "table.txt").open("w") as file:
        Console(file=file, width=80).print(comparison_table({"tasks": tasks}))
    text = (tmp_path / "table.txt").read_text()
    assert "…" not in text.replace("-12.0…-10.0", "") and "p by mcnemar: documents; p by permutation: video" in text


def test_several_attempts_are_compared_by_their_means(two):
    comparison = compare(*two(attempts=3, sampling=SamplingConfig(max_new_tokens=64, temperature=1.0)), seed=0)
    assert comparison["tasks"]["sums"]["after"] == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    "second, why",
    [
        ({"limit": 6}, "their number differs .12 and 6 questions"),
        ({"per_task": {"sums": {"reward": "exact"}}}, "a question, picture or reward differs"),
        ({"per_task": {"sums": {"reward_options": {"tolerance": 0.5}}}}, "a question, picture or reward differs"),
    ],
)
def test_other_questions_are_refused(two, second, why):
    with pytest.raises(UserError, match=f"the questions of sums in .* are not the same: {why}"):
        compare(*two(**second), seed=0)


def test_other_tasks_and_unfinished_evaluations_are_refused(two, run, write, adds, tmp_path):
    first, _ = two()
    other = write([{"prompt": "1 + 1 = ?", "answer": "2", "reward": "number"}], "other.jsonl")
    run([other], adds, output=str(tmp_path / "c"))
    with pytest.raises(UserError, match="a asked sums, and .*c asked other; only the same questions"):
        compare(first, tmp_path / "c", seed=0)
    with pytest.raises(UserError, match="nothing has no results.json: it holds no evaluation"):
        compare(first, tmp_path / "nothing", seed=0)
    (first / "results.json").unlink()
    with pytest.raises(UserError, match="has no results.json: it was broken off; give its command again"):
        compare(first, tmp_path / "b", seed=0)
    with pytest.raises(UserError, match="runs holds 1 folders; give two: runs="):
        CompareConfig(runs=["a"])
