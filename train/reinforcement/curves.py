"""A run's numbers as curves over its updates: reward, tools, lengths, where attempts and gradients go, time.

They are read from metrics.jsonl, which every run writes and which a resumed run goes on with.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.chart import BLUE, GREEN, GREY, RED, VIOLET, YELLOW, Colour, Figure
from train.contact_sheet import INK
from train.reinforcement.time_split import PARTS
from train.reinforcement.zero_gradient import FATES

FILE = "curves.png"
POINTS = 400
"""Of a curve, at most: more are averaged."""

Series = tuple[str, str, Colour]
"""Key of metrics.jsonl, name, colour."""

SCORES: Sequence[Series] = (("reward", "reward", INK), ("reward_accuracy", "accuracy", BLUE))
TOOLS: Sequence[Series] = (("tool_use", "attempts with a call", VIOLET), ("tool_success", "calls that worked", GREEN))
TOKENS: Sequence[Series] = (
    ("tokens_mean", "all", INK),
    ("tokens_right", "of right attempts", GREEN),
    ("tokens_wrong", "of wrong ones", RED),
)
GRADIENT: Sequence[Series] = (
    ("zero_left", "of the nominal gradient is left", INK),
    ("zero_tokens_clipped", "tokens clipped", BLUE),
    ("zero_tokens_masked", "tokens masked", RED),
)
MISMATCH: Sequence[Series] = (
    ("mismatch_mean", "mean", VIOLET),
    ("kl_old_k3", "policy from the one that sampled", BLUE),
)
FATE_COLOURS = {
    "learned": GREEN,
    "waiting": "#a9d3b5",
    "right": BLUE,
    "wrong": RED,
    "equal": YELLOW,
    "truncated": VIOLET,
    "unscored": GREY,
    "failed": INK,
    "left_out": "#8c6d46",
    "surplus": "#d6dae0",
}
TIME_COLOURS = dict(zip(PARTS, (BLUE, YELLOW, GREY, VIOLET, RED, GREEN), strict=True))


def history(folder: Path) -> list[dict[str, Any]]:
    """Numbers of every logged update; evaluations are lines of their own."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [one for one in map(json.loads, lines) if "rollout" in one or "eval_accuracy" in one]


def rewards_of(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(rollout, mean reward)."""
    by_rollout = {int(one["rollout"]): one["reward"] for one in lines if "rollout" in one and "reward" in one}
    return sorted(by_rollout.items())


def draw(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write the picture to `path` (PNG). Raises ValueError: no update was logged."""
    updates = [one for one in lines if "rollout" in one]
    if not updates:
        raise ValueError("no update was logged yet, so there are no curves to draw")
    last = updates[-1]
    about = f"{last['step']} updates, {int(last['rollout']) + 1} rollouts"
    if "reward" in last:
        about += f"; reward of the last one {last['reward']:.3f}"
    tools = any(one.get("tool_use") for one in updates)
    kinds = [SCORES, TOKENS, GRADIENT, MISMATCH, *([TOOLS] if tools else [])]
    panels = sum(any(key in one for one in updates for key, *_ in kind) for kind in kinds) + 2
    figure = Figure(title, about, columns=2, rows=math.ceil(panels / 2))
    span = (updates[0]["step"] - 1, last["step"])
    held_out = [(one["step"], one["eval_accuracy"]) for one in lines if "eval_accuracy" in one]
    _lines(figure, "reward of all attempts", span, updates, SCORES, points=(held_out, "held out", RED))
    if tools:
        _lines(figure, "tools", span, updates, TOOLS, share=True)
    _lines(figure, "tokens sampled in an attempt", span, updates, TOKENS)
    of_fate = [(f"zero_attempts_{fate}", FATES[fate], tone) for fate, tone in FATE_COLOURS.items()]
    _stack(figure, "what became of the attempts asked", span, updates, of_fate)
    _lines(figure, "gradient", span, updates, GRADIENT, share=True)
    _lines(figure, "engine and trainer: |log p - log p| in nats", span, updates, MISMATCH)
    of_time = [(f"seconds_{part}", part.replace("_", " "), tone) for part, tone in TIME_COLOURS.items()]
    _stack(figure, "time of a rollout with its updates", span, updates, of_time, whole="seconds_rollout")
    figure.save(path)


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """As many at most, each the mean of its neighbours; a mean leaves out what is not a number."""
    size = max(1, -(-len(points) // most))
    out = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        ys = [y for _, y in some if math.isfinite(y)]
        out.append((sum(x for x, _ in some) / len(some), sum(ys) / len(ys) if ys else math.nan))
    return out


def _values(updates: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    # What is not finite is a word in metrics.jsonl.
    return [(one["step"], float(one[key]) if key in one else math.nan) for one in updates]


def _lines(
    figure: Figure,
    heading: str,
    span: tuple[float, float],
    updates: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    *,
    share: bool = False,
    points: tuple[Sequence[tuple[float, float]], str, Colour] | None = None,
) -> None:
    drawn = [(thinned(_values(updates, key)), name, colour) for key, name, colour in series]
    drawn = [one for one in drawn if any(math.isfinite(y) for _, y in one[0])]
    if not drawn:
        return
    more = [] if points is None or not points[0] else [points]
    ys = [y for values, _, _ in [*drawn, *more] for _, y in values if math.isfinite(y)] or [0.0]
    high = 1.0 if share else max(ys) + 0.05 * (max(ys) - min(min(ys), 0.0))
    panel = figure.panel(heading, x=span, y=(min(0.0, *ys), high), under="updates", share=share)
    for values, _, colour in [*drawn, *more]:
        panel.line([x for x, _ in values], [y for _, y in values], colour)
    panel.legend([(name, colour) for _, name, colour in [*drawn, *more]])


def _stack(
    figure: Figure,
    heading: str,
    span: tuple[float, float],
    updates: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    *,
    whole: str | None = None,
) -> None:
    """`whole`: the key of what the others are shares of; None: they are shares."""
    panel = figure.panel(heading, x=span, y=(0, 1), under="updates", share=True)
    if whole is not None:
        keys = [key for key, *_ in series]
        updates = [{**one, **{key: one.get(key, 0.0) / one[whole] for key in keys}} for one in updates if whole in one]
    layers = [
        ([y if math.isfinite(y) else 0.0 for _, y in thinned(_values(updates, key))], name, colour)
        for key, name, colour in series
    ]
    layers = [one for one in layers if any(one[0])]
    if not layers:
        return
    xs = [x for x, _ in thinned(_values(updates, "step"))]
    edges = [span[0], *((a + b) / 2 for a, b in zip(xs, xs[1:], strict=False)), span[1]]
    panel.stack(edges, [(values, colour) for values, _, colour in layers])
    panel.legend([(name, colour) for _, name, colour in layers])
