"""Flat pieces of tensors in safetensors files: written as a stream, read by range.

    layers.0.mlp.down.weight, of 12 elements, on three ranks                    in the file of
    NAME/weight@0  [0 1 2 3 4]    NAME/weight@5  [5 6 7 8 9]    NAME/weight@10  [10 11]
                   rank 0                        rank 1                         rank 2

A key says where in the flattened whole tensor its piece begins; a piece is one-dimensional. Whoever needs elements 3 to
7 reads the ends of two pieces, and need not know how many ranks wrote them. safetensors' own writer takes all tensors
of a file at once, in host memory; this one holds a block of one at a time, and so does the reader.

Source: the format, https://github.com/huggingface/safetensors#format: the length of the header as 8 bytes, the header
as JSON (dtype, shape and place of every tensor), the data.
"""

import json
import os
import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

BLOCK = 2**24
"""Bytes that are in host memory at a time."""
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
LONGEST_HEADER = 10**8  # what safetensors itself accepts


class PieceError(Exception):
    """Pieces that cannot be read: a damaged file, or one that lacks what is asked for."""


class Piece(NamedTuple):
    """Elements `start`, `start + 1`, ... of the flattened tensor `name`."""

    name: str
    start: int
    value: Tensor  # (n,)


class Written(NamedTuple):
    num_bytes: int
    checksum: str
    """xxh3_128 of the whole file."""


def write_pieces(path: Path, pieces: Iterable[Piece]) -> Written:
    """Write one file and sync it to the disk.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    # Wide elements first, so that each lies at a multiple of its size.
    ordered = sorted(pieces, key=lambda piece: (-piece.value.element_size(), piece.name, piece.start))
    digest, total = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for block in (_header(ordered), *(block for piece in ordered for block in _blocks(piece.value))):
            file.write(block)
            digest.update(block)
            total += len(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(total, digest.hexdigest())


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, start, value in pieces:
        assert value.ndim == 1
        begin, end = end, end + value.nbytes
        entries[f"{name}@{start}"] = {
            "dtype": CODES[value.dtype],
            "shape": [value.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(value_N: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, from wherever it lies, block by block."""
    for part in value_N.detach().split(BLOCK // value_N.element_size()):
        yield memoryview(part.cpu().contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class Stored(NamedTuple):
    """Where a piece lies."""

    start: int
    stop: int
    file: Path
    offset: int
    """Of its first byte, from the beginning of the file."""
    dtype: torch.dtype


class Pieces:
    """The pieces in a set of files, found by name and range."""

    def __init__(self, files: Iterable[Path]):
        """Reads headers only.

        Raises:
            PieceError: a file is damaged.
            OSError: it cannot be read.
        """
        self.stored: dict[str, list[Stored]] = defaultdict(list)
        for file in files:
            for name, stored in _read_header(file):
                self.stored[name].append(stored)
        for pieces in self.stored.values():
            pieces.sort()

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the host, in the dtype they are stored in."""
        dtype = self.stored[name][0].dtype if name in self else torch.float32
        out_N = torch.empty(stop - start, dtype=dtype)
        self.read_into(name, start, out_N)
        return out_N

    def read_into(self, name: str, start: int, out_N: Tensor) -> None:
        """Fill `out_N`, wherever it lies and in whatever dtype, with the elements from `start` on.

        Raises:
            PieceError: some of them are in no file.
        """
        stop = start + out_N.numel()
        pieces = self.stored.get(name, [])
        at = start
        for piece in pieces[max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1) :]:
            end = min(piece.stop, stop)
            if at >= end:
                continue
            if piece.start > at:
                break
            _read(piece, at - piece.start, out_N[at - start : end - start])
            at = end
        if at < stop:
            raise PieceError(f"elements {at} to {stop - 1} of {name} are in no file")


def _read_header(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with file.open("rb") as reader:
            (length,) = struct.unpack("<Q", reader.read(8))
            if length > LONGEST_HEADER:
                raise ValueError(f"its header claims to have {length:,} bytes")
            entries = json.loads(reader.read(length))
        for key, entry in entries.items():
            if key == "__metadata__":
                continue
            name, _, start = key.rpartition("@")
            (count,), (begin, _) = entry["shape"], entry["data_offsets"]
            yield name, Stored(int(start), int(start) + count, file, 8 + length + begin, DTYPES[entry["dtype"]])
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise PieceError(f"{file.name} holds no pieces ({error})") from error


def _read(piece: Stored, skip: int, out_N: Tensor) -> None:
    size = piece.dtype.itemsize
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.offset + skip * size)
        for part in out_N.split(BLOCK // size):
            # Straight to where it belongs, if that is host memory of the same dtype.
            direct = part.device.type == "cpu" and part.dtype == piece.dtype and part.is_contiguous()
            host = part.detach() if direct else torch.empty(part.numel(), dtype=piece.dtype)
            view = memoryview(host.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
            while len(view):
                if not (read := file.readinto(view)):
                    raise PieceError(f"{piece.file.name} ends too early")
                view = view[read:]
            if not direct:
                part.detach().copy_(host)
