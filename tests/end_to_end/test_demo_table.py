"""The demo's table, of results that are written here."""

import json
from io import StringIO

from rich.console import Console

from tests.end_to_end import rl_table
from tests.end_to_end.demo_table import stages


def test_three_rows(tmp_path):
    for name, right in (("weak", 0.7), ("dpo", 0.9)):
        score = {"mean": right, "low": right - 0.05, "high": right + 0.05}
        (tmp_path / name / "evaluation").mkdir(parents=True)
        results = {"tasks": {"digits": {"questions": 10, "score": score}}}
        (tmp_path / name / "evaluation" / "results.json").write_text(json.dumps(results))
    first = {"step": 0, "eval_accuracy": 0.1, "eval_accuracy_low": 0.0, "eval_accuracy_high": 0.4, "eval_total": 10.0}
    (tmp_path / "weak" / "metrics.jsonl").write_text(f'{json.dumps(first)}\n{{"step": 1, "loss": 2.0}}\n')
    console = Console(file=StringIO(), width=100)
    console.print(stages(tmp_path / "weak", tmp_path / "dpo"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [line.split() for line in lines if " of " in line]
    assert [" ".join(row) for row in rows] == [
        "before 1 of 10 10.0 % 0.0–40.0",
        "after SFT 7 of 10 70.0 % 65.0–75.0",
        "after DPO 9 of 10 90.0 % 85.0–95.0",
    ]


def test_before_and_after_reinforcement_learning(tmp_path):
    for name, right, used, worked in (("cold", 0.2, 0.5, None), ("rl", 0.9, 1.0, 0.96)):
        score = {"mean": right, "low": right - 0.05, "high": right + 0.05}
        (tmp_path / name / "evaluation").mkdir(parents=True)
        task = {"questions": 20, "score": score, "tool_use": used, "tool_success": worked}
        (tmp_path / name / "evaluation" / "results.json").write_text(json.dumps({"tasks": {"zoom": task}}))
    console = Console(file=StringIO(), width=100)
    console.print(rl_table.stages(tmp_path / "cold", tmp_path / "rl"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [" ".join(line.split()) for line in lines if " of " in line] == [
        "cold start 4 of 20 20.0 % 15.0–25.0 50% –",
        "after RL 18 of 20 90.0 % 85.0–95.0 100% 96%",
    ]
