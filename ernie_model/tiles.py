"""Attention on the CPU, a tile of queries at a time, by matrix products.

The CPU kernel behind `scaled_dot_product_attention` is slow backwards, and slow both ways for many short segments in
bfloat16 (docs/speed.md has the figures). Here the scores of one tile of queries against all the keys they may
see are multiplied out, normalised and used, and multiplied out again in the backward pass; for short
segments the probabilities are kept instead (`LONGEST_KEPT`). Scores and their gradients are float32, the other products
run in the dtype of the inputs, as in flash attention.

Shape letters:  B segments   L queries of each   S keys of each, of which the last L are the queries' own
                N query heads   G key/value heads   M = N/G   H head width   Z = B*G   C queries of a tile
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ernie_model.layers import wide

TILE_ROWS = 128
"""Rows of a tile: queries times the heads that share a key. The scores of a tile should fit the second-level cache."""
TILE_BYTES = 2**20
LONGEST_KEPT = 512
"""Up to so many keys the backward pass keeps the probabilities (at most S numbers per token and head) instead of making
them again."""


def tiled_attention(
    q_BLNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, *, causal: bool, padding_B: Tensor | None = None
) -> Tensor:
    """Softmax attention of B equally long segments; returns (B, L, N, H) in the dtype of the queries.

    Args:
        causal: the last query sees all keys, the one before it all but the last, and so on.
        padding_B: of the first S - L keys of each segment, how many at the beginning nobody sees; None is none.
    """
    return _TiledAttention.apply(q_BLNH, k_BSGH, v_BSGH, causal, padding_B)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def attention_after(q_LNH: Tensor, k_GSH: Tensor, v_GSH: Tensor) -> Tensor:
    """Causal attention of the last L of S tokens, whose predecessors were computed earlier; (L, N, H), no gradient."""
    length, past = q_LNH.shape[0], k_GSH.shape[1] - q_LNH.shape[0]
    q = q_LNH.unflatten(1, (k_GSH.shape[0], -1)).transpose(0, 1)  # (G, L, M, H)
    out = torch.empty_like(q)
    for part, tile, seen in _tiles(q.shape, causal=True, past=past):
        prob = _probabilities(q[part, tile], k_GSH[part, :seen, None], causal=True).to(q.dtype)
        out[part, tile] = torch.bmm(prob, v_GSH[part, :seen]).unflatten(1, (-1, q.shape[2]))
    return out.transpose(0, 1).reshape(length, -1, q.shape[3])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BLNH, k_BSGH, v_BSGH, causal, padding_B):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.causal, ctx.hidden_ZS = causal, _hidden(padding_B, k_BSGH)
        q, k, v = _by_key_head(q_BLNH, k_BSGH), _by_key_head(k_BSGH, k_BSGH), _by_key_head(v_BSGH, k_BSGH)
        heads, out, kept = q.shape[2], torch.empty_like(q), []
        for part, tile, seen in _tiles(q.shape, causal, past=k.shape[1] - q.shape[1]):
            prob = _probabilities(q[part, tile], k[part, :seen], causal, ctx.hidden_ZS[part]).to(q.dtype)
            out[part, tile] = torch.bmm(prob, v[part, :seen, 0]).unflatten(1, (-1, heads))
            if k.shape[1] <= LONGEST_KEPT and any(ctx.needs_input_grad):
                kept.append(prob)
        ctx.save_for_backward(q_BLNH, k_BSGH, v_BSGH, *kept)
        return _by_segment(out, k_BSGH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLNH):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BLNH, k_BSGH, v_BSGH, *kept = ctx.saved_tensors
        q, k, v = _by_key_head(q_BLNH, k_BSGH), _by_key_head(k_BSGH, k_BSGH), _by_key_head(v_BSGH, k_BSGH)
        grad, scale, heads = _by_key_head(grad_BLNH, k_BSGH), q.shape[-1] ** -0.5, q.shape[2]
        grad_q = torch.empty_like(q)
        # Every tile adds to its keys and values, so these sums are kept in the wide dtype.
        grad_k, grad_v = (torch.zeros_like(x[:, :, 0], dtype=wide(x[:0]).dtype) for x in (k, v))
        for number, (part, tile, seen) in enumerate(_tiles(q.shape, ctx.causal, past=k.shape[1] - q.shape[1])):
            query, keys, upstream = q[part, tile].flatten(1, 2), k[part, :seen, 0], grad[part, tile].flatten(1, 2)
            if kept:
                prob = wide(kept[number])
            else:
                prob = _probabilities(q[part, tile], k[part, :seen], ctx.causal, ctx.hidden_ZS[part])
            grad_prob = torch.bmm(wide(upstream), wide(v[part, :seen, 0]).transpose(1, 2))
            grad_score = torch.ops.aten._softmax_backward_data(grad_prob, prob, -1, prob.dtype).mul_(scale).to(q.dtype)
            grad_q[part, tile] = torch.bmm(grad_score, keys).unflatten(1, (-1, heads))
            grad_k[part, :seen] += torch.bmm(grad_score.transpose(1, 2), query)
            grad_v[part, :seen] += torch.bmm(prob.to(q.dtype).transpose(1, 2), upstream)
        grad_k, grad_v = grad_k.to(k.dtype)[:, :, None], grad_v.to(v.dtype)[:, :, None]
        return _by_segment(grad_q, k_BSGH), _by_segment(grad_k, k_BSGH), _by_segment(grad_v, k_BSGH), None, None


def _hidden(padding_B: Tensor | None, k_BSGH: Tensor) -> Tensor:
    """(Z, most padding): -inf where a key is padding."""
    if padding_B is None:
        return k_BSGH.new_empty(k_BSGH.shape[0] * k_BSGH.shape[2], 0)
    is_padding_BS = torch.arange(int(padding_B.max())) < padding_B[:, None]
    hidden_BS = torch.zeros(is_padding_BS.shape, dtype=wide(k_BSGH[:0]).dtype).masked_fill_(is_padding_BS, -math.inf)
    return hidden_BS.repeat_interleave(k_BSGH.shape[2], dim=0).to(k_BSGH.device)


def _probabilities(query: Tensor, keys: Tensor, causal: bool, hidden_ZS: Tensor | None = None) -> Tensor:
    """(Z, C, M, H) queries, the last of which sees all of the (Z, seen, 1, H) keys -> (Z, C*M, seen)."""
    tile, heads, width = query.shape[1:]
    score = torch.bmm(wide(query).flatten(1, 2) * width**-0.5, wide(keys[:, :, 0]).transpose(1, 2))
    if causal:
        score[:, :, -tile:] += _future(tile, heads, score.dtype, score.device)
    if hidden_ZS is not None and hidden_ZS.shape[1]:
        score[:, :, : hidden_ZS.shape[1]] += hidden_ZS[:, None]
    return score.softmax(-1)


@lru_cache(maxsize=64)
def _future(tile: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf where a query of the tile would see a later one; the `heads` rows of a query are adjacent."""
    return torch.full((tile, tile), -math.inf, dtype=dtype, device=device).triu(1).repeat_interleave(heads, dim=0)


def _tiles(shape: torch.Size, causal: bool, past: int = 0) -> list[tuple[slice, slice, int]]:
    """(which of Z, which queries, how many keys they see), sized so that the scores of a tile stay in the cache.

    `past`: keys before those of the first query.
    """
    batch, length, heads, _ = shape
    tile = max(TILE_ROWS // heads, 16)
    part = max(TILE_BYTES // (4 * tile * heads * (past + length)), 1)
    return [
        (slice(z, z + part), slice(at, min(at + tile, length)), past + (min(at + tile, length) if causal else length))
        for z in range(0, batch, part)
        for at in range(0, length, tile)
    ]


def _by_key_head(x_BLNH: Tensor, k_BSGH: Tensor) -> Tensor:
    """(B, L, G*M, H) -> (B*G, L, M, H): the M heads that share a key head become rows of one product."""
    return x_BLNH.unflatten(2, (k_BSGH.shape[2], -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _by_segment(x_ZLMH: Tensor, k_BSGH: Tensor) -> Tensor:
    """The inverse of `_by_key_head`."""
    return x_ZLMH.unflatten(0, (k_BSGH.shape[0], -1)).transpose(1, 2).flatten(2, 3)
