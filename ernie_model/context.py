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

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class _Bucket:
    """Segments that are attended to together."""

    start: int  # first row, when the segments are equally long and adjacent
    segments: int
    length: int
    row_BL: Tensor | None  # otherwise: the row of every (segment, place); T, a row of zeros, where there is none
    place_T: Tensor | None  # and the flat (segment, place) of each row it covers
    token_T: Tensor | None  # which rows those are


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
        self._offsets: dict[torch.device, Tensor] = {}
        self._plan: list[_Bucket] | None = None

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Softmax attention inside each segment; returns (T, N, H) in the dtype of the queries."""
        if q_TNH.shape[0] != self.num_tokens:
            raise ValueError(f"the segments hold {self.num_tokens} tokens, the row {q_TNH.shape[0]}.")
        if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
            return self._attend_varlen(q_TNH, k_TGH, v_TGH)
        return self._attend_buckets(q_TNH, k_TGH, v_TGH)

    def _attend_varlen(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Flash attention over segment boundaries: one kernel for the whole row."""
        device = q_TNH.device
        if device not in self._offsets:
            offsets = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._offsets[device] = offsets.to(device, non_blocking=True)
        offsets, longest = self._offsets[device], max(self.lengths)
        window = (-1, 0) if self.causal else (-1, -1)
        return varlen_attn(
            q_TNH, k_TGH, v_TGH, offsets, offsets, longest, longest, window_size=window, enable_gqa=True
        )  # pyright: ignore[reportReturnType]

    def _attend_buckets(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        if self._plan is None:
            self._plan = _plan_buckets(self.lengths, round_up=self.causal)
        outputs, tokens = [], []
        for bucket in self._plan:
            q, k, v = (_gather(x, bucket) for x in (q_TNH, k_TGH, v_TGH))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
            y = y.transpose(1, 2).flatten(0, 1)
            if bucket.row_BL is None:
                index = torch.arange(bucket.start, bucket.start + bucket.segments * bucket.length)
            else:
                assert bucket.place_T is not None and bucket.token_T is not None
                y, index = y[bucket.place_T.to(y.device)], bucket.token_T
            outputs.append(y)
            tokens.append(index)
        if len(outputs) == 1:
            return outputs[0]
        order_T = torch.cat(tokens).argsort().to(q_TNH.device)
        return torch.cat(outputs)[order_T]


def _gather(x_TNH: Tensor, bucket: _Bucket) -> Tensor:
    """(T, N, H) -> (B, N, L, H) for the segments of a bucket."""
    if bucket.row_BL is None:
        rows = x_TNH[bucket.start : bucket.start + bucket.segments * bucket.length]
        return rows.unflatten(0, (bucket.segments, bucket.length)).transpose(1, 2)
    padded = F.pad(x_TNH, (0, 0, 0, 0, 0, 1))
    return padded[bucket.row_BL.to(x_TNH.device)].transpose(1, 2)


def _plan_buckets(lengths: Sequence[int], *, round_up: bool) -> list[_Bucket]:
    """Group segments whose padded lengths agree. Rounding up to an eighth of the length wastes little and merges many."""
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for segment, length in enumerate(lengths):
        step = max(1 << max(length.bit_length() - 4, 0), 4) if round_up and len(lengths) > 1 else 1
        groups[-(-length // step) * step].append(segment)
    plan = []
    for padded, members in groups.items():
        exact = all(lengths[s] == padded for s in members)
        adjacent = members == list(range(members[0], members[0] + len(members)))
        if len({lengths[s] for s in members}) == 1 and adjacent:
            # Equal and adjacent: a view instead of a copy, and no padding.
            plan.append(_Bucket(starts[members[0]], len(members), lengths[members[0]], None, None, None))
            continue
        length = padded if not exact else lengths[members[0]]
        row_BL = torch.full((len(members), length), starts[-1])
        for i, s in enumerate(members):
            row_BL[i, : lengths[s]] = torch.arange(starts[s], starts[s] + lengths[s])
        place_T = (row_BL.flatten() < starts[-1]).nonzero()[:, 0]
        plan.append(_Bucket(0, len(members), length, row_BL, place_T, row_BL.flatten()[place_T]))
    return plan
