"""Keys and values of what was computed before, in pages; and the context that lets a step's tokens see them.

    tokens of one request     t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9           pages of 4 tokens
    its pages                     7             2            5            whoever begins alike may name page 7 too

Which request owns which page is the host's business (pages.py, scheduler.py). Here a request is a list of page numbers
and the number of tokens already in them.

Shape letters:  T tokens of a step   N query heads   G key/value heads   H head width   M = N/G
                P pages of the cache   C tokens of a page   S = P*C slots   B rows of one token   L keys
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.layers import wide
from ernie_model.rope import Grid
from ernie_model.tile_plan import Tiles, take
from ernie_model.tiles import attention_after

GATHERED_BYTES = 2**20
"""Keys and values that are gathered before they are used: about what a core's second-level cache holds."""


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
        self.data = _zeros(shape, dtype, device)
        self.flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        """Attention is torch's kernel for rows of varied length."""
        self.block_tables = self.flash and _takes_block_tables(self)
        """It finds pages by itself; else they are gathered for it."""

    def clear(self, pages: Sequence[int]) -> None:
        """What an earlier owner left there is multiplied by 0 where a page is not full yet; a NaN would survive it."""
        if pages:
            self.data.index_fill_(2, torch.tensor(pages, device=self.data.device), 0)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, memory that the system fills page by page when it is touched: what no request needs costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(*shape)


