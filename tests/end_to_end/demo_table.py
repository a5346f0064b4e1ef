"""What preference alignment made of a model that was stopped early: before training, after SFT, after DPO.

    python -m tests.end_to_end.demo_table runs/digits_weak runs/digits_dpo          (the last act of `make demo`)

    held-out digits     right     score       95 %
    ───────────────────────────────────────────────
    before           0 of 359     0.0 %    0.0–1.1
    after SFT      257 of 359    71.6 %  66.9–76.0
    after DPO      ...

Before: what the first run measured before its first update. After: `ernie evaluate` of both runs, in their folders
`evaluation`. The last line is `ernie compare` of the two.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.evaluation.comparing import compare
from train.evaluation.results import RESULTS
from train.evaluation.terminal import bounds, comparison_table, make_console, mean

TASK = "digits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", type=Path, help="run folder of experiment=digits_weak")
    parser.add_argument("dpo", type=Path, help="run folder of experiment=digits_dpo")
    options = parser.parse_args()
    console = make_console()
    console.print(stages(options.sft, options.dpo))
    console.print("after DPO, with after SFT as before:")
    console.print(comparison_table(compare(options.sft / "evaluation", options.dpo / "evaluation", seed=0)))
    return 0


def stages(sft: Path, dpo: Path) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"held-out {TASK}")
    for name in ("right", "score", "95 %"):
        table.add_column(name, justify="right")
    with (sft / "metrics.jsonl").open(encoding="utf-8") as lines:
        untrained = json.loads(next(lines))
    assert untrained["step"] == 0, "the run's first line is what it measured before its first update"
    total = int(untrained["eval_total"])
    interval = {name: untrained[f"eval_accuracy_{name}"] for name in ("low", "high")}
    rows = [("before", total, {"mean": untrained["eval_accuracy"], **interval})]
    rows += [(name, *_score(run / "evaluation")) for name, run in (("after SFT", sft), ("after DPO", dpo))]
    for name, total, score in rows:
        table.add_row(name, f"{round(score['mean'] * total)} of {total}", mean(score), bounds(score))
    return table


def _score(evaluation: Path) -> tuple[int, dict[str, Any]]:
    task = json.loads((evaluation / RESULTS).read_text("utf-8"))["tasks"][TASK]
    return task["questions"], task["score"]


if __name__ == "__main__":
    sys.exit(main())
