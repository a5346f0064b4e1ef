"""Two gloo processes compute the gradient of one process, also when one of them never sees an image."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.gloo import launch
from tests.distributed.one_step import CASES, one_step
from tests.train import small
from train import checkpoint, sft


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    launch(2, "-m", "tests.distributed.one_step", str(out))
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks, case):
    first, second = CASES[case].first, CASES[case].second
    one = one_step(small.accelerator(), first + second, CASES[case])
    two = two_ranks[case]
    scale = max(g.abs().max().item() for g in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        # float64 sums of a few hundred terms in another order
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-12 * scale, msg=name)
    with_image = any(name.startswith("image") for name in first + second)
    if not CASES[case].adapters:  # they sit in the last layer, where no text sees an image: what counts is no hang
        assert one["gradients"]["model.vision.patch_embed.weight"].any() == with_image
    for key in ("loss", "accuracy", "units", "tokens", "grad_norm", "router_text_imbalance", "router_text_balance"):
        assert math.isclose(one["metrics"][key], two["metrics"][key], rel_tol=1e-12), key
    for name, bias in one["biases"].items():
        assert torch.equal(bias, two["biases"][name]) and bias.any() == bool(CASES[case].objective.bias_update), name
    assert two["flag"] and not one["flag"]  # what one rank is asked, all do


def test_a_whole_run_on_two_ranks_equals_one(tmp_path, monkeypatch):
    """The same rows per update, dealt to one rank or to two: the same losses, accuracy and (nearly) weights."""
    settings = [
        "experiment=digits",
        "tracker=none",
        "run.steps=4",
        "run.save_every=2",
        "optim.warmup_steps=1",
        "data.max_tokens=128",
        "evaluate.every=2",
        "evaluate.max_examples=8",
        "evaluate.sheet=2",
        "parallel.cpu=true",
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    launch(2, "-m", "train.sft", *settings, f"run.folder={two}", "data.accumulation=1")
    monkeypatch.setattr(sys, "argv", ["ernie sft", *settings, f"run.folder={one}", "data.accumulation=2"])
    sft.main()

    def records(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    for a, b in zip(records(one), records(two), strict=True):
        assert a["step"] == b["step"]
        for key in ("loss", "eval_nll"):
            # float32 sums in another order, through 4 updates of AdamW
            assert (key in a) == (key in b)
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-4), (a["step"], key)
        for key in ("tokens", "units", "eval_total"):
            assert a.get(key) == b.get(key)
    # and a run begun on two ranks goes on with one: the checkpoint does not know how many there were
    (step,) = (path for path in checkpoint.complete(two / "checkpoints") if path.name == "step-000002")
    monkeypatch.setattr(
        sys,
        "argv",
        ["ernie sft", *settings, f"run.folder={tmp_path / 'on'}", "data.accumulation=2", f"run.resume={step}"],
    )
    sft.main()
    on, whole = records(tmp_path / "on"), records(two)
    losses = [[r["loss"] for r in rs if r["step"] > 2 and "loss" in r] for rs in (on, whole)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
