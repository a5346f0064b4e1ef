"""Parts of whole tensors, in memory and in the pieces that several ranks wrote."""

import pytest
import torch

from train.pieces import Piece, Pieces, write_pieces
from train.values import flat_range, in_memory, in_pieces

INDICES = [(), (1,), (1, 2), (0, slice(1, 3)), (slice(1, 2),), (1, slice(0, 3)), (0, 0, slice(2, 4)), (1, 2, 3)]


@pytest.mark.parametrize("index", INDICES)
def test_a_part_is_where_indexing_finds_it(index, tmp_path):
    x = torch.arange(24.0).view(2, 3, 4)
    start, sizes = flat_range([2, 3, 4], index)
    assert sizes == list(x[index].shape)
    assert x[index].flatten()[0] == start
    # three ranks, whose pieces end in the middle of a row
    for rank, (first, last) in enumerate([(0, 7), (7, 13), (13, 24)]):
        write_pieces(tmp_path / f"{rank}", [Piece("x/weight", first, x.view(-1)[first:last])])
    pieces = in_pieces({"x": [2, 3, 4]}, Pieces(tmp_path / f"{rank}" for rank in range(3)))
    assert torch.equal(pieces.read("x", index), x[index])
    assert torch.equal(in_memory({"x": x}).read("x", index), x[index])
    assert pieces.num_bytes == in_memory({"x": x}).num_bytes == 96


def test_a_part_that_does_not_lie_in_one_piece_of_memory_is_no_range():
    with pytest.raises(AssertionError, match="contiguous"):
        flat_range([2, 3, 4], (slice(0, 1), 2))
