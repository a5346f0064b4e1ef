"""Packing: conversations laid end to end in rows of at most `max_tokens` tokens, without cutting any of them.

First fit over a look-ahead buffer. Each row takes, again and again, the conversation that has waited longest among
those that still fit; the buffer is refilled after every take. Here with max_tokens=10 and lookahead=3:

    arriving   A:6  B:7  C:3  D:4  E:2  F:1  G:5

                         buffer when it is drawn     takes
    row 0                A:6 B:7 C:3                 A       6
          AAAAAA         B:7 C:3 D:4                 C       9      B would make 13
          AAAAAACCC      B:7 D:4 E:2                 -              nothing fits beside 9: close the row
    row 1                B:7 D:4 E:2                 B       7
          BBBBBBB        D:4 E:2 F:1                 E       9      D would make 11
          BBBBBBBEE      D:4 F:1 G:5                 F      10
          BBBBBBBEEF     D:4 G:5                     -
    row 2                D:4 G:5                     D       4
          DDDD           G:5                         G       9
          DDDDGGGGG

Whoever has waited longest opens the next row, so nobody waits for more than `lookahead` rows. The packer works on sizes
alone; what it holds between two rows is its buffer, and that is its whole state.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from data.encode import Example
from data.errors import DataError

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Sized(Generic[ItemT]):
    """Something to pack, and what it costs."""

    item: ItemT
    tokens: int
    patches: int = 0


class Packer(Generic[ItemT]):
    """Turns a stream of sized items into rows. `draw` gives the next item, or None when there are no more."""

    def __init__(
        self,
        draw: Callable[[], Sized[ItemT] | None],
        *,
        max_tokens: int,
        max_patches: int | None = None,
        lookahead: int = 64,
    ):
        if max_tokens < 1:
            raise DataError(f"data.max_tokens is {max_tokens}; it must be at least 1.")
        if max_patches is not None and max_patches < 1:
            raise DataError(f"data.max_patches is {max_patches}; it must be at least 1, or null for no limit.")
        if lookahead < 1:
            raise DataError(f"data.lookahead is {lookahead}; it must be at least 1 (1 keeps the order as it arrives).")
        self._draw = draw
        self.max_tokens = max_tokens
        self.max_patches = max_patches
        self.lookahead = lookahead
        self.buffer: list[Sized[ItemT]] = []
        """Drawn but not yet in a row, longest wait first."""

    def next_row(self) -> list[Sized[ItemT]]:
        """The items of the next row, in the order they lie in it; empty when there are no more."""
        row: list[Sized[ItemT]] = []
        tokens = patches = 0
        while True:
            self._refill()
            fitting = (place for place, item in enumerate(self.buffer) if self._fits(item, tokens, patches))
            place = next(fitting, None)
            if place is None:
                return row
            taken = self.buffer.pop(place)
            row.append(taken)
            tokens += taken.tokens
            patches += taken.patches

    def _refill(self) -> None:
        while len(self.buffer) < self.lookahead:
            item = self._draw()
            if item is None:
                return
            if not self._fits(item, 0, 0):  # it would stay in the buffer for ever
                raise DataError(
                    f"item {item.item} has {item.tokens} tokens and {item.patches} patches, more than a row may hold "
                    f"(data.max_tokens={self.max_tokens}, data.max_patches={self.max_patches})."
                )
            self.buffer.append(item)

    def _fits(self, item: Sized[ItemT], tokens: int, patches: int) -> bool:
        if tokens + item.tokens > self.max_tokens:
            return False
        return self.max_patches is None or patches + item.patches <= self.max_patches

    def state_dict(self) -> list[list[Any]]:
        """The remainder: [item, tokens, patches] of everything in the buffer, in order."""
        return [[item.item, item.tokens, item.patches] for item in self.buffer]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        self.buffer = [Sized(item, tokens, patches) for item, tokens, patches in state]


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end.

        examples   token <s> Q 7 </s>          token <s> R 3 </s>
        row        token <s> Q 7 </s> <s> R 3 </s>      lengths (4, 4)

    Every stream is concatenated along T, pixels along P; positions are each example's own, so each record starts at 0.
    """
    if not examples:
        raise DataError("a packed row needs at least one example.")
    patches = [example.patch_PX for example in examples if example.patch_PX is not None]
    lengths = [example.lengths or (example.num_tokens,) for example in examples]
    batch = PackedBatch(
        token_T=torch.cat([example.token_T for example in examples]),
        target_T=torch.cat([example.target_T for example in examples]),
        weight_T=torch.cat([example.weight_T for example in examples]),
        position_3T=torch.cat([example.position_3T for example in examples], dim=1),
        lengths=tuple(length for own in lengths for length in own),
        grids=tuple(grid for example in examples for grid in example.grids),
        patch_PX=torch.cat(patches) if patches else None,
        ids=tuple(example.id for example, own in zip(examples, lengths, strict=True) for _ in own),
        datasets=tuple(example.dataset for example, own in zip(examples, lengths, strict=True) for _ in own),
        engine_logprob_T=_joined([example.engine_logprob_T for example in examples]),
        advantage_T=_joined([example.advantage_T for example in examples]),
        expert_TLK=_joined([example.expert_TLK for example in examples]),
    )
    if not any(example.lengths for example in examples):
        return batch
    starts = itertools.accumulate(map(len, lengths), initial=0)
    return dataclasses.replace(
        batch,
        stems=tuple(
            stem + start if stem >= 0 else -1
            for example, own, start in zip(examples, lengths, starts, strict=False)
            for stem in example.stems or (-1,) * len(own)
        ),
        roles=tuple(
            role
            for example, own in zip(examples, lengths, strict=True)
            for role in example.roles or (Role.WHOLE,) * len(own)
        ),
        records=tuple(record for record, own in enumerate(lengths) for _ in own),
        scores=tuple(
            score
            for example, own in zip(examples, lengths, strict=True)
            for score in example.scores or (math.nan,) * len(own)
        ),
        waited=tuple(
            rollouts
            for example, own in zip(examples, lengths, strict=True)
            for rollouts in example.waited or (0,) * len(own)
        )
        if any(example.waited for example in examples)
        else (),
    )


