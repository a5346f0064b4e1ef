"""Who may look at whom.

`Packed` says it for training: the row holds several segments, and a token sees its own segment up to itself.

          a0 a1 a2 b0 b1
      a0   x
      a1   x  x
      a2   x  x  x
      b0            x
      b1            x  x

No T x T mask is ever built: the cost is the sum of squared segment lengths. Segments of similar length are attended
to together, padded to a common length; under a causal mask the padding sits after every real key and is never seen.

Shape letters:  T tokens   N query heads   G key/value heads   H head width   B segments of one bucket   L its length
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_model.rope import Grid
from ernie_model.tiles import tiled_attention

LONGEST_TILED = 2048
"""Beyond this segment length torch's own CPU kernel is the faster one (docs/speed.md)."""


class Packed:
    """Segments of one packed row, for training and for prompts.

    Args:
        lengths: tokens of each segment, in order.
        causal: False lets every token see its whole segment (frames in the vision tower).
    """

    def __init__(self, lengths: Sequence[int], *, causal: bool = True):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segment lengths must be positive and at least one; got {list(lengths)}.")
        self.lengths = tuple(lengths)
        self.causal = causal
        self.num_tokens = sum(self.lengths)
        self.cuts, self.part = (0, self.num_tokens), 0
        self._offsets: dict[torch.device, Tensor] = {}
        self._plan: _Plan | None = None

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Softmax attention inside each segment; returns (T, N, H) in the dtype of the queries."""
        if q_TNH.shape[0] != self.num_tokens:
            raise ValueError(f"the segments hold {self.num_tokens} tokens, the row {q_TNH.shape[0]}.")
        if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(q_TNH, k_TGH, v_TGH)
        return self._attend_buckets(q_TNH, k_TGH, v_TGH)

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
        if device not in self._offsets:
            offsets = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._offsets[device] = offsets.to(device, non_blocking=True)
        offsets, longest = self._offsets[device], max(self.lengths)
        window = (-1, 0) if self.causal else (-1, -1)
        options: dict[str, Any] = {"window_size": window}
        if q_TNH.shape[1] != k_TGH.shape[1]:
            if "enable_gqa" in inspect.signature(varlen_attn).parameters:
                options["enable_gqa"] = True
            else:  # torch 2.11
                share = q_TNH.shape[1] // k_TGH.shape[1]
                k_TGH, v_TGH = (x.repeat_interleave(share, dim=1) for x in (k_TGH, v_TGH))
        return varlen_attn(q_TNH, k_TGH, v_TGH, offsets, offsets, longest, longest, **options)  # pyright: ignore

    def _attend_buckets(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Segments of similar length together; padding goes in and comes out by one gather each."""
        if self._plan is None:
            self._plan = _plan_buckets(self.lengths, round_up=self.causal)
        plan = self._plan
        padded = [_Pad.apply(x, plan) if plan.place_T is not None else x for x in (q_TNH, k_TGH, v_TGH)]
        sizes = [segments * length for segments, length in plan.buckets]
        outputs = [
            self._kernel(*(x.unflatten(0, bucket) for x in parts), length=bucket[1]).flatten(0, 1)
            for bucket, *parts in zip(plan.buckets, *(x.split(sizes) for x in padded), strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y if plan.place_T is None else y.index_select(0, plan.place_T.to(y.device))

    def _kernel(self, q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, *, length: int) -> Tensor:
        if q_BLNH.device.type == "cpu" and length <= LONGEST_TILED:
            return tiled_attention(q_BLNH, k_BLGH, v_BLGH, causal=self.causal)
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLGH, v_BLGH))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)


class _Plan(NamedTuple):
    """How segments are laid out for attention: bucket after bucket, each (segments, padded length)."""

    buckets: list[tuple[int, int]]
    row_P: Tensor | None
    """int64: the row of every place; row 0 stands in for padding. None when the rows are already in order."""
    place_T: Tensor | None
    """int64: the place of every row."""


class _Pad(torch.autograd.Function):
    """(T, N, H) -> (places, N, H). Padded places hold row 0 and send no gradient back."""

    @staticmethod
    def forward(ctx, x_TNH, plan):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.plan = plan
        return x_TNH.index_select(0, plan.row_P.to(x_TNH.device))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, ctx.plan.place_T.to(grad.device)), None


def _plan_buckets(lengths: Sequence[int], *, round_up: bool) -> _Plan:
    """Group segments whose lengths agree when rounded up to an eighth: little is wasted and many are merged."""
    if len(set(lengths)) == 1:
        return _Plan([(len(lengths), lengths[0])], None, None)
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for segment, length in enumerate(lengths):
        step = max(1 << max(length.bit_length() - 4, 0), 8) if round_up else 1
        groups[-(-length // step) * step].append(segment)
    rows, place_T, buckets, at = [], torch.empty(starts[-1], dtype=torch.int64), [], 0
    for length, members in groups.items():
        row_BL = torch.zeros(len(members), length, dtype=torch.int64)
        for i, segment in enumerate(members):
            token = torch.arange(starts[segment], starts[segment + 1])
            row_BL[i, : lengths[segment]] = token
            place_T[token] = at + i * length + torch.arange(lengths[segment])
        rows.append(row_BL.flatten())
        buckets.append((len(members), length))
        at += len(members) * length
    return _Plan(buckets, torch.cat(rows), place_T)
