"""From logits to the distribution that tokens are drawn from.

There is one way, for whoever draws (inference/sampling.py) and for whoever learns from what was drawn
(train/logprobs.py):

    logits ─► bans ─► less the largest ─► / temperature = x ─► top-k ─► top-p ─► min-p ─► log p = x - log(sum of exp x)

What is kept by truncation, with ties kept together, so that the order of equal logits never matters:

    top-k   tokens at least as likely as the k-th likeliest
    top-p   tokens such that those strictly more likely have less than p of the mass (of what top-k kept)
    min-p   tokens at least min_p times as likely as the likeliest

The order of these operations, and the dtype of each, is part of what is promised: from the same logits both sides get
the same log-probability to the last bit.

Shape letters:  S rows   N some of them   V vocabulary   K candidates   C chunks of the vocabulary   W logits in a chunk
                B bins   I logits in one
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLDEST = 1e-30
"""Temperatures below it are as good as it, and float32 would take them for 0."""
_CANDIDATES = 256
"""Of so many tokens the nucleus is looked for first, on the CPU, where sorting a vocabulary takes 30 times as long."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What a model's logits are made into before a token is drawn. The default takes them as they are."""

    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    banned_ids: tuple[int, ...] = ()
    """Never drawn; probabilities of the others add up to 1 without them."""

    def __post_init__(self):
        """Raises ValueError: a value outside its range."""
        _rule(0 < self.temperature < math.inf, "temperature", self.temperature, "positive and finite")
        _rule(self.top_k >= 0, "top_k", self.top_k, "at least 0; 0 keeps all tokens")
        _rule(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1; 1 keeps all tokens")
        _rule(0 <= self.min_p <= 1, "min_p", self.min_p, "at least 0 and at most 1; 0 keeps all tokens")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _rule(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {rule}.")


def temper_(x_SV: Tensor, highest_S1: Tensor, rows: Sequence[Distribution]) -> Tensor:
    """Logits, bans already at -inf, divided by the temperature, in place.

    The largest of a row becomes 0 first: no temperature, however low, makes infinities of it.
    """
    x_SV -= highest_S1
    if any(row.temperature != 1 for row in rows):
        x_SV /= column([max(row.temperature, _COLDEST) for row in rows], x_SV)
    return x_SV


def masses(e_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(S, C, W) view of `e_SV`, and (S, C) float64 sums of all chunks up to and including each.

    Sums and searches go by chunks: many times as fast as over whole rows, and a cumulative sum in float64 is short.
    """
    e_SCW = e_SV.unflatten(1, (-1, math.gcd(e_SV.shape[1], 1024)))
    return e_SCW, e_SCW.sum(2).double().cumsum(1)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """(S, 1) in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------- truncation


def thresholds(x_SV: Tensor, e_SV: Tensor, rows: Sequence[Distribution]) -> Tensor | None:
    """(S, 1): the smallest x that is kept; None where all rows keep everything.

    Args:
        x_SV: from `temper_`.
        e_SV: exp of it.
    """
    if not any(row.truncates for row in rows):
        return None
    least_S1 = column([math.log(row.min_p) if row.min_p > 0 else -math.inf for row in rows], x_SV)
    places = [place for place, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1]
    if places:
        V = x_SV.shape[1]
        chosen = [rows[place] for place in places]
        k = max(row.top_k for row in chosen)
        if any(row.top_p < 1 for row in chosen):
            k = max(k, V if x_SV.is_cuda else _CANDIDATES)
        place_N = torch.tensor(places, device=x_SV.device)
        own = len(places) == len(rows)
        x_NV, e_NV = (x_SV, e_SV) if own else (x_SV[place_N], e_SV[place_N])
        least_N1, found_N = _top_k_top_p(x_NV, e_NV, chosen, min(k, V))
        if k < V:
            for place in (~found_N).nonzero().squeeze(1).tolist():
                least_N1[place] = _top_p_by_bins(x_NV[place], e_NV[place], chosen[place].top_p)
        least_S1[place_N] = torch.maximum(least_S1[place_N], least_N1)
    return least_S1


def _top_k_top_p(
    x_NV: Tensor, e_NV: Tensor, rows: Sequence[Distribution], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """(N, 1) smallest logits kept, and (N,) whether the candidates were enough to find them."""
    V = x_NV.shape[1]
    x_NK = x_NV.topk(num_candidates, 1).values
    kth_N1 = torch.tensor([[min(row.top_k or V, num_candidates) - 1] for row in rows], device=x_NV.device)
    limited_N1 = torch.tensor([[row.top_k > 0] for row in rows], device=x_NV.device)
    least_k_N1 = x_NK.gather(1, kth_N1).masked_fill(~limited_N1, -math.inf)
    if all(row.top_p == 1 for row in rows):
        return least_k_N1, torch.ones(len(rows), dtype=torch.bool, device=x_NV.device)
    total_N1 = e_NV.masked_fill(x_NV < least_k_N1, 0).sum(1, keepdim=True).double()
    top_p_N1 = torch.tensor([[row.top_p] for row in rows], dtype=torch.float64, device=x_NV.device)
    mass_NK = x_NK.exp().double().cumsum(1)
    # what is strictly more likely has less than p of the mass: true of the first, then false for good
    inside_NK = torch.cat([torch.zeros_like(mass_NK[:, :1]), mass_NK[:, :-1]], 1) < top_p_N1 * total_N1
    last_N1 = inside_NK.sum(1, keepdim=True) - 1
    least_p_N1 = x_NK.gather(1, last_N1.clamp(min=0)).masked_fill(top_p_N1 == 1, -math.inf)
    found_N = ((mass_NK[:, -1:] >= top_p_N1 * total_N1) | limited_N1 | (top_p_N1 == 1)).squeeze(1)
    return torch.maximum(least_k_N1, least_p_N1), found_N


def _top_p_by_bins(x_V: Tensor, e_V: Tensor, top_p: float) -> Tensor:
    """The smallest logit kept, without a sort of all: only the bin in which the mass gets to p is sorted."""
    num_bins = 4096
    bin_V = (x_V * -128).nan_to_num(nan=0.0).clamp(max=num_bins - 1).long()
    mass_B = torch.bincount(bin_V, e_V.double(), minlength=num_bins).cumsum(0)
    wanted = top_p * mass_B[-1]
    which = int((mass_B < wanted).sum().clamp(max=num_bins - 1))
    inside = bin_V == which
    x_I, order_I = x_V[inside].sort(descending=True)
    mass_I = e_V[inside][order_I].double().cumsum(0) + (mass_B[which - 1] if which else 0)
    return x_I[(mass_I < wanted).sum().clamp(max=len(x_I) - 1)]
