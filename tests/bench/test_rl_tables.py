"""Tables and curves of reinforcement learning, of metrics that are written here."""

from pathlib import Path

from PIL import Image

from tests.bench import rl_comparison, zoom_rl


def lines(right: list[float]) -> list[dict]:
    """Metrics of a run with two updates to a rollout, evaluated before it and behind it."""
    out: list[dict] = [{"step": 0, "eval_accuracy": right[0]}]
    for number, accuracy in enumerate(right):
        for step in (2 * number + 1, 2 * number + 2):
            out.append(
                {
                    "step": step,
                    "rollout": float(number),
                    "accuracy": accuracy,
                    "tool_use": accuracy,
                    "tool_success": 1.0,
                    "step_s": 30.0,
                    "entropy": 0.1,
                    "mismatch_mean": 0.2,
                    "mismatch_masked": 0.05,
                    "groups_asked": 24.0,
                    "groups_learned": 16.0,
                }  # fmt: skip
            )
    return [*out, {"step": 2 * len(right), "eval_accuracy": right[-1]}]


def wide(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.width > 500


def test_seeds(tmp_path):
    before = {"questions": 200, "score": {"mean": 0.2, "low": 0.15, "high": 0.25}}
    after = {"questions": 200, "score": {"mean": 0.9, "low": 0.85, "high": 0.95}}
    shown = zoom_rl.table(before, [(7, lines([0.1, 0.5, 0.8]), after)]).splitlines()
    assert shown[2] == "| cold start | 20.0% of 200 | 15.0% to 25.0% | | | | | |"
    assert shown[3] == ("| seed 7 | 90.0% of 200 | 85.0% to 95.0% | 3 | 10% to 80% | 10% to 80% | 100% to 100% | 3.0 |")
    zoom_rl.draw({"seed 7": lines([0.1, 0.5, 0.8])}, tmp_path / "zoom.png")
    assert wide(tmp_path / "zoom.png")


def test_variants(tmp_path):
    runs = {"GRPO": [lines([0.2, 0.4, 0.1]), lines([0.2, 0.4, 0.6])], "GSPO": [lines([0.2, 0.9])]}
    shown = rl_comparison.table(runs).splitlines()
    assert shown[2] == "| GRPO | 20% | 10%, 60% | 20%, 60% | 32% | 5.0% | 1.50 |"
    assert shown[3] == "| GSPO | 20% | 90% | 90% | 55% | 5.0% | 1.50 |"
    rl_comparison.draw(runs, tmp_path / "curves.png", noise=0.1)
    assert wide(tmp_path / "curves.png")
