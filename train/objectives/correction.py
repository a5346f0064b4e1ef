"""Weights for tokens that were sampled with another probability than the trainer gives them.

    k = p_old / p_engine        the same weights, once in the trainer and once in the engine that sampled

    icepop         k inside [low, high], 0 outside      Ring-1T, 2510.18855, equations 2, 3
    icepop_mask    1 inside, 0 outside
    tis            min(k, high)                         truncated importance sampling
    mis            k up to high, 0 above                masked importance sampling
    ..._sequence   of the geometric mean of k over the attempt's tokens (ERNIE 5.0, 2602.04705, equation 2)
    ..._product    of the product

Everything is decided in log space, before any exponential: exp(800) * 0 is nan. Weights have no gradient. Where the
engine's log-probability is not known (nan), k is 1. Reference 2.2 to 2.5.

Shape letters:  T tokens   S segments
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from train.rl_config import Correction

LIMIT = 20.0
"""Largest log-ratio that is exponentiated; exp(20) is 5e8."""


class Weights(NamedTuple):
    weight_T: Tensor
    """0 or more, finite."""
    low_T: Tensor
    """bool: k is below the smallest that counts: the engine was the more certain one."""
    high_T: Tensor
    """bool: k is above the largest; tis keeps it, and counts it for less."""


def correction_weights(
    log_k_T: Tensor,
    log_k_S: Tensor,
    log_product_S: Tensor,
    segment_T: Tensor,
    kind: Correction,
    low: float,
    high: float,
) -> Weights:
    """
    Args:
        log_k_T: log p_old - log p_engine, 0 where it is unknown; may be infinite.
        log_k_S: its mean over an attempt's tokens.
        log_product_S: its sum.
        low, high: smallest and largest k; for tis and mis `low` is 0.
    """
    name = kind.value
    if name.endswith("_sequence"):
        log_k_T = log_k_S[segment_T]
    elif name.endswith("_product"):
        log_k_T = log_product_S[segment_T]
    low_T = log_k_T < (math.log(low) if low else -math.inf)
    high_T = ~(low_T | (log_k_T <= math.log(high)))  # nan too: the engine's numbers were infinite in both directions
    inside_T = ~(low_T | high_T)
    if kind is Correction.none:
        return Weights(torch.ones_like(log_k_T), torch.zeros_like(low_T), torch.zeros_like(high_T))
    if name.startswith("icepop_mask"):
        return Weights(inside_T.to(log_k_T.dtype), low_T, high_T)
    if name.startswith("tis"):
        cap = min(math.log(high), LIMIT)
        return Weights(torch.where(inside_T, log_k_T, cap).clamp(max=cap).exp(), low_T, high_T)
    # An infinite k is never inside, however wide the band: a weight must be finite.
    inside_T = inside_T & (log_k_T < math.inf)
    k_T = torch.where(inside_T, log_k_T, 0.0).clamp(max=LIMIT).exp()
    return Weights(k_T * inside_T, low_T, high_T)
