"""Keys and values of what was computed before, in pages; and the context that lets a step's tokens see them.

    tokens of one request     t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9           pages of 4 tokens
    its pages                     7             2            5            whoever begins alike may name page 7 too

Which request owns which page is the host's business (pages.py, scheduler.py). Here a request is a list of page numbers
and the number of tokens already in them.

Shape letters:  T tokens of a step   N query heads   G key/value heads   H head width   M = N/G
                P pages of the cache   C tokens of a page   S = P*C slots   B rows of one token   L keys
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.layers import wide
from ernie_model.rope import Grid
from ernie_model.tiles import attention_after


class Span(NamedTuple):
    """The tokens of one request in a step: `length` of them, of which the first is its token number `start`."""

    start: int
    length: int
    pages: Sequence[int]
    """Of all its tokens up to start + length."""


class PagedCache:
    """Memory of keys and values of all layers."""

    def __init__(
        self, config: ErnieConfig, *, num_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        self.num_pages, self.page_tokens, self.num_kv_heads = num_pages, page_tokens, config.num_key_value_heads
        # Heads before pages: a head's tokens lie one after the other, as the products of attention want them.
        shape = (config.num_hidden_layers, 2 * self.num_kv_heads, num_pages, page_tokens, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    def clear(self, pages: Sequence[int]) -> None:
        """What an earlier owner left there is multiplied by 0 where a page is not full yet; a NaN would survive it."""
        if pages:
            self.data.index_fill_(2, torch.tensor(pages, device=self.data.device), 0)


def page_bytes(config: ErnieConfig, dtype: torch.dtype, page_tokens: int) -> int:
    """Bytes of one page: keys and values of all layers."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * dtype.itemsize * page_tokens


class KVCache:
    """One step over the cache: a `Context` whose tokens see their own request's earlier ones.

    The model's attention layers come by in order, each once: a `KVCache` serves one forward pass.

    Args:
        spans: the requests of the step, end to end in the row; those of one token first.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span]):
        self.cache, self.spans = cache, spans
        self.num_tokens = sum(span.length for span in spans)
        self.cuts, self.part = (0, self.num_tokens), 0
        self._layer = 0
        size, device = cache.page_tokens, cache.data.device
        slots: list[int] = []
        for start, length, pages in spans:
            slots += [pages[at // size] * size + at % size for at in range(start, start + length)]
        self._slot_T = torch.tensor(slots, device=device)
        singles = [span for span in spans if span.length == 1]
        self._singles = _Singles(cache, singles) if singles else None
        rest = spans[len(singles) :]
        assert all(span.length > 1 for span in rest), "spans of one token come first"
        self._chunks = [_Chunk(cache, span) for span in rest]
        # A page that begins in this step and does not become full:
        ends = [(start, start + length, pages) for start, length, pages in spans]
        cache.clear([pages[end // size] for start, end, pages in ends if start <= end // size * size < end])

    def media(self, grids: Sequence[Grid]) -> Sequence[Grid]:
        """All images and videos are computed here, and"""
        return grids

    def deliver(self, feature_MD: Tensor, grids: Sequence[Grid], media_P: Sequence[int]) -> Tensor:
        """so are all features."""
        return feature_MD

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Keep the step's keys and values of this layer, then let every token see its request up to itself."""
        kv = self.cache.data[self._layer]
        self._layer += 1
        kv.flatten(1, 2).index_copy_(1, self._slot_T, torch.cat((k_TGH, v_TGH), dim=1).transpose(0, 1))
        outputs, at = [], 0
        if self._singles is not None:
            at = self._singles.rows
            outputs.append(self._singles.attend(q_TNH[:at], kv))
        for chunk in self._chunks:
            here = slice(at, at + chunk.length)
            outputs.append(chunk.attend(q_TNH[here], k_TGH[here], v_TGH[here], kv))
            at += chunk.length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Singles:
    """Rows of one token, all together: their pages side by side, padded to the longest."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]):
        self.rows, device = len(spans), cache.data.device
        counts = [-(-(span.start + 1) // cache.page_tokens) for span in spans]
        # A row's own first page stands in where others are longer: nothing of another request comes near its sums.
        page_BI = torch.tensor(
            [
                [*span.pages[:count], *[span.pages[0]] * (max(counts) - count)]
                for span, count in zip(spans, counts, strict=True)
            ],
            device=device,
        )
        heads = torch.arange(2 * cache.num_kv_heads, device=device) * cache.num_pages
        self._page_index = (heads[:, None] + page_BI.flatten()).flatten()
        end_B = torch.tensor([span.start + 1 for span in spans], device=device)
        future_BL = torch.arange(page_BI.shape[1] * cache.page_tokens, device=device) >= end_B[:, None]
        mask = torch.zeros(future_BL.shape, dtype=wide(cache.data[:0]).dtype, device=device)
        self._mask_Z1L = mask.masked_fill_(future_BL, -math.inf).repeat(cache.num_kv_heads, 1)[:, None]

    def attend(self, q_BNH: Tensor, kv: Tensor) -> Tensor:
        groups = kv.shape[0] // 2
        gathered = kv.flatten(0, 1).index_select(0, self._page_index)  # (2*G*B*I, C, H)
        k_ZLH, v_ZLH = gathered.view(2, groups * self.rows, -1, kv.shape[3])
        q_ZMH = q_BNH.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
        score = torch.bmm(wide(q_ZMH) * q_ZMH.shape[-1] ** -0.5, wide(k_ZLH).transpose(1, 2)).add_(self._mask_Z1L)
        y_ZMH = torch.bmm(score.softmax(-1).to(v_ZLH.dtype), v_ZLH)
        return y_ZMH.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


class _Chunk:
    """Several tokens of one request."""

    def __init__(self, cache: PagedCache, span: Span):
        self.length, self.end = span.length, span.start + span.length
        self._fresh = Packed([span.length]) if span.start == 0 else None
        self._pages = torch.tensor(span.pages[: -(-self.end // cache.page_tokens)], device=cache.data.device)

    def attend(self, q_LNH: Tensor, k_LGH: Tensor, v_LGH: Tensor, kv: Tensor) -> Tensor:
        if self._fresh is not None:
            return self._fresh.attend(q_LNH, k_LGH, v_LGH)
        gathered = kv.index_select(1, self._pages).flatten(1, 2)[:, : self.end]
        k_GSH, v_GSH = gathered.chunk(2)
        return attention_after(q_LNH, k_GSH, v_GSH)