def _joined(streams: Sequence[Tensor | None]) -> Tensor | None:
    """All examples of a row have a stream, or none has."""
    present = [stream for stream in streams if stream is not None]
    assert len(present) in (0, len(streams)), "some of a row's examples lack a stream"
    return torch.cat(present) if present else None


def filler(token: int) -> PackedBatch:
    """A row that teaches nothing: two tokens of no conversation. It keeps ranks and micro-batches in step."""
    token_T = torch.tensor([token, token])
    return PackedBatch(
        token_T=token_T,
        target_T=torch.tensor([token, 0]),
        weight_T=torch.zeros(2),
        position_3T=torch.arange(2).expand(3, -1).contiguous(),
        lengths=(2,),
        ids=("",),
        datasets=("",),
    )


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which rows each rank takes, equally many, so that the dearest rank has as little to do as can be.

        costs 9 1 8 2, two ranks    ->  [0, 1], [2, 3]        10 each; in turn it would be 17 and 3

    The dearest row left goes to the rank with the least so far that still needs one. Rows keep their order in a rank.
    """
    places = len(costs) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        rank = min((rank for rank in range(ranks) if len(dealt[rank]) < places), key=lambda rank: load[rank])
        dealt[rank].append(row)
        load[rank] += costs[row]
    return [sorted(rows) for rows in dealt]


def pack(
    examples: Sequence[Example], *, max_tokens: int, max_patches: int | None = None, lookahead: int = 64
) -> list[PackedBatch]:
    """All of a finite list, packed; the rows in order, the last one as full as it gets."""
    waiting = iter(examples)

    def draw() -> Sized[Example] | None:
        example = next(waiting, None)
        return None if example is None else Sized(example, example.num_tokens, example.num_patches)

    packer = Packer(draw, max_tokens=max_tokens, max_patches=max_patches, lookahead=lookahead)
    rows = []
    while row := packer.next_row():
        rows.append(collate([sized.item for sized in row]))
    return rows