def page_bytes(config: ErnieConfig, dtype: torch.dtype, page_tokens: int) -> int:
    """Bytes of one page: keys and values of all layers."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * dtype.itemsize * page_tokens


class KVCache:
    """One step over the cache: a `Context` whose tokens see their own request's earlier ones.

    The model's attention layers come by in order, each once: a `KVCache` serves one forward pass.

    Args:
        spans: the requests of the step. Their tokens lie in the row in `order`, a list of indices into `spans`.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span]):
        self.cache = cache
        singles = [] if cache.flash else [i for i, span in enumerate(spans) if span.length == 1]
        self.bundles = bundles = _bundles(cache, spans, singles)
        """Rows of one token that attend together, and how many pages they share."""
        fresh = [i for i, span in enumerate(spans) if span.length > 1 and span.start == 0]
        later = [i for i, span in enumerate(spans) if span.length > 1 and span.start > 0]
        self.order = [i for rows, _ in bundles for i in rows] + fresh + later
        if cache.flash:
            self.order = list(range(len(spans)))
        self.num_tokens = sum(span.length for span in spans)
        self.cuts, self.part = (0, self.num_tokens), 0
        self._layer = 0
        self._spans, self._exact = [spans[i] for i in self.order], None
        size, device = cache.page_tokens, cache.data.device
        slots: list[int] = []
        for start, length, pages in (spans[i] for i in self.order):
            if length == 1:
                slots.append(pages[start // size] * size + start % size)
            else:
                slots += [pages[at // size] * size + at % size for at in range(start, start + length)]
        self._slot_T = torch.tensor(slots, device=device)
        self._parts: list[tuple[int, _Fresh | _Chunk | _Bundle | _Flash]] = [
            (len(rows), _Bundle(cache, [spans[i] for i in rows], shared)) for rows, shared in bundles
        ]
        if cache.flash:
            self._parts = [(self.num_tokens, _Flash(cache, spans))]
        else:
            if fresh:
                lengths = [spans[i].length for i in fresh]
                self._parts.append((sum(lengths), _Fresh(lengths)))
            self._parts += [(spans[i].length, _Chunk(cache, spans[i])) for i in later]
        # A page that begins in this step and does not become full:
        ends = [(start, start + length, pages) for start, length, pages in spans]
        cache.clear([pages[end // size] for start, end, pages in ends if start <= end // size * size < end])

    def media(self, grids: Sequence[Grid]) -> Sequence[Grid]:
        """All images and videos are computed here, and"""
        return grids

    def deliver(self, feature_MD: Tensor, grids: Sequence[Grid], media_P: Sequence[int]) -> Tensor:
        """so are all features."""
        return feature_MD

    def attend_exactly(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """As `attend`, and bit for bit what a whole row of the same tokens gives (ernie_model/exact.py)."""
        kv = self._keep(k_TGH, v_TGH).flatten(1, 2).transpose(0, 1)
        if self._exact is None:
            size = self.cache.page_tokens
            slot_C = torch.arange(size)
            keys = [
                (torch.tensor(span.pages)[:, None] * size + slot_C).flatten()[: span.start + span.length]
                for span in self._spans
            ]
            self._exact = Tiles([span.start for span in self._spans], keys, q_TNH.device)

        def fetch(row_ZC: Tensor) -> tuple[Tensor, Tensor]:
            k_ZCGH, v_ZCGH = take(kv, row_ZC).chunk(2, dim=2)
            return k_ZCGH, v_ZCGH

        return self._exact.attend(q_TNH, fetch)

    def _keep(self, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Write this layer's keys and values; (2G, P, C, H), all of its cache."""
        kv = self.cache.data[self._layer]
        self._layer += 1
        kv.flatten(1, 2).index_copy_(1, self._slot_T, torch.cat((k_TGH, v_TGH), dim=1).transpose(0, 1))
        return kv

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """Keep the step's keys and values of this layer, then let every token see its request up to itself."""
        kv = self._keep(k_TGH, v_TGH)
        if len(self._parts) == 1:
            return self._parts[0][1].attend(q_TNH, k_TGH, v_TGH, kv)
        sizes = [tokens for tokens, _ in self._parts]
        rows = zip(self._parts, q_TNH.split(sizes), k_TGH.split(sizes), v_TGH.split(sizes), strict=True)
        return torch.cat([part.attend(q, k, v, kv) for (_, part), q, k, v in rows])


class _Fresh:
    """Prompts from their first token on: nothing of the cache is needed."""

    def __init__(self, lengths: Sequence[int]):
        self._packed = Packed(lengths)

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, kv: Tensor) -> Tensor:
        return self._packed.attend(q_TNH, k_TGH, v_TGH)


class _Chunk:
    """Several tokens of one request, of which the cache has the beginning."""

    def __init__(self, cache: PagedCache, span: Span):
        self._end = span.start + span.length
        self._page_I = torch.tensor(span.pages[: -(-self._end // cache.page_tokens)], device=cache.data.device)

    def attend(self, q_LNH: Tensor, k_LGH: Tensor, v_LGH: Tensor, kv: Tensor) -> Tensor:
        k_GSH, v_GSH = kv.index_select(1, self._page_I).flatten(1, 2)[:, : self._end].chunk(2)
        return attention_after(q_LNH, k_GSH, v_GSH)


# ------------------------------------------------------------------------------------------------------------- on a GPU


class _Flash:
    """All rows in one kernel, whatever their kind: queries end to end, keys by block table or gathered end to end."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]):
        size, device = cache.page_tokens, cache.data.device
        lengths, ends = [span.length for span in spans], [span.start + span.length for span in spans]
        self._longest = max(lengths), max(ends)
        self._query = _offsets(lengths, device)
        counts = [-(-end // size) for end in ends]
        if cache.block_tables:
            table = [[*span.pages[:n], *[0] * (max(counts) - n)] for span, n in zip(spans, counts, strict=True)]
            self._keys = None
            self._options = dict(
                seqused_k=torch.tensor(ends, dtype=torch.int32, device=device),
                block_table=torch.tensor(table, dtype=torch.int32, device=device),
            )
        else:
            slot_of = torch.cat([_slots(span.pages, end, size) for span, end in zip(spans, ends, strict=True)])
            self._slot, self._keys, self._options = slot_of.to(device), _offsets(ends, device), {}

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, kv: Tensor) -> Tensor:
        if self._keys is None:
            k, v = kv.permute(1, 2, 0, 3).chunk(2, dim=2)  # (P, C, G, H), views
        else:
            k, v = kv.flatten(1, 2).index_select(1, self._slot).transpose(0, 1).chunk(2, dim=1)
        return _varlen(q_TNH, k, v, self._query, self._keys, *self._longest, **self._options)


def _varlen(
    q_TNH: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    keys: Tensor | None,
    longest_q: int,
    longest_k: int,
    **options: Any,
) -> Tensor:
    """The last query of a row sees all of its keys."""
    from torch.nn.attention.varlen import varlen_attn  # here: it loads the compiler, 3 s that a CPU run can spare

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q_TNH.shape[1] != k.shape[-2]
    else:  # torch 2.11
        k, v = (x.repeat_interleave(q_TNH.shape[1] // x.shape[-2], dim=-2) for x in (k, v))
    window = (-1, 0)
    return varlen_attn(q_TNH, k, v, query, keys, longest_q, longest_k, window_size=window, **options)  # pyright: ignore


def _takes_block_tables(cache: PagedCache) -> bool:
    """Asked of the kernel itself: FlashAttention 2 wants pages of 256 tokens, 3 takes any, torch 2.11 knows neither."""
    cache.block_tables = True
    query = cache.data.new_zeros(1, cache.num_kv_heads, cache.data.shape[-1])
    try:
        _Flash(cache, [Span(0, 1, [0])]).attend(query, query, query, cache.data[0])
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _slots(pages: Sequence[int], end: int, size: int) -> Tensor:
    """Where the first `end` tokens of a request are."""
    return (torch.tensor(pages)[:, None] * size + torch.arange(size)).flatten()[:end]


# ------------------------------------------------------------------------------------------------- rows of one token


def _bundles(cache: PagedCache, spans: Sequence[Span], singles: Sequence[int]) -> list[tuple[list[int], int]]:
    """Which rows of one token attend together, and how many pages they share.

    Those that share their beginning do; of the others, as many of similar length as fit the processor's cache: what is
    gathered then is still there when it is multiplied.
    """
    size = cache.page_tokens
    page_bytes = 2 * cache.num_kv_heads * size * cache.data.shape[-1] * cache.data.element_size()
    full = {i: spans[i].start // size for i in singles}  # pages that the row does not write to
    together, alone = [], []
    for rows, shared in _sharing(spans, list(singles), full, 0):
        (together if shared else alone).append((rows, shared))
    rest = sorted((i for rows, _ in alone for i in rows), key=full.__getitem__, reverse=True)
    bundles = together
    while rest:
        count = max(1, GATHERED_BYTES // ((full[rest[0]] + 1) * page_bytes))
        bundles.append((rest[:count], 0))
        rest = rest[count:]
    return bundles


def _sharing(spans: Sequence[Span], rows: list[int], full: dict[int, int], shared: int) -> list[tuple[list[int], int]]:
    """Split rows that share their first `shared` pages so that the fewest pages are read."""
    if len(rows) < 2:
        return [(rows, 0)]
    first, depth = spans[rows[0]].pages, shared
    least = min(full[i] for i in rows)
    if shared:  # or else the rows are all rows, with nothing in common
        while depth < least and all(spans[i].pages[depth] == first[depth] for i in rows):
            depth += 1
    branches: dict[int, list[int]] = {}
    for i in rows:
        key = spans[i].pages[depth] if depth < full[i] else -1 - i
        branches.setdefault(key, []).append(i)
    if len(branches) == len(rows):
        return [(rows, depth)] if depth else [([i], 0) for i in rows]
    split = [part for branch in branches.values() for part in _sharing(spans, branch, full, depth + 1)]
    saved = sum((len(part) - 1) * pages for part, pages in split)
    return split if saved > (len(rows) - 1) * depth else [(rows, depth)]


class _Bundle:
    """Rows of one token: the pages that they share once, their own side by side, padded to the longest."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span], shared: int):
        size, device = cache.page_tokens, cache.data.device
        self._rows, self._groups = len(spans), cache.num_kv_heads
        head_X1 = (torch.arange(2 * self._groups, device=device) * cache.num_pages)[:, None]
        counts = [span.start // size + 1 - shared for span in spans]
        longest = max(counts)
        pages = []
        for span, count in zip(spans, counts, strict=True):
            pages += span.pages[shared : shared + count]
            # The row's own page stands in where others are longer: nothing of another request comes near its sums.
            pages += [span.pages[shared]] * (longest - count)
        self._own = (head_X1 + torch.tensor(pages, device=device)).flatten()
        self._shared = None
        if shared:
            self._shared = (head_X1 + torch.tensor(span.pages[:shared], device=device)).flatten()
        ends = [span.start + 1 - shared * size for span in spans]
        self._end, self._mask_Z1L = ends[0], None
        if len(spans) > 1:  # one row alone is cut at its end
            future_BL = torch.arange(longest * size, device=device) >= torch.tensor(ends, device=device)[:, None]
            mask = torch.zeros(future_BL.shape, dtype=wide(cache.data[:0]).dtype, device=device)
            self._mask_Z1L = mask.masked_fill_(future_BL, -math.inf).repeat(self._groups, 1)[:, None]

    def attend(self, q_BNH: Tensor, k_BGH: Tensor, v_BGH: Tensor, kv: Tensor) -> Tensor:
        rows, groups, width = self._rows, self._groups, kv.shape[3]
        pages = kv.flatten(0, 1)  # (2*G*P, C, H)
        k_ZLH, v_ZLH = pages.index_select(0, self._own).view(2, groups * rows, -1, width)
        q_GBMH = (wide(q_BNH) * width**-0.5).view(rows, groups, -1, width).transpose(0, 1)
        q_ZMH = q_GBMH.reshape(groups * rows, -1, width)
        if self._mask_Z1L is None:
            k_ZLH, v_ZLH = k_ZLH[:, : self._end], v_ZLH[:, : self._end]
            score_ZML = torch.bmm(q_ZMH, wide(k_ZLH).transpose(1, 2))
        else:
            score_ZML = torch.baddbmm(self._mask_Z1L, q_ZMH, wide(k_ZLH).transpose(1, 2))
        if self._shared is None:
            y_ZMH = torch.bmm(score_ZML.softmax(-1).to(v_ZLH.dtype), v_ZLH)
        else:
            k_GSH, v_GSH = pages.index_select(0, self._shared).view(2, groups, -1, width)
            score_GXS = torch.bmm(q_ZMH.view(groups, -1, width), wide(k_GSH).transpose(1, 2))
            score = torch.cat((score_GXS.view(*score_ZML.shape[:2], -1), score_ZML), dim=-1)
            prob = score.softmax(-1).to(v_ZLH.dtype)
            prob_S, prob_L = prob.split([v_GSH.shape[1], v_ZLH.shape[1]], dim=-1)
            y_ZMH = torch.bmm(prob_S.reshape(groups, -1, v_GSH.shape[1]), v_GSH).view(q_ZMH.shape)
            y_ZMH = y_ZMH + torch.bmm(prob_L, v_ZLH)
        return y_ZMH.view(groups, rows, -1, width).transpose(0, 1).reshape(rows, -1, width)
