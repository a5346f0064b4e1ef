"""Which training survives an engine that disagrees?  python -m tests.bench.rl_comparison [--seeds 0,1,2]

`ernie rl experiment=zoom_rl` several times, from the same cold start and with the same seeds, with an engine whose
weights are disturbed by noise, drawn anew for each rollout (`rollout.noise`): what it samples, and the
log-probabilities it tells, are those of a somewhat different model. Some runs correct for it, some don't:

    GRPO               one ratio per token, no correction
    GSPO               one ratio per attempt, no correction
    GSPO + IcePop      tokens whose k = p_old / p_engine is outside of the band teach nothing, others are weighed by k
    ... uniform        the same, prompts drawn evenly; groups of equal attempts are left out, and others are asked

Draws the curves of all of them and prints a table. What is there in runs/ is not run again.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.zoom_rl import COLD, metrics, rollouts, train

Metrics = Sequence[Mapping[str, Any]]

VARIANTS: dict[str, tuple[str, ...]] = {
    "GRPO": ("objective=grpo", "objective.correction=none"),
    "GSPO": ("objective=gspo_plain",),
    "GSPO + IcePop": ("objective=gspo",),
    "GSPO + IcePop, uniform": ("objective=gspo", "sampler.kind=uniform"),
}
PANELS = {
    "eval_accuracy": "held out, right",
    "accuracy": "sampled, right",
    "entropy": "entropy, nats",
    "mismatch_mean": "|log p_old - log p_engine|, mean",
}
LAST = 5
"""Rollouts whose mean the table shows."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, default=2e-4, help="twice that of the recipe, so that errors show")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/rl_comparison.png"))
    parser.add_argument("settings", nargs="*", help="further settings of `ernie rl`, for all variants")
    options = parser.parse_args()
    train("sft", "digits")
    train("sft", COLD)
    runs: dict[str, list[Metrics]] = {label: [] for label in VARIANTS}
    for seed in map(int, options.seeds.split(",")):
        for number, (label, settings) in enumerate(VARIANTS.items()):
            name = f"zoom_rl_noise{options.noise:g}_lr{options.lr:g}_{number}_{seed}"
            train(
                "rl", "zoom_rl", f"run.name={name}", f"run.steps={options.steps}", f"run.seed={seed}",
                f"rollout.noise={options.noise}", f"optim.lr={options.lr}", "mismatch.warn={}", "mismatch.stop={}",
                "rollout.max_idle=null", *settings, *options.settings, name=name,
            )  # fmt: skip
            runs[label].append(metrics(name))
    print(table(runs))
    draw(runs, options.picture, options.noise)
    print(f"\ncurves: {options.picture}")
    return 0


def table(runs: Mapping[str, Sequence[Metrics]]) -> str:
    """Markdown; `runs` are the metrics of each seed. What is one number is a mean over seeds."""
    shown = [
        "| | held out, before | after, by seed | best on the way | sampled right, last rollouts | tokens masked "
        "| asked per learned |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, seeds in runs.items():
        held = [[line["eval_accuracy"] for line in lines if "eval_accuracy" in line] for lines in seeds]
        after, best = (", ".join(f"{of(one):.0%}" for one in held) for of in (lambda one: one[-1], max))
        last = [_mean([line["accuracy"] for line in rollouts(lines)[-LAST:]]) for lines in seeds]
        masked = [_mean([line["mismatch_masked"] for line in lines if "mismatch_masked" in line]) for lines in seeds]
        asked, learned = (
            sum(line[f"groups_{name}"] for lines in seeds for line in rollouts(lines)) for name in ("asked", "learned")
        )
        shown.append(
            f"| {label} | {held[0][0]:.0%} | {after} | {best} "
            f"| {_mean(last):.0%} | {_mean(masked):.1%} | {asked / max(learned, 1):.2f} |"
        )
    return "\n".join(shown)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def draw(runs: Mapping[str, Sequence[Metrics]], path: Path, noise: float) -> None:
    """A row of panels for each of `VARIANTS`, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = len(runs), len(PANELS)
    figure, rows = pyplot.subplots(
        *shape, figsize=(13, 1 + 1.9 * len(runs)), sharex=True, sharey="col", squeeze=False, constrained_layout=True
    )
    for number, (label, seeds) in enumerate(runs.items()):
        for panel, (key, title) in zip(rows[number], PANELS.items(), strict=True):
            for seed, lines in enumerate(seeds):
                chosen = rollouts(lines) if key == "accuracy" else lines
                points = [(line["step"], line[key]) for line in chosen if key in line]
                if points:
                    marker = "o" if key == "eval_accuracy" else None
                    steps, values = zip(*points, strict=True)
                    panel.plot(steps, values, color=f"C{number}", alpha=1 - 0.25 * seed, marker=marker, markersize=4)
            panel.grid(alpha=0.25)
            if not number:
                panel.set_title(title, fontsize=10)
            if number == len(runs) - 1:
                panel.set_xlabel("update")
        rows[number][0].set_ylabel(label, fontsize=9)
    for panel, key in zip(rows[0], PANELS, strict=True):  # of the whole column, when all of it is drawn
        panel.set_ylim(0, 1.02 if "accuracy" in key else None)
    figure.suptitle(f"engine's weights disturbed by {noise:g} of each matrix's standard deviation", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
