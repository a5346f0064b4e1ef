"""What training made of a model, stage by stage, asked the same held-out questions.

    python -m tests.end_to_end.demo_table digits "after SFT=runs/digits_weak" "after DPO=runs/digits_dpo" --untrained
    python -m tests.end_to_end.demo_table zoom "cold start=runs/zoom_cold" "after RL=runs/zoom_rl"

    held-out zoom        right     score       95 %  used tools  worked
    ────────────────────────────────────────────────────────────────────
    cold start       24 of 200    12.0 %   7.5-16.5         0 %       -
    after RL        ...

Each stage is what `ernie evaluate` of a run wrote in its folder `evaluation`. With --untrained, a row before them is
what the first run measured before its first update. The last line is `ernie compare` of the last two stages.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.evaluation.comparing import compare
from train.evaluation.results import RESULTS
from train.evaluation.terminal import bounds, comparison_table, make_console, mean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("stages", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--untrained", action="store_true", help="begin with what the first run began with")
    options = parser.parse_args()
    runs = [(label, Path(run)) for label, _, run in (one.partition("=") for one in options.stages)]
    console = make_console()
    console.print(stages(options.task, runs, untrained=options.untrained))
    if len(runs) > 1:
        (before, first), (after, second) = runs[-2:]
        console.print(f"{after}, with {before} as before:")
        console.print(comparison_table(compare(first / "evaluation", second / "evaluation", seed=0)))
    return 0


def stages(task: str, runs: Sequence[tuple[str, Path]], *, untrained: bool = False) -> Table:
    results = [
        (label, json.loads((run / "evaluation" / RESULTS).read_text("utf-8"))["tasks"][task]) for label, run in runs
    ]
    if untrained:
        results.insert(0, ("before", _untrained(runs[0][1])))
    with_tools = any(result["tool_use"] for _, result in results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"held-out {task}")
    for name in ("right", "score", "95 %", *(("used tools", "worked") if with_tools else ())):
        table.add_column(name, justify="right")
    for label, result in results:
        score, total = result["score"], result["questions"]
        worked = "–" if result["tool_success"] is None else f"{result['tool_success']:.0%}"
        tools = (f"{result['tool_use']:.0%}", worked) if with_tools else ()
        table.add_row(label, f"{round(score['mean'] * total)} of {total}", mean(score), bounds(score), *tools)
    return table


def _untrained(run: Path) -> dict[str, Any]:
    """As `ernie evaluate` would have said it."""
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    assert first["step"] == 0, "the run's first line is what it measured before its first update"
    score = {name: first[f"eval_accuracy{of}"] for name, of in (("mean", ""), ("low", "_low"), ("high", "_high"))}
    return {"questions": int(first["eval_total"]), "score": score, "tool_use": 0.0, "tool_success": None}


if __name__ == "__main__":
    sys.exit(main())
