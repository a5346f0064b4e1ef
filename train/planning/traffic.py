"""Bytes that each rank sends in one update.

    experts     per row and sparse layer: a token's K rows of D numbers go to their experts and come back
                forward 2, backward 2, recomputed 2   x  T K D b (N-1)/N        N = parallel.expert, b bytes of a number
                and 2 E counts of 8 bytes, once per forward
    gradients   all-reduce       zero=0, 1 once an update; zero=2 every row     2 P 4 (R-1)/R
                reduce-scatter   zero=3 every row                                 P 4 (R-1)/R
                in float32; P weights, R ranks that hold the same ones
                updated weights  zero=1, 2 once                                   P b (R-1)/R
    weights     zero=3, every row             gathered forward, backward  2 P b (R-1)/R, what is frozen included
    sequence    per row and layer: queries, keys and values go to whoever has their heads, and results come back
                forward 1, backward 1, recomputed 1   x  C (2 N + 2 G) H b (S-1)/S      S = parallel.sequence, C = T/S

DeepSpeed's ZeRO-1 and 2 all-reduce their buckets and keep a part, so they send no less than an all-reduce does.
Source: DeepSpeed 0.19 (runtime/zero); tests/train/planning/test_traffic.py counts the collectives of the real route.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ernie_model.config import ErnieConfig
from train.config import ModelConfig, Precision, Recompute
from train.footprint import Kind, Piece, Room
from train.shares import Shares, Weights

COUNT_BYTES = 8
SUMMED_BYTES = 4
"""Ranks add gradients up in float32, whatever weights are held in."""


class Traffic(NamedTuple):
    """Bytes that one rank sends in one update."""

    experts: float
    """By the busiest rank."""
    dense_gradients: float
    expert_gradients: float
    """Between the ranks that hold the same experts."""
    dense_weights: float
    """Gathered."""
    expert_weights: float
    sequence: float

    @property
    def gradients(self) -> float:
        return self.dense_gradients + self.expert_gradients

    @property
    def weights(self) -> float:
        return self.dense_weights + self.expert_weights


def traffic_of(
    pieces: Sequence[Piece], config: ErnieConfig, settings: ModelConfig, room: Room, shares: Shares
) -> Traffic:
    weights = [w for piece in pieces for w in piece.weights]
    dense, experts = ([w for w in weights if w.expert is kind] for kind in (False, True))
    rows = room.accumulation
    return Traffic(
        experts=rows * sum(_exchange(piece, config, settings, room, shares) for piece in pieces),
        dense_gradients=sum(_gradients(w, rows, shares) for w in dense),
        expert_gradients=sum(_gradients(w, rows, shares) for w in experts),
        dense_weights=rows * sum(_gathers(w, shares) for w in dense),
        expert_weights=rows * sum(_gathers(w, shares) for w in experts),
        sequence=rows * sum(_heads(piece, config, settings, room, shares) for piece in pieces),
    )


def _exchange(piece: Piece, config: ErnieConfig, settings: ModelConfig, room: Room, shares: Shares) -> float:
    """Of one layer and row."""
    if piece.kind is not Kind.SPARSE or shares.parallel.expert == 1:
        return 0.0
    recomputed = piece.learns and settings.recompute is not Recompute.none
    forwards, backwards = 1 + recomputed, int(piece.learns)
    return exchange_bytes(
        tokens=room.tokens * room.imbalance,
        config=config,
        size=2 if settings.precision is Precision.bf16 else 4,
        of=shares.parallel.expert,
        passes=2 * (forwards + backwards),
        counts=forwards,
    )


def exchange_bytes(*, tokens: float, config: ErnieConfig, size: int, of: int, passes: int, counts: int) -> float:
    """All-to-all of one sparse layer and row between `of` ranks, evenly routed.

    Args:
        passes: ways of the rows; forward is 2, backward 2 more.
        counts: forward passes, each of which tells the others its numbers of rows first.
    """
    rows = tokens * config.experts_per_token * config.hidden_size * size
    pools = 2 if config.vision_expert_width else 1
    return (passes * rows + counts * pools * config.num_experts * COUNT_BYTES) * (of - 1) / of


def _heads(piece: Piece, config: ErnieConfig, settings: ModelConfig, room: Room, shares: Shares) -> float:
    """Of one layer and row; with more ranks than key/value heads, these are sent more than once."""
    ranks = shares.parallel.sequence
    if piece.kind not in (Kind.SPARSE, Kind.DENSE) or ranks == 1:
        return 0.0
    heads = 2 * config.num_attention_heads + 2 * max(config.num_key_value_heads, ranks)
    size = 2 if settings.precision is Precision.bf16 else 4
    ways = 1 + piece.learns * (1 + (settings.recompute is not Recompute.none))
    return ways * room.tokens * heads * config.head_dim * size * (ranks - 1) / ranks


def _gradients(w: Weights, rows: int, shares: Shares) -> float:
    if not w.trained:
        return 0.0
    summed, gathered = {0: (2, 0), 1: (2, 1), 2: (2 * rows, 1), 3: (rows, 0)}[shares.parallel.zero]
    return (summed * SUMMED_BYTES / w.size + gathered) * _all_but_own(w, shares)


def _gathers(w: Weights, shares: Shares) -> float:
    return 2 * _all_but_own(w, shares) if shares.parallel.zero == 3 else 0.0


def _all_but_own(w: Weights, shares: Shares) -> float:
    """P b (R-1)/R."""
    holders = shares.holders(w)
    return w.size * shares.local(w) * (holders - 1) / holders
