"""How difficult the prompts of a run were, which groups were trained on, and why others were not: four charts.

┌ rollouts: pass rates of the groups asked ┐ ┌ rollouts: what became of the groups asked ┐
│ shaded, their mean a line                │ │ mixed, all right, all wrong, ...; trained │
├ all prompts asked so far, by pass rate ──┤ ├ rollouts: all prompts ─────────────────────┤
│ as the sampler believes it to be now     │ │ never asked, active, resting (why), retired│
└──────────────────────────────────────────┘ └────────────────────────────────────────────┘
"""

import math
from collections.abc import Sequence
from pathlib import Path

from train.chart import BLUE, GREEN, GREY, RED, VIOLET, YELLOW, Figure, mixed_colour
from train.contact_sheet import INK
from train.reinforcement.difficulty import BINS, RATES, DifficultySampler, Span, Status, Verdict
from train.tracking import Tracker

FILE = "difficulty.png"
MAX_ROWS = 16
"""Of the shaded chart: one for each number of right attempts, or fewer."""
VERDICTS = {
    Verdict.MIXED: ("mixed", GREEN),
    Verdict.RIGHT: ("all right", BLUE),
    Verdict.WRONG: ("all wrong", RED),
    Verdict.EQUAL: ("all equal", YELLOW),
    Verdict.UNSCORED: ("not scored", VIOLET),
}
STATUSES = {
    Status.ACTIVE: ("active", GREEN),
    Status.RESTING_RIGHT: ("resting: right", "#8db4ea"),
    Status.RETIRED: ("retired", BLUE),
    Status.RESTING_WRONG: ("resting: wrong", RED),
    Status.RESTING_EQUAL: ("resting: equal", YELLOW),
    Status.RESTING_UNSCORED: ("resting: not scored", VIOLET),
    Status.FRESH: ("never asked", GREY),
}


def draw(sampler: DifficultySampler, path: Path, title: str) -> None:
    """Write the picture to `path` (PNG). Before the first rollout is over there is nothing to draw: ValueError."""
    history = sampler.history
    if not history:
        raise ValueError("no rollout is over yet, so there is no difficulty to draw")
    asked, mixed = sum(span.asked for span in history), sum(span.verdicts[Verdict.MIXED] for span in history)
    visited = sum(sampler.pass_rates())
    about = f"{sampler.step} rollouts, {asked} groups asked, {mixed / max(1, asked):.0%} of them mixed"
    if all(span.trained >= 0 for span in history):
        about += f", {sum(span.trained for span in history)} trained on"
    about += f"; {visited} of {len(sampler.visits)} prompts asked"
    figure = Figure(title, about, columns=2, rows=2)
    edges = [float(span.step) for span in history] + [float(sampler.step)]
    _difficulty(figure, history, edges, sampler.attempts)
    _verdicts(figure, history, edges)
    _beliefs(figure, sampler.pass_rates())
    _statuses(figure, history, edges)
    figure.save(path)


def log(sampler: DifficultySampler, folder: Path, trackers: Sequence[Tracker], step: int) -> None:
    """Draw FOLDER/difficulty.png anew and show it in the trackers."""
    path = folder / FILE
    draw(sampler, path, f"difficulty, step {step}")
    for tracker in trackers:
        tracker.log_image("difficulty", path, step)


def _difficulty(figure: Figure, history: Sequence[Span], edges: Sequence[float], attempts: int) -> None:
    panel = figure.panel(
        "right attempts in the groups asked", x=(edges[0], edges[-1]), y=(0, 1), under="rollouts", share=True
    )
    rows = min(attempts, MAX_ROWS)
    for n, span in enumerate(history):
        counts = [0] * (rows + 1)
        for rate, count in enumerate(span.rates):
            counts[round(rate * rows / RATES)] += count
        for row, count in enumerate(counts):
            if count:
                # The root lets single groups be seen beside the many that are all right.
                shade = mixed_colour(0.08 + 0.85 * math.sqrt(count / span.scored), VIOLET)
                panel.cell(edges[n], (row - 0.5) / rows, edges[n + 1], (row + 0.5) / rows, shade)
    panel.line(_middles(edges), [span.accuracy / span.scored if span.scored else math.nan for span in history], INK)
    panel.legend([("many groups", mixed_colour(0.9, VIOLET)), ("few", mixed_colour(0.25, VIOLET)), ("mean", INK)])


def _verdicts(figure: Figure, history: Sequence[Span], edges: Sequence[float]) -> None:
    highest = max(max(span.asked, span.trained) / span.rollouts for span in history)
    panel = figure.panel("groups of a rollout", x=(edges[0], edges[-1]), y=(0, highest * 1.05), under="rollouts")
    layers = [([span.verdicts[kind] / span.rollouts for span in history], tone) for kind, (_, tone) in VERDICTS.items()]
    panel.stack(edges, layers)
    names = [look for kind, look in VERDICTS.items() if any(span.verdicts[kind] for span in history)]
    if any(span.trained >= 0 for span in history):
        trained = [span.trained / span.rollouts if span.trained >= 0 else math.nan for span in history]
        panel.line(_middles(edges), trained, INK)
        names.append(("trained on", INK))
    panel.legend(names)


def _beliefs(figure: Figure, rates: Sequence[int]) -> None:
    panel = figure.panel("prompts asked, by how often they are right now", x=(0, 1), y=(0, max(*rates, 1) * 1.08))
    for n, count in enumerate(rates):
        panel.cell(n / BINS, 0, (n + 1) / BINS, count, VIOLET, gap=2)
    panel.legend([("believed share of right attempts", VIOLET)])


def _statuses(figure: Figure, history: Sequence[Span], edges: Sequence[float]) -> None:
    total = sum(history[-1].statuses)
    panel = figure.panel("prompts", x=(edges[0], edges[-1]), y=(0, total), under="rollouts")
    layers = [([float(span.statuses[kind]) for span in history], tone) for kind, (_, tone) in STATUSES.items()]
    panel.stack(edges, layers)
    panel.legend([look for kind, look in STATUSES.items() if any(span.statuses[kind] for span in history)])


def _middles(edges: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
