"""Attention in tiles that are cut by a token's place in its own sequence: the same products for a token of a training
row and for the same token when it is decoded (exact.py tells why).

Shape letters:  Z tiles   C tokens of a tile   N query heads   G key/value heads   M = N/G   H head width
                S sequences   L places of the longest   T tokens to compute
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ernie_model.layers import wide

TILE = 32
"""Queries of a tile, and keys of a block."""
BATCH = 64
"""On a GPU, matrices of one batched product: kernels are chosen by their number, too."""

Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(Z, C) int64 rows -> their keys and values, (Z, C, G, H) each; -1 is nobody's row."""


class Tiles:
    """
    Args:
        starts: of each sequence, the place of its first query.
        key_rows: of each sequence, where the keys and values of places 0, 1, ... are, up to its last query.
        causal: False lets every query see the whole sequence.

    Queries lie in order, sequence after sequence.
    """

    def __init__(self, starts: Sequence[int], key_rows: Sequence[Tensor], device: torch.device, *, causal: bool = True):
        tiles = [
            (sequence, tile)
            for sequence, (start, rows) in enumerate(zip(starts, key_rows, strict=True))
            for tile in range(start // TILE, -(-len(rows) // TILE))
        ]
        seen = [tile + 1 if causal else -(-len(key_rows[sequence]) // TILE) for sequence, tile in tiles]
        order = sorted(range(len(tiles)), key=lambda i: -seen[i])  # those that see block j come first
        tiles, seen = [tiles[i] for i in order], [seen[i] for i in order]
        self.active = [sum(count > block for count in seen) for block in range(seen[0])]
        """Of each block of keys, how many tiles see it."""
        longest = TILE * max(seen)
        key_SL = torch.stack([pad(rows, (0, longest - len(rows)), value=-1) for rows in key_rows])
        sequence_Z, tile_Z = (torch.tensor(list(column)) for column in zip(*tiles, strict=True))
        self.key_ZL = key_SL[sequence_Z].to(device)
        place_ZC = tile_Z[:, None] * TILE + torch.arange(TILE)
        length_Z = torch.tensor([len(rows) for rows in key_rows])[sequence_Z]
        start_Z = torch.tensor(list(starts))[sequence_Z]
        before, at = [], 0
        for start, rows in zip(starts, key_rows, strict=True):
            before.append(at - start)
            at += len(rows) - start
        is_query_ZC = (place_ZC >= start_Z[:, None]) & (place_ZC < length_Z[:, None])
        row_ZC = (place_ZC + torch.tensor(before)[sequence_Z, None]).masked_fill(~is_query_ZC, -1)
        self.query_ZC = row_ZC.to(device)
        place = torch.empty(at, dtype=torch.int64)
        place[row_ZC[is_query_ZC]] = is_query_ZC.flatten().nonzero()[:, 0]
        self.place_T = place.to(device)
        self.last_ZC = (place_ZC if causal else (length_Z - 1)[:, None].expand(-1, TILE)).to(device)
        """The last place that each query sees."""

    @torch.no_grad()
    def attend(self, q_TNH: Tensor, fetch: Fetch) -> Tensor:
        """Softmax attention, block of keys after block; (T, N, H) in the dtype of the queries."""
        q_ZCNH = wide(take(q_TNH, self.query_ZC)) * q_TNH.shape[-1] ** -0.5
        largest = total = None
        for block, tiles in enumerate(self.active):
            places = slice(block * TILE, (block + 1) * TILE)
            k_ZCGH, v_ZCGH = (wide(x).transpose(1, 2) for x in fetch(self.key_ZL[:tiles, places]))
            groups = k_ZCGH.shape[1]
            q_YMH = q_ZCNH[:tiles].unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            score = batched(q_YMH, k_ZCGH.flatten(0, 1).transpose(1, 2)).unflatten(0, (tiles, groups))
            key_C = torch.arange(places.start, places.stop, device=score.device)
            hidden = key_C > self.last_ZC[:tiles, :, None]
            hidden = hidden.repeat_interleave(q_ZCNH.shape[2] // groups, dim=1)[:, None]
            score = score.masked_fill(hidden, -math.inf)
            # The sum of probabilities is one more column of the values: no reduction of its own.
            v = pad(v_ZCGH, (0, 1), value=1.0).flatten(0, 1)
            highest = score.amax(-1, keepdim=True)
            if largest is None or total is None:
                largest = highest
                total = batched((score - largest).exp().flatten(0, 1), v).unflatten(0, (tiles, groups))
                continue
            before = largest[:tiles]
            highest = torch.maximum(before, highest)
            fresh = batched((score - highest).exp().flatten(0, 1), v).unflatten(0, (tiles, groups))
            total[:tiles] = total[:tiles] * (before - highest).exp() + fresh
            largest[:tiles] = highest
        assert total is not None
        out = (total[..., :-1] / total[..., -1:]).to(q_TNH.dtype)  # (Z, G, C*M, H)
        out = out.unflatten(2, (TILE, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return out.index_select(0, self.place_T)


def take(x_TNH: Tensor, row_ZC: Tensor) -> Tensor:
    """(Z, C, N, H); zeros for row -1."""
    found = x_TNH.index_select(0, row_ZC.clamp(min=0).flatten()).unflatten(0, row_ZC.shape)
    return found.masked_fill((row_ZC < 0)[..., None, None], 0)


def batched(a_YMI: Tensor, b_YIO: Tensor) -> Tensor:
    """`bmm`; each product as if it were alone."""
    if not a_YMI.is_cuda:
        return torch.bmm(a_YMI.contiguous(), b_YIO.contiguous())
    number = a_YMI.shape[0]
    a_YMI, b_YIO = (pad(x, (0, 0, 0, 0, 0, -number % BATCH)) for x in (a_YMI, b_YIO))
    parts = zip(a_YMI.split(BATCH), b_YIO.split(BATCH), strict=True)
    return torch.cat([torch.bmm(a.contiguous(), b.contiguous()) for a, b in parts])[:number]
