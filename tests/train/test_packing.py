"""Packing and dealing change which rows there are, never the gradient of a step."""

import itertools

import pytest
import torch

from data.pack import deal, filler, pack
from tests.train import small
from tests.train.test_loop import gradients

EXAMPLES = [
    small.example(seed, length, image=seed % 2 == 0, learned=1 + seed % 3)
    for seed, length in enumerate((9, 7, 12, 6, 10, 8))
]


def assert_same(one, other):
    assert one.keys() == other.keys()
    scale = max(value.abs().max().item() for value in one.values())
    for name in one:
        # float64 sums of some hundred terms in another order
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), (2, 5, 0, 4, 1, 3)])
@pytest.mark.parametrize("max_tokens", [12, 20, 52])
def test_any_order_and_any_rows_give_the_same_gradient(order, max_tokens):
    whole, _ = gradients([small.row(*EXAMPLES)])

    rows = pack([EXAMPLES[index] for index in order], max_tokens=max_tokens, lookahead=3)

    assert_same(whole, gradients(rows)[0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_dealing_gives_the_same_gradient(ranks):
    """Ranks divide by the targets of the whole step, so together they make the gradient of one rank with all rows."""
    rows = [small.row(example) for example in EXAMPLES]
    dealt = deal([row.num_tokens + 0.25 * (row.patch_PX is not None) for row in rows], ranks)

    assert sorted(itertools.chain(*dealt)) == list(range(6)) and {len(share) for share in dealt} == {6 // ranks}
    assert_same(gradients(rows)[0], gradients([rows[place] for share in dealt for place in share])[0])


def test_a_row_of_filler_changes_nothing():
    rows = [small.row(EXAMPLES[0]), small.row(*EXAMPLES[1:3])]
    plain, metrics = gradients(rows)

    with_filler, other = gradients([rows[0], filler(1), rows[1]])

    assert_same(plain, with_filler)
    assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-12) and other["units"] == metrics["units"]
