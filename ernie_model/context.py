"""Who may look at whom.

`Packed` says it for training: the row holds several segments, and a token sees its own segment up to itself.

          a0 a1 a2 b0 b1
      a0   x
      a1   x  x
      a2   x  x  x
      b0            x
      b1            x  x

A segment may have a *stem*, an earlier segment that it sees as a whole: two answers b and c to the prompt a are

          a0 a1 b0 b1 c0 c1
      a0   x                            Packed([2, 2, 2], stems=[-1, 0, 0])
      a1   x  x
      b0   x  x  x
      b1   x  x  x  x
      c0   x  x        x
      c1   x  x        x  x

No T x T mask is ever built: the cost is the sum, over segments, of their length times the length of what they see.
Segments of similar length are attended to together, padded to a common length; under a causal mask the padding sits
after every real key and is never seen. Keys and values of a stem are gathered once for every segment that sees them.

Shape letters:  T tokens   N query heads   G key/value heads   H head width   B segments of one bucket   L its length
                S keys of each: those of a stem, then L
                P places, that is rows and padding
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_model.layers import wide
from ernie_model.rope import Grid
from ernie_model.tile_plan import Tiles, take
from ernie_model.tiles import tiled_attention

LONGEST_TILED = 2048
"""Beyond this segment length torch's own CPU kernel is the faster one (docs/speed.md)."""


CALL = 64 * 64
"""Pairs of a query and a key that take about as long as calling the kernel once more."""


class Packed:
    """Segments of one packed row, for training and for prompts.

    Args:
        lengths: tokens of each segment, in order.
        causal: False lets every token see its whole segment (frames in the vision tower).
        stems: of each segment, the earlier one that it sees too, or -1; empty: none sees another. A stem has no stem.

    Raises ValueError for lengths or stems that no row has.
    """

    def __init__(self, lengths: Sequence[int], *, causal: bool = True, stems: Sequence[int] = ()):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segment lengths must be positive and at least one; got {list(lengths)}.")
        check_stems(lengths, stems)
        self.lengths = tuple(lengths)
        self.stems = tuple(stems) if any(stem >= 0 for stem in stems) else ()
        if self.stems and not causal:
            raise ValueError(f"stems are for causal attention; got stems {list(stems)} with causal=False.")
        self.causal = causal
        self.num_tokens = sum(self.lengths)
        self.cuts, self.part = (0, self.num_tokens), 0
        self._varlen: dict[torch.device, _Varlen] = {}
        self._plan: _Plan | None = None
        self._exact: Tiles | None = None

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Softmax attention inside each segment and to its stem; returns (T, N, H) in the dtype of the queries."""
        if q_TNH.shape[0] != self.num_tokens:
            raise ValueError(f"the segments hold {self.num_tokens} tokens, the row {q_TNH.shape[0]}.")
        if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(q_TNH, k_TGH, v_TGH)
        return self._attend_buckets(q_TNH, k_TGH, v_TGH)

    def attend_exactly(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """As `attend`, without gradient, and bit for bit what a cache of the same tokens gives (exact.py)."""
        if self._exact is None:
            ends = [*accumulate(self.lengths)]
            own = [torch.arange(end - length, end) for length, end in zip(self.lengths, ends, strict=True)]
            stems = self.stems or [-1] * len(own)
            before = [0 if stem < 0 else self.lengths[stem] for stem in stems]
            rows = [rows if stem < 0 else torch.cat([own[stem], rows]) for rows, stem in zip(own, stems, strict=True)]
            self._exact = Tiles(before, rows, q_TNH.device, causal=self.causal)
        return self._exact.attend(q_TNH, lambda row_ZC: (take(k_TGH, row_ZC), take(v_TGH, row_ZC)))

    def media(self, grids: Sequence[Grid]) -> Sequence[Grid]:
        """All of the row's images and videos are computed here, and"""
        return grids

    def deliver(self, feature_MD: Tensor, grids: Sequence[Grid], media_P: Sequence[int]) -> Tensor:
        """so are all features that it needs."""
        return feature_MD

    def _attend_varlen(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Flash attention over segment boundaries: one kernel for the whole row."""
        from torch.nn.attention.varlen import varlen_attn  # here: it loads the compiler, 3 s that a CPU run can spare

        device = q_TNH.device
        if device not in self._varlen:
            self._varlen[device] = _plan_varlen(self.lengths, self.stems, device)
        plan = self._varlen[device]
        if plan.keys is not None:
            k_TGH, v_TGH = _gather(k_TGH, plan.keys), _gather(v_TGH, plan.keys)
        # Where a segment has more keys than queries, its last query sees all of them.
        options: dict[str, Any] = {"window_size": (-1, 0) if self.causal else (-1, -1)}
        if q_TNH.shape[1] != k_TGH.shape[1]:
            if "enable_gqa" in inspect.signature(varlen_attn).parameters:
                options["enable_gqa"] = True
            else:  # torch 2.11
                share = q_TNH.shape[1] // k_TGH.shape[1]
                k_TGH, v_TGH = (x.repeat_interleave(share, dim=1) for x in (k_TGH, v_TGH))
        return varlen_attn(q_TNH, k_TGH, v_TGH, *plan.offsets, *plan.longest, **options)  # pyright: ignore

    def _attend_buckets(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Segments of similar length together; padding goes in and comes out by one gather each."""
        if self._plan is None:
            self._plan = _plan_buckets(self.lengths, self.stems, round_up=self.causal)
        plan = self._plan
        q, k, v = _gather(q_TNH, plan.queries), _gather(k_TGH, plan.keys), _gather(v_TGH, plan.keys)
        queries = [bucket.segments * bucket.queries for bucket in plan.buckets]
        keys = [bucket.segments * bucket.keys for bucket in plan.buckets]
        outputs = [
            self._kernel(*(x.unflatten(0, (bucket.segments, -1)) for x in parts), bucket=bucket).flatten(0, 1)
            for bucket, *parts in zip(plan.buckets, q.split(queries), k.split(keys), v.split(keys), strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y if plan.queries is None else y.index_select(0, plan.queries.place_T.to(y.device))

    def _kernel(self, q_BLNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, *, bucket: "_Bucket") -> Tensor:
        short = q_BLNH.device.type == "cpu" and bucket.queries <= LONGEST_TILED
        if short or bucket.keys > bucket.queries:
            return tiled_attention(q_BLNH, k_BSGH, v_BSGH, causal=self.causal, padding_B=bucket.padding_B)
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSGH, v_BSGH))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)


