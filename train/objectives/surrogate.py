"""Policy-gradient losses of one token: what it is worth, and which way it pulls.

    clip     min(r A, clamp(r, 1 - low, 1 + high) A)      PPO, 1707.06347; with one ratio per attempt GSPO, 2507.18071
             ... and at least c A where A < 0             dual clip, 1912.09729; TRL's delta
    cispo    sg[min(r, cap)] A log p                      2506.13585
    sapo     4 / tau sigmoid(tau (r - 1)) A               2511.20347; tau by the sign of A
    gmpo     exp(mean of clipped log r) A                 2507.20673

Each is a `Pull`: the value of the objective, and its slope with respect to this token's log p, both without gradient.
The loss is then value + slope * (log p - sg[log p]): value and gradient are those of the formula above, and a token
that teaches nothing has a gradient of exactly 0, whatever overflows elsewhere. For a ratio that is one for the whole
attempt this is the token form of GSPO (equations 13 to 17): the slope at a token is that of sg[s] p / sg[p].

Objectives are maximised. Reference 1.2, 9.

Shape letters:  T tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.objectives.correction import LIMIT
from train.rl_config import PolicyLoss, RLObjectiveConfig


class Pull(NamedTuple):
    value_T: Tensor
    slope_T: Tensor
    """d value / d log p of this token."""
    low_T: Tensor
    """bool: it is clipped from below (the advantage is negative, and the ratio small already),"""
    high_T: Tensor
    """from above,"""
    dual_T: Tensor
    """or by objective.dual_clip."""


def pull(
    log_ratio_T: Tensor, token_log_ratio_T: Tensor, logprob_T: Tensor, advantage_T: Tensor, config: RLObjectiveConfig
) -> Pull:
    """
    Args:
        log_ratio_T: log r, for ratio=sequence the mean over the attempt, at each of its tokens. For gmpo the mean of
            `clipped_log_ratio`.
        token_log_ratio_T: log p - log p_old of the token itself.
    """
    none_T = torch.zeros_like(advantage_T, dtype=torch.bool)
    ratio_T = log_ratio_T.clamp(max=LIMIT).exp()
    match config.loss:
        case PolicyLoss.clip:
            low, high = config.clip
            low_T = (advantage_T < 0) & (ratio_T < 1 - low)
            high_T = (advantage_T > 0) & (ratio_T > 1 + high)
            dual_T = none_T if config.dual_clip is None else (advantage_T < 0) & (ratio_T > config.dual_clip)
            value_T = ratio_T.masked_fill(low_T, 1 - low).masked_fill(high_T, 1 + high)
            if config.dual_clip is not None:
                value_T = value_T.masked_fill(dual_T, config.dual_clip)
            value_T = value_T * advantage_T
            return Pull(value_T, value_T * ~(low_T | high_T | dual_T), low_T, high_T, dual_T)
        case PolicyLoss.cispo:
            slope_T = ratio_T.clamp(max=config.cispo_cap) * advantage_T
            high_T = ratio_T > config.cispo_cap
            return Pull(slope_T * logprob_T, slope_T, none_T, high_T, none_T)
        case PolicyLoss.sapo:
            tau_T = torch.full_like(ratio_T, config.sapo_negative).masked_fill(advantage_T > 0, config.sapo_positive)
            gate_T = torch.sigmoid(tau_T * (ratio_T - 1))
            slope_T = 4 * gate_T * (1 - gate_T) * ratio_T * advantage_T
            return Pull(4 / tau_T * gate_T * advantage_T, slope_T, none_T, none_T, none_T)
        case PolicyLoss.gmpo:
            low_T = (advantage_T < 0) & (token_log_ratio_T < -config.gmpo_clip)
            high_T = (advantage_T > 0) & (token_log_ratio_T > config.gmpo_clip)
            value_T = ratio_T * advantage_T
            return Pull(value_T, value_T * ~(low_T | high_T), low_T, high_T, none_T)


def clipped_log_ratio(token_log_ratio_T: Tensor, advantage_T: Tensor, bound: float) -> Tensor:
    """gmpo's: from above where the advantage is positive, and otherwise from below."""
    return torch.where(advantage_T > 0, token_log_ratio_T.clamp(max=bound), token_log_ratio_T.clamp(min=-bound))
