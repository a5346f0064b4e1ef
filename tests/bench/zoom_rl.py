"""The zoom demonstration over several seeds:  python -m tests.bench.zoom_rl [--seeds 0,1,2]

Runs what is missing of it, one run at a time: the reader (experiment=digits), the cold start (experiment=zoom_cold),
then `ernie rl experiment=zoom_rl` for each seed, from the same cold start; and asks each of them all held-out questions
by `ernie evaluate`, greedily. Prints a table and draws the curves of the rollouts.

The time of training is that of its updates, rollouts included, without evaluation and without the program's start.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNS = Path("runs")
COLD = "zoom_cold"
TASK = "zoom"
NO_TOOL = 0.1
"""Of the questions, by a guess: one of ten digits."""
SHOWN = {"accuracy": "right", "tool_use": "used the tool", "tool_success": "calls that worked"}
"""Of attempts, sampled at temperature 1."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/zoom_rl.png"))
    parser.add_argument("settings", nargs="*", help="further settings of `ernie rl`")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    train("sft", "digits")
    train("sft", COLD)
    before = evaluated(COLD)
    rows = []
    for seed in seeds:
        name = f"zoom_rl_{seed}"
        train("rl", "zoom_rl", f"run.name={name}", f"run.seed={seed}", *options.settings, name=name)
        rows.append((seed, metrics(name), evaluated(name)))
    print(table(before, rows))
    draw({f"seed {seed}": lines for seed, lines, _ in rows}, options.picture)
    print(f"\ncurves: {options.picture}")
    return 0


def train(command: str, experiment: str, *settings: str, name: str | None = None) -> None:
    """`ernie COMMAND experiment=EXPERIMENT`, unless it is done; it goes on where it was broken off."""
    if not (RUNS / (name or experiment) / "export" / "config.json").exists():
        ernie(command, f"experiment={experiment}", "tracker=none", *settings)


def ernie(*arguments: str) -> None:
    print("ernie", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "train.cli", *arguments], check=True, stdout=sys.stderr)


def evaluated(name: str) -> dict[str, Any]:
    """Results of the task, asked once, by the likeliest tokens."""
    folder = RUNS / name / "evaluation"
    if not (folder / "results.json").exists():
        ernie(
            "evaluate", f"checkpoint={RUNS / name}", f"tasks=[{TASK}]", "precision=fp32", "likelihood=false",
            "tracker=none", f"output={folder}",
        )  # fmt: skip
    return json.loads((folder / "results.json").read_text("utf-8"))["tasks"][TASK]


def metrics(name: str) -> list[dict[str, Any]]:
    with (RUNS / name / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rollouts(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The line of each rollout's first update."""
    found: dict[float, Mapping[str, Any]] = {}
    for line in lines:
        if "rollout" in line:
            found.setdefault(line["rollout"], line)
    return list(found.values())


def table(before: Mapping[str, Any], rows: Sequence[tuple[int, Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> str:
    """Markdown; `rows` are (seed, metrics of its run, results of its evaluation)."""
    shown = [
        "| | held out, right | 95 % | rollouts | sampled right | used the tool | calls that worked | minutes |",
        "|---|---|---|---|---|---|---|---|",
        f"| cold start | {_right(before)} | {_interval(before)} | | | | | |",
    ]
    for seed, lines, after in rows:
        asked = rollouts(lines)
        first, last = asked[0], asked[-1]
        change = " | ".join(f"{first.get(key, 0.0):.0%} to {last.get(key, 0.0):.0%}" for key in SHOWN)
        minutes = sum(line.get("step_s", 0.0) for line in lines) / 60
        shown.append(
            f"| seed {seed} | {_right(after)} | {_interval(after)} | {len(asked)} | {change} | {minutes:.1f} |"
        )
    return "\n".join(shown)


def _right(result: Mapping[str, Any]) -> str:
    return f"{result['score']['mean']:.1%} of {result['questions']}"


def _interval(result: Mapping[str, Any]) -> str:
    return f"{result['score']['low']:.1%} to {result['score']['high']:.1%}"


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A panel for each of `SHOWN`, by rollout; held-out accuracy as points in the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHOWN), figsize=(10, 3), sharey=True, constrained_layout=True)
    for number, (label, lines) in enumerate(runs.items()):
        asked = rollouts(lines)
        at = {line["step"]: line["rollout"] for line in lines if "rollout" in line}
        for panel, key in zip(panels, SHOWN, strict=True):
            panel.plot(
                [line["rollout"] + 1 for line in asked],
                [line.get(key, float("nan")) for line in asked],
                color=f"C{number}",
                label=label,
            )
        held = [(at.get(line["step"], -1) + 1, line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
        panels[0].plot(*zip(*held, strict=True), "o", color=f"C{number}", markersize=4)
    panels[0].axhline(NO_TOOL, color="grey", linewidth=0.8, linestyle=":")
    panels[0].plot([], [], "o", color="grey", markersize=4, label="held out, greedy")
    panels[0].plot([], [], ":", color="grey", label="a guess")
    for panel, title in zip(panels, SHOWN.values(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("rollout")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
