"""Pieces of flattened tensors: what safetensors itself reads, and every range from any cut."""

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from train import pieces as module
from train.pieces import Piece, PieceError, Pieces, write_pieces

VALUES = torch.arange(12.0)


@pytest.fixture
def three_ranks(tmp_path):
    """12 elements, cut at 5 and 10, in three files."""
    files = [tmp_path / f"{rank}.safetensors" for rank in range(3)]
    for file, (start, stop) in zip(files, [(0, 5), (5, 10), (10, 12)], strict=True):
        write_pieces(file, [Piece("a/weight", start, VALUES[start:stop])])
    return files


@pytest.mark.parametrize("block", [16, 2**24])  # of elements, several and less than one
def test_safetensors_reads_what_is_written(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    given = {f"x{i}": torch.arange(7 + i).to(kind) for i, kind in enumerate(kinds)} | {"flag": torch.tensor([True])}
    file = tmp_path / "shard.safetensors"
    written = write_pieces(file, [Piece(name, 3, value) for name, value in given.items()])
    read = load_file(file)
    assert read.keys() == {f"{name}@3" for name in given}
    for name, value in given.items():
        assert torch.equal(read[f"{name}@3"], value) and read[f"{name}@3"].dtype == value.dtype
        assert torch.equal(Pieces([file]).read(name, 3, 3 + value.numel()), value)
    data = file.read_bytes()
    assert written == (len(data), xxhash.xxh3_128_hexdigest(data))


def test_every_range_of_every_cut(three_ranks, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    found = Pieces(reversed(three_ranks))  # in whatever order
    for start in range(13):
        for stop in range(start, 13):
            assert torch.equal(found.read("a/weight", start, stop), VALUES[start:stop]), (start, stop)


def test_reading_into_a_part_of_a_tensor_converts_and_leaves_the_rest(three_ranks):
    out = torch.zeros(8, dtype=torch.float64)
    Pieces(three_ranks).read_into("a/weight", 4, out[1:7])
    assert out.tolist() == [0, 4, 5, 6, 7, 8, 9, 0]
    every_other = torch.zeros(12)[::2]
    Pieces(three_ranks).read_into("a/weight", 2, every_other)
    assert every_other.tolist() == [2, 3, 4, 5, 6, 7]


def test_what_is_in_no_file_is_named(three_ranks):
    for files, missing in ((three_ranks[:2], "10 to 11"), (three_ranks[::2], "5 to 11"), (three_ranks[1:], "2 to 11")):
        with pytest.raises(PieceError, match=f"elements {missing} of a/weight are in no file"):
            Pieces(files).read("a/weight", 2, 12)
    with pytest.raises(PieceError, match="elements 0 to 0 of b/weight are in no file"):
        Pieces(three_ranks).read("b/weight", 0, 1)
    assert "a/weight" in Pieces(three_ranks) and "b/weight" not in Pieces(three_ranks)


def test_files_that_hold_no_pieces(tmp_path, three_ranks):
    file = tmp_path / "other.safetensors"
    for data in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{"):
        file.write_bytes(data)
        with pytest.raises(PieceError, match="other.safetensors holds no pieces"):
            Pieces([file])
    save_file({"a": torch.zeros(2, 2)}, file)  # somebody else's
    with pytest.raises(PieceError, match="other.safetensors holds no pieces"):
        Pieces([file])
    three_ranks[2].write_bytes(three_ranks[2].read_bytes()[:-3])
    with pytest.raises(PieceError, match=r"2\.safetensors ends too early"):
        Pieces(three_ranks).read("a/weight", 0, 12)
