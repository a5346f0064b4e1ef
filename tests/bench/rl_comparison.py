"""Which training survives an engine that disagrees with the trainer?  python -m tests.bench.rl_comparison

`ernie rl experiment=zoom_rl` several times, from the same cold start and with the same seed, with an engine whose
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-4, help="twice that of the recipe, so that errors show")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/rl_comparison.png"))
    parser.add_argument("settings", nargs="*", help="further settings of `ernie rl`, for all variants")
    options = parser.parse_args()
    train("sft", "digits")
    train("sft", COLD)
    runs = {}
    for number, (label, settings) in enumerate(VARIANTS.items()):
        name = f"zoom_rl_noise{options.noise:g}_lr{options.lr:g}_{number}_{options.seed}"
        train(
            "rl", "zoom_rl", f"run.name={name}", f"run.steps={options.steps}", f"run.seed={options.seed}",
            f"rollout.noise={options.noise}", f"optim.lr={options.lr}", "mismatch.warn={}", "mismatch.stop={}",
            "rollout.max_idle=null", *settings, *options.settings, name=name,
        )  # fmt: skip
        runs[label] = metrics(name)
    print(table(runs))
    draw(runs, options.picture, options.noise)
    print(f"\ncurves: {options.picture}")
    return 0


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown."""
    shown = [
        "| | held out, before | after | best | sampled right, last rollouts | tokens masked | asked per learned |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, lines in runs.items():
        held = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
        last = rollouts(lines)[-LAST:]
        masked = [line["mismatch_masked"] for line in lines if "mismatch_masked" in line]
        asked, learned = (sum(line[f"groups_{name}"] for line in rollouts(lines)) for name in ("asked", "learned"))
        shown.append(
            f"| {label} | {held[0]:.1%} | {held[-1]:.1%} | {max(held):.1%} "
            f"| {sum(line['accuracy'] for line in last) / len(last):.1%} "
            f"| {sum(masked) / max(len(masked), 1):.1%} | {asked / max(learned, 1):.2f} |"
        )
    return "\n".join(shown)


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, noise: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(13, 3.2), constrained_layout=True)
    for number, (label, lines) in enumerate(runs.items()):
        for panel, key in zip(panels, PANELS, strict=True):
            chosen = rollouts(lines) if key == "accuracy" else lines
            points = [(line["step"], line[key]) for line in chosen if key in line]
            if points:
                marker = "o" if key == "eval_accuracy" else None
                panel.plot(*zip(*points, strict=True), color=f"C{number}", marker=marker, markersize=4, label=label)
    for panel, title in zip(panels, PANELS.values(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("update")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
    panels[0].set_ylim(0, 1.02)
    panels[1].set_ylim(0, 1.02)
    panels[0].legend(fontsize=7, loc="center right")
    figure.suptitle(f"engine's weights disturbed by {noise:g} of each matrix's standard deviation", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
