"""Packing, on rows small enough to draw."""

import random

import pytest
import torch

from data.encode import Example
from data.errors import DataError
from data.pack import Packer, Sized, collate, deal, pack


def packer_of(items, **options):
    waiting = iter([item if isinstance(item, Sized) else Sized(*item) for item in items])
    return Packer(lambda: next(waiting, None), **options)


def rows_of(packer):
    rows = []
    while row := packer.next_row():
        rows.append("".join(sized.item * sized.tokens for sized in row))
    return rows


def test_the_drawing_in_the_docstring():
    items = [("A", 6), ("B", 7), ("C", 3), ("D", 4), ("E", 2), ("F", 1), ("G", 5)]

    packer = packer_of(items, max_tokens=10, lookahead=3)

    assert rows_of(packer) == ["AAAAAACCC", "BBBBBBBEEF", "DDDDGGGGG"]


def test_the_buffer_is_the_one_drawn():
    packer = packer_of(
        [("A", 6), ("B", 7), ("C", 3), ("D", 4), ("E", 2), ("F", 1), ("G", 5)], max_tokens=10, lookahead=3
    )

    packer.next_row()

    assert packer.state_dict() == [["B", 7, 0], ["D", 4, 0], ["E", 2, 0]]


def test_lookahead_one_keeps_the_order():
    packer = packer_of([("A", 6), ("B", 7), ("C", 3), ("D", 4)], max_tokens=10, lookahead=1)

    assert rows_of(packer) == ["AAAAAA", "BBBBBBBCCC", "DDDD"]


def test_patches_have_a_budget_of_their_own():
    #             tokens would all fit in one row; 30 patches let only A and C share
    items = [Sized("A", 2, 20), Sized("B", 2, 20), Sized("C", 2, 10), Sized("D", 2, 0)]

    packer = packer_of(items, max_tokens=10, max_patches=30, lookahead=3)

    assert rows_of(packer) == ["AACCDD", "BB"]


def test_everything_is_packed_once_and_nobody_waits_long():
    draw = random.Random(0)
    items = [Sized((number,), draw.randint(1, 100)) for number in range(500)]
    packer = packer_of(items, max_tokens=100, lookahead=8)

    rows = []
    while row := packer.next_row():
        assert sum(sized.tokens for sized in row) <= 100
        oldest = min((sized.item[0] for sized in packer.buffer), default=None)
        rows.append([sized.item[0] for sized in row])
        # The longest waiting opens every row, so at its end whoever is left arrived after the row's first.
        assert oldest is None or oldest > rows[-1][0]

    assert sorted(number for row in rows for number in row) == list(range(500))


def test_fill_of_lognormal_lengths():
    """Lengths like those of chats: 64 to 2048, median 400. A look-ahead of 64 leaves less than 2 % empty."""
    draw = random.Random(0)
    items = [Sized("x", min(2048, max(64, round(draw.lognormvariate(6, 0.9))))) for _ in range(2000)]
    packer = packer_of(items, max_tokens=4096, lookahead=64)

    fills = []
    while row := packer.next_row():
        fills.append(sum(sized.tokens for sized in row) / 4096)

    assert sum(fills[:-1]) / len(fills[:-1]) > 0.98


@pytest.mark.parametrize("cut", range(6))
def test_a_packer_continues_from_its_remainder(cut):
    draw = random.Random(1)
    items = [Sized(chr(65 + number), draw.randint(1, 8)) for number in range(26)]
    whole = rows_of(packer_of(items, max_tokens=12, lookahead=4))

    waiting = iter(items)
    first = Packer(lambda: next(waiting, None), max_tokens=12, lookahead=4)
    before = ["".join(sized.item * sized.tokens for sized in first.next_row()) for _ in range(cut)]
    second = Packer(lambda: next(waiting, None), max_tokens=12, lookahead=4)
    second.load_state_dict(first.state_dict())

    assert before + rows_of(second) == whole


def test_what_can_never_fit_is_an_error_not_an_endless_wait():
    with pytest.raises(DataError, match="11 tokens.*data.max_tokens=10"):
        packer_of([("A", 11)], max_tokens=10).next_row()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_tokens": 0}, "data.max_tokens is 0"),
        ({"max_tokens": 8, "max_patches": 0}, "data.max_patches is 0"),
        ({"max_tokens": 8, "lookahead": 0}, "data.lookahead is 0"),
    ],
)
def test_impossible_settings_are_named(options, key):
    with pytest.raises(DataError, match=key):
        packer_of([], **options)


def example(id, tokens, *, patches=0):
    length = len(tokens)
    return Example(
        id=id,
        token_T=torch.tensor(tokens),
        target_T=torch.tensor([*tokens[1:], 0]),
        weight_T=torch.tensor([0.0] * (length - 2) + [1.0, 0.0]),
        position_3T=torch.arange(length).expand(3, -1),
        grids=((1, 4, 4),) * (patches // 16),
        patch_PX=torch.full((patches, 3), float(tokens[0])) if patches else None,
    )


def test_collate_lays_examples_end_to_end():
    row = collate([example("a", [5, 6, 7], patches=16), example("b", [1, 2]), example("c", [8, 9], patches=32)])

    assert row.token_T.tolist() == [5, 6, 7, 1, 2, 8, 9]
    assert row.target_T.tolist() == [6, 7, 0, 2, 0, 9, 0]  # nothing reaches over into the next segment
    assert row.weight_T.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert row.position_3T.tolist() == [[0, 1, 2, 0, 1, 0, 1]] * 3
    assert row.lengths == (3, 2, 2)
    assert row.segment_T.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert row.grids == ((1, 4, 4),) * 3
    assert row.patch_PX is not None and row.patch_PX[:, 0].tolist() == [5.0] * 16 + [8.0] * 32
    assert row.ids == ("a", "b", "c")


def test_collate_of_text_has_no_patches():
    assert collate([example("a", [5, 6, 7])]).patch_PX is None


def test_pack_packs_a_list():
    rows = pack([example("a", [1] * 6), example("b", [2] * 7), example("c", [3] * 3)], max_tokens=10)

    assert [row.ids for row in rows] == [("a", "c"), ("b",)]


def test_the_dealing_in_the_docstring():
    assert deal([9, 1, 8, 2], 2) == [[0, 1], [2, 3]]


def test_dealing_by_cost():
    draw = random.Random(2)
    for ranks in (1, 2, 3, 8):
        costs = [draw.lognormvariate(0, 1) for _ in range(4 * ranks)]
        dealt = deal(costs, ranks)

        assert sorted(row for share in dealt for row in share) == list(range(len(costs)))
        assert all(share == sorted(share) and len(share) == 4 for share in dealt)
        dearest = max(sum(costs[row] for row in share) for share in dealt)
        assert dearest <= max(sum(costs[rank::ranks]) for rank in range(ranks))  # no worse than taking turns
    assert deal([1.0] * 6, 3) == [[0, 3], [1, 4], [2, 5]]  # nothing to choose between: in turn
