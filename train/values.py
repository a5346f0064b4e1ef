"""Whole tensors of a model, by name and part, wherever they lie: what every export reads.

    all of it is here             views of this process's memory
    a share of it is on each rank     each writes its share ──► RUN_FOLDER/.NAME.weights ──► anyone reads any range

On the way over the disk no rank has more in memory than its share and what it reads: nothing is gathered. What is read
is what updates are added to: the float32 values, where ZeRO works with rounded ones.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernie_model.expert_parallel import WHOLE, shard_of
from ernie_model.hub import Index, Read
from train.checkpoint import all_or_none, check_room, everyones, here, shard_name
from train.parallel.fragments import pieces_to_write, whole_shape
from train.pieces import Pieces, write_pieces


class Values(NamedTuple):
    tensors: Mapping[str, Tensor]
    """Shapes and dtypes, by name. Not to be read from: what is elsewhere is on the meta device."""
    read: Read
    """Values, by name and part."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def in_memory(tensors: Mapping[str, Tensor]) -> Values:
    live = {name: tensor.detach() for name, tensor in tensors.items()}
    return Values(live, lambda name, index: live[name][index] if index else live[name])


def in_pieces(shapes: Mapping[str, list[int]], pieces: Pieces) -> Values:
    """Of a checkpoint, or of what `values_of` has written."""
    dtypes = {name: pieces.stored[f"{name}/weight"][0].dtype for name in shapes}
    tensors = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}

    def read(name: str, index: Index) -> Tensor:
        start, sizes = flat_range(shapes[name], index)
        return pieces.read(f"{name}/weight", start, start + math.prod(sizes)).view(sizes)

    return Values(tensors, read)


def flat_range(shape: list[int], index: Index) -> tuple[int, list[int]]:
    """Where the part `index` begins in the flattened tensor, and its shape. Numbers first, then at most one slice."""
    start, sizes = 0, list(shape)
    for at, one in enumerate(index):
        stride = math.prod(sizes[1:])
        if isinstance(one, int):
            start, sizes = start + one * stride, sizes[1:]
        else:
            assert at == len(index) - 1, "the part would not be contiguous"
            low, high, _ = one.indices(sizes[0])
            start, sizes = start + low * stride, [high - low, *sizes[1:]]
    return start, sizes


@contextmanager
def values_of(tensors: Mapping[str, Tensor], optimizer: Any, folder: Path, name: str) -> Iterator[Values]:
    """All ranks enter together, and read inside of `all_or_none`, so that nobody leaves before the last has read.

    Args:
        tensors: the model's own, with what they say of their part.
        optimizer: PyTorch's, or the one of DeepSpeed's engine.
        folder: of the run; needs room for the tensors, where they lie on several ranks.
        name: of what is read for.

    Raises:
        UserError: the disk is full, or a rank cannot write.
    """
    if all(_all_is_here(tensor) for tensor in tensors.values()):
        yield in_memory(tensors)
        return
    (rank, world), path = here(), folder / f".{name}.weights"
    written = pieces_to_write(tensors, optimizer, rank=rank, world=world)
    pieces = [piece for piece in written if piece.name.endswith("/weight")]
    needed = sum(everyones(sum(piece.value.nbytes for piece in pieces)))

    def make() -> None:
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed here
            check_room(path, needed)
            path.mkdir(parents=True)

    try:
        all_or_none(path, needed, make)
        all_or_none(path, needed, lambda: write_pieces(path / shard_name(rank), pieces))
        shapes = {name: whole_shape(tensor) for name, tensor in tensors.items()}
        yield in_pieces(shapes, Pieces(path / shard_name(one) for one in range(world)))
    finally:
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def _all_is_here(tensor: Tensor) -> bool:
    """Is the tensor whole, and what updates are added to (or that, rounded to nothing less)?"""
    cut = shard_of(tensor) != WHOLE or hasattr(tensor, "ds_tensor")
    rounded = hasattr(tensor, "_hp_mapping") and tensor.dtype.itemsize < torch.float32.itemsize
    return not cut and not rounded
