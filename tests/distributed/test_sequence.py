"""Ranks that share a packed row compute what one process does: every gradient, log-probability and router statistic."""

import pytest
import torch

from ernie_model.sequence_parallel import check_heads, cuts_of, deal_media, pixels_of
from tests.distributed.gloo import launch
from tests.distributed.shared_rows import CASES, one_row


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
    scale = max(g.abs().max().item() for g in one["gradients"].values() if g is not None)
    for name, gradient in one["gradients"].items():
        found = [rank["gradients"][name] for rank in several if rank["gradients"][name] is not None]
        assert bool(found) == (gradient is not None), name
        if gradient is not None:
            torch.testing.assert_close(sum(found), gradient, rtol=0, atol=1e-12 * scale, msg=name)
    if one["router"] is not None:
        for name, values in zip(one["router"], zip(*(rank["router"] for rank in several), strict=True), strict=True):
            torch.testing.assert_close(sum(values), name, rtol=1e-12, atol=1e-12)
    # no pixel is computed twice
    assert sum(rank["patches"] for rank in several) == one["patches"]
