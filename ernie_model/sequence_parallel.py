"""One packed row on several ranks (Ulysses, arXiv 2309.14509): each holds a part of the tokens, and attention alone
needs the others.

    row         a0 a1 a2 a3 b0 b1 b2        two segments on two ranks: 3 tokens here, 4 there
    rank 0      a0 a1 a2                    norms, experts, head: every rank on its own tokens
    rank 1               a3 b0 b1 b2

    attention   rank 0: a0 .. b2, first half of the heads      exchange   (C, all heads)  ->  (T, heads / ranks)
                rank 1: a0 .. b2, second half                  attend     inside segments, as ever
                                                               exchange   back

    images      i0 i1 i2  |  rank 0 computes i0, i1, rank 1 computes i2; then each gets the features of the placeholders
                             among its tokens, whoever computed them

Two exchanges per layer and direction; queries, keys and values travel in one. Parts may differ in length by a token and
may be empty, so no row needs padding. Where there are more ranks than key/value heads, these are sent more than once.

For gradients, the ranks of a row are ranks with other tokens: each sends the gradient of its own tokens' loss back,
through the exchanges to whoever computed what was attended to, and the sum over ranks is that of one process.

DeepSpeed has this exchange too (`deepspeed.sequence.layer.DistributedAttention`). It isn't used: it takes a batch
dimension and equal parts, so rows would need padding; sends queries, keys and values apart; and has nothing for images.
What would be left of it are the ten lines of `Exchange`.

Shape letters:  T tokens of the row   C of them on this rank   N query heads   G key/value heads   H head width
                M media tokens   D model width
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ernie_model.context import Packed
from ernie_model.rope import Grid, num_media_tokens


def check_heads(queries: int, keys: int, ranks: int) -> None:
    """Raises ValueError if attention cannot be shared by so many ranks: each must get whole heads, with their keys."""
    if queries % ranks or (keys % ranks and ranks % keys):
        fitting = [n for n in range(1, queries + 1) if queries % n == 0 and (keys % n == 0 or n % keys == 0)]
        raise ValueError(
            f"{queries} query heads and {keys} key/value heads cannot be shared by {ranks} ranks: their number must "
            "divide the query heads, and divide the key/value heads or be a multiple of them. Of this model: "
            f"{', '.join(map(str, fitting))}."
        )


def cuts_of(tokens: int, ranks: int) -> tuple[int, ...]:
    """Where a row is cut: part p is [cuts[p], cuts[p + 1]). 7 tokens on 2 ranks: (0, 3, 7)."""
    return tuple(tokens * part // ranks for part in range(ranks + 1))


def deal_media(grids: Sequence[Grid], ranks: int) -> list[list[Grid]]:
    """Which images and stretches of videos each rank computes, in order, by their middle on the line of all patches.

    A video is dealt in pairs of frames, which nothing but the text ties together (vision.py, resampler.py); pairs that
    stay on one rank stay one item.

        grids    image of 100 patches, video of 4 frames x 50
        2 ranks  [(1, ..100)], [(4, ..50)]          3 ranks  [(1, ..100)], [(2, ..50)], [(2, ..50)]
    """
    total, at = sum(t * h * w for t, h, w in grids), 0
    dealt: list[list[Grid]] = [[] for _ in range(ranks)]
    for frames, rows, columns in grids:
        pair = min(frames, 2)
        size, taken = pair * rows * columns, [0] * ranks
        for _ in range(frames // pair):
            taken[(2 * at + size) * ranks // (2 * total)] += pair
            at += size
        for mine, some in zip(dealt, taken, strict=True):
            if some:
                mine.append((some, rows, columns))
    return dealt


def pixels_of(grids: Sequence[Grid], ranks: int, part: int) -> slice:
    """Which of the row's patches belong to what `deal_media` gives to one rank."""
    ends = [0, *itertools.accumulate(sum(t * h * w for t, h, w in mine) for mine in deal_media(grids, ranks))]
    return slice(ends[part], ends[part + 1])