def check_stems(lengths: Sequence[int], stems: Sequence[int]) -> None:
    """Raises ValueError unless there is a stem for each of `lengths`, or none at all, each -1 or an earlier segment
    that has none itself."""
    if stems and len(stems) != len(lengths):
        raise ValueError(f"{len(lengths)} segments need as many stems, or none; got {list(stems)}.")
    for segment, stem in enumerate(stems):
        if not -1 <= stem < segment or (stem >= 0 and stems[stem] != -1):
            raise ValueError(
                f"stems[{segment}] is {stem}; it must be -1, or an earlier segment that has no stem itself. "
                f"All: {list(stems)}."
            )


class _Rows(NamedTuple):
    """Which rows of the T are gathered, some more than once."""

    row_P: Tensor
    """int64: the row of every place; row 0 stands in for padding."""
    place_T: Tensor
    """int64: the place of every row."""
    more: tuple[tuple[Tensor, Tensor], ...] = ()
    """int64 (rows, places): the places of stems beside their own, a pair of tensors for the first branch of each, one
    for the second, ...; so no row is twice in one."""


class _Bucket(NamedTuple):
    segments: int
    queries: int
    keys: int
    padding_B: Tensor | None = None
    """int64: keys before those of a shorter stem; None where there are none."""


class _Plan(NamedTuple):
    """How segments are laid out for attention: bucket after bucket."""

    buckets: list[_Bucket]
    queries: _Rows | None
    """None: the rows are already in order."""
    keys: _Rows | None


class _Varlen(NamedTuple):
    """The same for a kernel that takes segments of any length."""

    offsets: tuple[Tensor, Tensor]
    """int32 (S + 1,): where the queries of each segment begin, and its keys."""
    longest: tuple[int, int]
    keys: _Rows | None


class _Gather(torch.autograd.Function):
    """(T, N, H) -> (places, N, H). Padded places hold row 0 and send no gradient back; where a row has several, their
    gradients add up in the wide dtype, always in the same order."""

    @staticmethod
    def forward(ctx, x_TNH, rows):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = rows
        return x_TNH.index_select(0, rows.row_P.to(x_TNH.device))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: _Rows = ctx.rows
        grad_TNH = grad.index_select(0, rows.place_T.to(grad.device))
        if rows.more:
            grad_TNH = wide(grad_TNH)
            for row, place in rows.more:
                row, place = row.to(grad.device), place.to(grad.device)
                grad_TNH.index_add_(0, row, wide(grad.index_select(0, place)))
        return grad_TNH.to(grad.dtype), None


def _gather(x_TNH: Tensor, rows: _Rows | None) -> Tensor:
    return x_TNH if rows is None else _Gather.apply(x_TNH, rows)  # pyright: ignore[reportReturnType]


