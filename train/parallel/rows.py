"""Rows that ranks share (`parallel.sequence`): who shares with whom, and how they come to hold the same row.

    world = 4, sequence = 2      rank   0  1 | 2  3         neighbours, so within one machine
    a micro-batch's row                 A  A   B  B         as on 2 ranks without sharing
    who reads, decodes and packs it     0      2            and tells 1, and 3

Only one rank of a group reads. If all of them did, an image that cannot be fetched for one of them alone would leave
them with different rows, and each would wait for what the other never sends.

Every rank gets the whole row: a loss may need all its log-probabilities, and ids and weights are small. What is large,
activations and the pixels on the device, is of a rank's own part (ernie_model/sequence_parallel.py). Whatever is
counted over rows is counted once by each rank of a group; whoever adds it up divides by `Layout.sequence`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from data.batch import PackedBatch
from data.errors import DataError
from ernie_model.sequence_parallel import check_heads
from train.build import read_config
from train.config import ModelConfig, UserError
from train.loop import Source
from train.parallel.layout import Layout


def check_shareable(model: ModelConfig, sequence: int) -> None:
    """Raises UserError if rows of this model cannot be shared by so many ranks. Reads no weights."""
    if sequence == 1:
        return
    config = read_config(model)
    try:
        check_heads(config.num_attention_heads, config.num_key_value_heads, sequence)
    except ValueError as error:
        raise UserError(f"parallel.sequence is {sequence}: {error}") from error


def same_rows(
    read: Callable[[], list[PackedBatch] | None], layout: Layout, device: torch.device
) -> list[PackedBatch] | None:
    """What `read` gives to the first rank of this rank's group, on all of its ranks, on the host.

    Raises:
        DataError: on all of them, when the first one meets it.
    """
    if layout.sequence == 1:
        return read()
    rows: list[PackedBatch] | None = None
    told: list[Any] = [None, None]  # an error, or rows without pixels
    if layout.sequence_rank == 0:
        try:
            rows = read()
        except DataError as error:
            _broadcast_object([str(error), None], layout, device)
            raise
        told[1] = None if rows is None else [_without_pixels(row) for row in rows]
    error, bare = _broadcast_object(told, layout, device)
    if error is not None:
        raise DataError(error)
    if bare is None:
        return None
    return [_with_pixels(row, layout, device) for row in (bare if rows is None else rows)]


def _broadcast_object(value: list[Any], layout: Layout, device: torch.device) -> list[Any]:
    dist.broadcast_object_list(value, group=layout.sequence_group, group_src=0, device=device)
    return value


def _without_pixels(row: PackedBatch) -> PackedBatch:
    """Pixels travel as what they are; with the rest they would be pickled."""
    empty = None if row.patch_PX is None else row.patch_PX.new_empty(0, row.patch_PX.shape[1])
    return dataclasses.replace(row, patch_PX=empty)


def _with_pixels(row: PackedBatch, layout: Layout, device: torch.device) -> PackedBatch:
    """Through the device, because NCCL knows no other memory, and on the host again afterwards."""
    if row.patch_PX is None:
        return row
    if layout.sequence_rank == 0:
        dist.broadcast(row.patch_PX.to(device).contiguous(), group=layout.sequence_group, group_src=0)
        return row
    patches = sum(frames * rows * columns for frames, rows, columns in row.grids)
    moved = row.patch_PX.new_empty(patches, row.patch_PX.shape[1], device=device)
    dist.broadcast(moved, group=layout.sequence_group, group_src=0)
    return dataclasses.replace(row, patch_PX=moved.cpu())


class SharedSource:
    """A source that the first rank of each group reads for all of them.

    On the other ranks it stands still, and so does what it would save or report: rank 0's is used.
    """

    def __init__(self, source: Source, layout: Layout, device: torch.device):
        self.source, self.layout, self.device = source, layout, device

    def next_step(self) -> list[PackedBatch]:
        rows = same_rows(self.source.next_step, self.layout, self.device)
        assert rows is not None
        return rows

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


def same_batches(
    batches: Iterator[PackedBatch | None], layout: Layout, device: torch.device
) -> Iterator[PackedBatch | None]:
    """The same for an evaluation's batches; they are drawn on the first rank of each group only."""

    def read() -> list[PackedBatch] | None:
        for batch in batches:
            return [] if batch is None else [batch]
        return None

    while (rows := same_rows(read, layout, device)) is not None:
        yield rows[0] if rows else None