class SharedRow:
    """Segments of a packed row that the ranks of `group` hold together; what `Packed` is to one process.

    Args:
        lengths: tokens of each segment of the whole row, in order.
        stems: see `Packed`.
    """

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup, *, stems: Sequence[int] = ()):
        self.packed = Packed(lengths, stems=stems)
        self.group = group
        self.ranks, self.part = dist.get_world_size(group), dist.get_rank(group)
        self.cuts = cuts_of(self.packed.num_tokens, self.ranks)

    @property
    def tokens_P(self) -> list[int]:
        """Of each part."""
        return [stop - start for start, stop in itertools.pairwise(self.cuts)]

    def attend(self, q_CNH: Tensor, k_CGH: Tensor, v_CGH: Tensor) -> Tensor:
        """Softmax attention inside each segment of the whole row and to its stem; (C, N, H) of this rank's tokens."""
        ranks, tokens_P = self.ranks, self.tokens_P
        here_P = [q_CNH.shape[0]] * ranks
        copies = max(ranks // k_CGH.shape[1], 1)
        k_CGH, v_CGH = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (k_CGH, v_CGH))
        # (C, heads, H) -> (ranks, C, heads / ranks, H): what rank p gets lies together
        parts = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (q_CNH, k_CGH, v_CGH)]
        heads = [part.shape[2] for part in parts]
        row = exchange(torch.cat(parts, dim=2).flatten(0, 1), here_P, tokens_P, self.group)
        y = exchange(self.packed.attend(*row.split(heads, dim=1)), tokens_P, here_P, self.group)
        return y.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)

    def media(self, grids: Sequence[Grid]) -> list[Grid]:
        """Of the row's images and videos, those that this rank computes."""
        return deal_media(grids, self.ranks)[self.part]

    def deliver(self, feature_MD: Tensor, grids: Sequence[Grid], media_P: Sequence[int]) -> Tensor:
        """Features of `media(grids)` -> those of the placeholders among this rank's tokens, `media_P[part]` of them."""
        made_P = [sum(map(num_media_tokens, mine)) for mine in deal_media(grids, self.ranks)]
        made, wanted = ([0, *itertools.accumulate(x)] for x in (made_P, media_P))

        def common(a: int, b: int) -> int:
            """Features that rank a makes and rank b wants."""
            return max(min(made[a + 1], wanted[b + 1]) - max(made[a], wanted[b]), 0)

        sends_P = [common(self.part, rank) for rank in range(self.ranks)]
        receives_P = [common(rank, self.part) for rank in range(self.ranks)]
        return exchange(feature_MD, sends_P, receives_P, self.group)


class Exchange(torch.autograd.Function):
    """The first `sends[0]` rows of x go to rank 0, the next to rank 1, ...; gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, sends, receives, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.plan = sends, receives, group
        return _all_to_all(x, sends, receives, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        sends, receives, group = ctx.plan
        return _all_to_all(grad, receives, sends, group), None, None, None


def _all_to_all(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


def exchange(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """See `Exchange`. Every rank of the group must call it, forwards and backwards."""
    return Exchange.apply(x, sends, receives, group)  # pyright: ignore[reportReturnType]


class _Whole(torch.autograd.Function):
    """Sum over ranks of vectors that are 0 outside each rank's part. Every rank computes the same loss from the result,
    so each sends back what concerns its own part, and nothing is added up twice."""

    @staticmethod
    def forward(ctx, x_T, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        out_T = x_T.clone()
        dist.all_reduce(out_T, group=group)
        return out_T

    @staticmethod
    def backward(ctx, grad_T):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_T, None


def whole(x_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's part of a number per token of the row, on every rank. `x_T` is 0 outside this rank's part."""
    return _Whole.apply(x_T, group)  # pyright: ignore[reportReturnType]
