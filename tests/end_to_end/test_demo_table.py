"""The demo's table, of results that are written here."""

import json
from io import StringIO

from rich.console import Console

from tests.end_to_end.demo_table import stages


def evaluated(run, task, *, right, questions, used=0.0, worked=None):
    score = {"mean": right, "low": right - 0.05, "high": right + 0.05}
    result = {"questions": questions, "score": score, "tool_use": used, "tool_success": worked}
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / "results.json").write_text(json.dumps({"tasks": {task: result}}))
    return run


def rows(table):
    console = Console(file=StringIO(), width=100)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [" ".join(line.split()) for line in lines if " of " in line]


def test_three_rows(tmp_path):
    weak = evaluated(tmp_path / "weak", "digits", right=0.7, questions=10)
    dpo = evaluated(tmp_path / "dpo", "digits", right=0.9, questions=10)
    first = {"step": 0, "eval_accuracy": 0.1, "eval_accuracy_low": 0.0, "eval_accuracy_high": 0.4, "eval_total": 10.0}
    (weak / "metrics.jsonl").write_text(f'{json.dumps(first)}\n{{"step": 1, "loss": 2.0}}\n')
    assert rows(stages("digits", [("after SFT", weak), ("after DPO", dpo)], untrained=True)) == [
        "before 1 of 10 10.0 % 0.0–40.0",
        "after SFT 7 of 10 70.0 % 65.0–75.0",
        "after DPO 9 of 10 90.0 % 85.0–95.0",
    ]


def test_columns_of_tools_where_one_was_used(tmp_path):
    cold = evaluated(tmp_path / "cold", "zoom", right=0.2, questions=20)
    after = evaluated(tmp_path / "rl", "zoom", right=0.9, questions=20, used=1.0, worked=0.96)
    assert rows(stages("zoom", [("cold start", cold), ("after RL", after)])) == [
        "cold start 4 of 20 20.0 % 15.0–25.0 0% –",
        "after RL 18 of 20 90.0 % 85.0–95.0 100% 96%",
    ]
