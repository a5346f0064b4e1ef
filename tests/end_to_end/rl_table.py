"""What reinforcement learning made of a model that can read and hardly knows its tool: before and after.

    python -m tests.end_to_end.rl_table runs/zoom_cold runs/zoom_rl                 (the last act of `make demo`)

    held-out zoom        right     score       95 %  used tools  worked
    ────────────────────────────────────────────────────────────────────
    cold start       49 of 200    24.5 %  18.5–30.5       100 %   100 %
    after RL        ...

Both are what `ernie evaluate` of the runs wrote in their folders `evaluation`; then comes `ernie compare` of the two.
"""

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.table import Table

from train.evaluation.comparing import compare
from train.evaluation.results import RESULTS
from train.evaluation.terminal import bounds, comparison_table, make_console, mean

TASK = "zoom"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cold", type=Path, help="run folder of experiment=zoom_cold")
    parser.add_argument("rl", type=Path, help="run folder of experiment=zoom_rl")
    options = parser.parse_args()
    console = make_console()
    console.print(stages(options.cold, options.rl))
    console.print("after RL, with the cold start as before:")
    console.print(comparison_table(compare(options.cold / "evaluation", options.rl / "evaluation", seed=0)))
    return 0


def stages(cold: Path, rl: Path) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"held-out {TASK}")
    for name in ("right", "score", "95 %", "used tools", "worked"):
        table.add_column(name, justify="right")
    for name, run in (("cold start", cold), ("after RL", rl)):
        task = json.loads((run / "evaluation" / RESULTS).read_text("utf-8"))["tasks"][TASK]
        score, total = task["score"], task["questions"]
        worked = "–" if task["tool_success"] is None else f"{task['tool_success']:.0%}"
        table.add_row(
            name,
            f"{round(score['mean'] * total)} of {total}",
            mean(score),
            bounds(score),
            f"{task['tool_use']:.0%}",
            worked,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
