"""Ranks that share a packed row compute what one process does: every gradient, log-probability and router statistic."""

import json
import sys

import pytest
import torch

from ernie_model.sequence_parallel import check_heads, cuts_of, deal_media, pixels_of
from tests.distributed.gloo import launch
from tests.distributed.shared_rows import CASES, DENSE, STEPS, one_row, one_step
from tests.train import small
from train import sft
from train.config import ModelConfig, ParallelConfig, UserError
from train.parallel.layout import Layout, build_layout
from train.parallel.rows import check_shareable


def test_cuts_by_hand():
    assert cuts_of(7, 2) == (0, 3, 7)
    assert cuts_of(3, 4) == (0, 0, 1, 2, 3)  # rank 0 has nothing
    assert cuts_of(5, 1) == (0, 5)


def test_media_are_dealt_by_patches_and_videos_by_pairs_of_frames():
    image, video = (1, 10, 10), (4, 5, 10)
    assert deal_media([image, video], 1) == [[image, video]]
    assert deal_media([image, video], 2) == [[image], [video]]
    assert deal_media([image, video], 3) == [[image], [(2, 5, 10)], [(2, 5, 10)]]
    assert deal_media([video, video], 2) == [[video], [video]]
    assert deal_media([image], 3) == [[], [image], []]
    assert deal_media([(12, 2, 2)], 4) == [[(2, 2, 2)], [(4, 2, 2)], [(2, 2, 2)], [(4, 2, 2)]]  # 6 pairs on 4 ranks
    assert deal_media([], 2) == [[], []]
    assert pixels_of([image, video], 2, 0) == slice(0, 100) and pixels_of([image, video], 2, 1) == slice(100, 300)


@pytest.mark.parametrize("queries, keys, ranks", [(20, 4, 2), (20, 4, 4), (16, 2, 8), (64, 8, 16), (4, 4, 1)])
def test_heads_that_can_be_shared(queries, keys, ranks):
    check_heads(queries, keys, ranks)


@pytest.mark.parametrize("queries, keys, ranks", [(20, 4, 8), (20, 4, 10), (16, 2, 3), (12, 6, 4)])
def test_heads_that_cannot_are_refused_with_what_fits(queries, keys, ranks):
    with pytest.raises(ValueError, match=rf"{queries} query heads and {keys} key/value .* {ranks} ranks.*model: 1, 2"):
        check_heads(queries, keys, ranks)


def test_settings_that_cannot_be_are_refused_before_anything_is_read():
    model = ModelConfig(config=DENSE.to_json(), processor="tiny")
    check_shareable(model, 4)
    with pytest.raises(UserError, match=r"parallel\.sequence is 3: 4 query heads and 2 key/value heads"):
        check_shareable(model, 3)
    with pytest.raises(UserError, match=r"parallel\.sequence is 2, which does not divide the 1 processes"):
        build_layout(ParallelConfig(sequence=2, cpu=True), small.accelerator())


@pytest.fixture(scope="module", params=(2, 4))
def ranks(request, tmp_path_factory) -> list[dict[str, dict]]:
    out = tmp_path_factory.mktemp("rows") / "out"
    launch(request.param, "-m", "tests.distributed.shared_rows", str(out))
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_a_row_equal_one(ranks, case):
    one, several = one_row(CASES[case]), [rank[case] for rank in ranks]
    # float64, sums of some hundred terms in another order
    for rank in several:
        torch.testing.assert_close(rank["logprob_T"], one["logprob_T"], rtol=0, atol=1e-12)
        assert torch.equal(rank["correct_T"], one["correct_T"])
        torch.testing.assert_close(rank["entropy_T"], one["entropy_T"], rtol=0, atol=1e-12)
    scale = max(g.abs().max().item() for g in one["gradients"].values() if g is not None)
    for name, gradient in one["gradients"].items():
        found = [rank["gradients"][name] for rank in several if rank["gradients"][name] is not None]
        assert bool(found) == (gradient is not None), name
        if gradient is not None:
            torch.testing.assert_close(sum(found), gradient, rtol=0, atol=1e-12 * scale, msg=name)
    if one["router"] is not None:
        for name, values in zip(one["router"], zip(*(rank["router"] for rank in several), strict=True), strict=True):
            torch.testing.assert_close(sum(values), name, rtol=1e-12, atol=1e-12)
    if one["chosen_LTK"] is not None:
        assert torch.equal(torch.cat([rank["chosen_LTK"] for rank in several], dim=1), one["chosen_LTK"])
    # no pixel is computed twice
    assert sum(rank["patches"] for rank in several) == one["patches"]


@pytest.mark.parametrize("step", STEPS)
def test_an_update_is_that_of_one_process(ranks, step):
    """Two ranks share all rows; of four, two pairs share half of them each."""
    one, two = one_step(small.accelerator(), Layout(), STEPS[step]), ranks[0][step]
    scale = max(g.abs().max().item() for g in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-12 * scale, msg=name)
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-12), name
    for name, bias in one["biases"].items():
        assert torch.equal(bias, two["biases"][name]) and bias.any() == bool(STEPS[step].objective.bias_update), name


def test_what_the_reading_rank_cannot_read_ends_all(ranks):
    assert [rank["error"] for rank in ranks] == ["too many bad records"] * len(ranks)


def test_a_whole_run_in_which_two_ranks_share_every_row_equals_one(tmp_path, monkeypatch):
    settings = [
        "experiment=digits",
        "tracker=none",
        "run.steps=3",
        "optim.warmup_steps=1",
        "data.max_tokens=128",
        "data.accumulation=2",
        "evaluate.every=2",
        "evaluate.max_examples=8",
        "evaluate.sheet=2",
        "parallel.cpu=true",
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    launch(2, "-m", "train.sft", *settings, f"run.folder={two}", "parallel.sequence=2")
    monkeypatch.setattr(sys, "argv", ["ernie sft", *settings, f"run.folder={one}"])
    sft.main()
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "eval_nll", "grad_norm", "flops", "tokens", "units", "patches", "eval_total"}:
            # float32 sums in another order, through 3 updates of AdamW
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
    # a row is told of once, by the rank that reads it
    seen = [[json.loads(line) for line in (two / "data" / f"rank-{r}.jsonl").read_text().splitlines()] for r in (0, 1)]
    assert [len(line["rows"]) for line in seen[0]] == [2, 2, 2] and not seen[1]