def _plan_buckets(lengths: Sequence[int], stems: Sequence[int] = (), *, round_up: bool) -> _Plan:
    """Group segments whose lengths agree when rounded up to an eighth: little is wasted and many are merged."""
    if not stems and len(set(lengths)) == 1:
        return _Plan([_Bucket(len(lengths), lengths[0], lengths[0])], None, None)
    groups: dict[int, list[int]] = defaultdict(list)
    for segment, length in enumerate(lengths):
        if not stems or stems[segment] < 0:
            groups[_eighth(length) if round_up else length].append(segment)
    queries, keys, buckets, place, key_place = [], [], [], 0, 0
    shapes = [(members, 0, length) for length, members in groups.items()] + _group_branches(lengths, stems)
    turn = _turns(stems)
    for members, before, length in shapes:
        padding = []
        for segment in members:
            queries.append((segment, place, 0))
            if stems and stems[segment] >= 0:
                padding.append(before - lengths[stems[segment]])
                keys.append((stems[segment], key_place + padding[-1], turn[segment]))
            keys.append((segment, key_place + before, 0))
            place, key_place = place + length, key_place + before + length
        padding_B = torch.tensor(padding) if any(padding) else None
        buckets.append(_Bucket(len(members), length, before + length, padding_B))
    queries = _rows(lengths, queries, place)
    return _Plan(buckets, queries, _rows(lengths, keys, key_place) if stems else queries)


def _plan_varlen(lengths: Sequence[int], stems: Sequence[int], device: torch.device) -> _Varlen:
    def offsets(counts: Sequence[int]) -> Tensor:
        return torch.tensor((0, *counts), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)

    queries = offsets(lengths)
    if not stems:
        return _Varlen((queries, queries), (max(lengths), max(lengths)), None)
    turn, pieces, place, counts = _turns(stems), [], 0, []
    for segment, (length, stem) in enumerate(zip(lengths, stems, strict=True)):
        before = lengths[stem] if stem >= 0 else 0
        if stem >= 0:
            pieces.append((stem, place, turn[segment]))
        pieces.append((segment, place + before, 0))
        place += before + length
        counts.append(before + length)
    rows = _rows(lengths, pieces, place)
    on_device = _Rows(
        rows.row_P.to(device), rows.place_T.to(device), tuple((r.to(device), p.to(device)) for r, p in rows.more)
    )
    return _Varlen((queries, offsets(counts)), (max(lengths), max(counts)), on_device)


def _turns(stems: Sequence[int]) -> list[int]:
    """Of each segment with a stem, 1 if it is the stem's first branch, 2 if it is the second, ...; 0 of the others."""
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for stem in stems:
        seen[stem] += stem >= 0
        turns.append(seen[stem])
    return turns


def _rows(lengths: Sequence[int], pieces: Sequence[tuple[int, int, int]], places: int) -> _Rows:
    """
    Args:
        pieces: (segment, where its first token is placed, turn); in turn 0 every segment has its own place.
    """
    starts = [0, *accumulate(lengths)]
    row_P = torch.zeros(places, dtype=torch.int64)
    turns: dict[int, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for segment, place, turn in pieces:
        row, at = torch.arange(starts[segment], starts[segment + 1]), torch.arange(place, place + lengths[segment])
        row_P[at] = row
        turns[turn][0].append(row)
        turns[turn][1].append(at)
    (row_T, place_T), *more = ((torch.cat(turns[turn][0]), torch.cat(turns[turn][1])) for turn in sorted(turns))
    return _Rows(row_P, torch.empty_like(place_T).index_copy_(0, row_T, place_T), tuple(more))


def _eighth(length: int) -> int:
    """Rounded up to a multiple of an eighth of the power of two below, and of 8."""
    step = max(1 << max(length.bit_length() - 4, 0), 8)
    return -(-length // step) * step


def _group_branches(lengths: Sequence[int], stems: Sequence[int]) -> list[tuple[list[int], int, int]]:
    """(segments, keys before their own, own length): branches share a bucket while the padding costs at most an eighth
    of what they compute, or less than another call."""
    buckets, exact = [], 0
    sizes = [
        (_eighth(lengths[stem]), length, segment)
        for segment, (length, stem) in enumerate(zip(lengths, stems, strict=False))
        if stem >= 0
    ]
    for _, length, segment in sorted(sizes):
        before = lengths[stems[segment]]
        pairs = length * (before + length)
        if buckets:
            members, widest, longest = buckets[-1]
            widest, longest = max(widest, before), max(longest, length)
            padded = (len(members) + 1) * longest * (widest + longest)
            if padded - exact - pairs <= max((exact + pairs) // 8, CALL):
                buckets[-1] = ([*members, segment], widest, longest)
                exact += pairs
                continue
        buckets.append(([segment], before, length))
        exact = pairs
    return buckets
