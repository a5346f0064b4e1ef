"""Reinforcement learning: GSPO, GRPO and their relatives on packed rows, with a correction for the engine that sampled.

    attempt      what the policy wrote after a prompt (`Role.ATTEMPT`); its tokens t are those that it sampled
    log r_t      log p - log p_old; for ratio=sequence its mean over the attempt, at every token
    M_t          weight by k = p_old / p_engine, a constant (train/objectives/correction.py)
    J_t          objective by r_t and the advantage A_t (train/objectives/surrogate.py)

    loss  =  - sum of  share_t * (M_t J_t - kl * estimate of the divergence from the reference)  /  divisor

    aggregate       share_t              divisor
    sequence        1 / |attempt|        attempts of an update
    token           1                    sampled tokens of the update, all ranks
    length          1 / max_length       attempts of an update
    sequence_sum    1                    attempts of an update

The attempts of an update are the nominal number: those that were filtered or are masked count too, so that a thin
update takes a smaller step and not a noisier one. |attempt| counts sampled tokens, also those that M_t leaves out. M_t
weighs the policy's term alone: the divergence is over all sampled tokens.

A row without `old_logprob_T` is learned from by the very policy that wrote it: p_old is p, without gradient, and r is
1 to the last bit. Sums over an attempt are taken without gradient, in float64. Tokens to which the trainer itself gives
probability 0 teach nothing; those that top_p or top_k would cut off are not among them (train/logprobs.py).

Reference 1, 2.5.

Shape letters:  T tokens   S segments
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from train.objectives import LossSum, Objective
from train.objectives.correction import LIMIT, Weights, correction_weights
from train.objectives.pairs import segment_sums
from train.objectives.surrogate import Pull, clipped_log_ratio, pull
from train.rl_config import Aggregate, KLEstimator, PolicyLoss, RLObjectiveConfig


class Attempts(NamedTuple):
    """A row, as the loss sees it. Streams are float64, without gradient, and 0 where nothing was sampled."""

    segment_T: Tensor
    sampled_T: Tensor
    """bool: the target was sampled by the policy, and is learned from."""
    attempt_S: Tensor
    """bool: the segment is an attempt."""
    length_S: Tensor
    """Sampled tokens."""
    advantage_T: Tensor
    logprob_T: Tensor
    log_ratio_T: Tensor
    """log p - log p_old of each token."""
    log_k_T: Tensor
    """log p_old - log p_engine; 0 where it is unknown."""
    unknown_T: Tensor
    """bool: the engine's log-probability is nan."""
    impossible_T: Tensor
    """bool: the trainer gives the token probability 0, now or at the time of the rollout."""

    def means(self, value_T: Tensor) -> Tensor:
        """(T,) -> (S,): over the sampled tokens of each segment."""
        zeros_S = torch.zeros_like(self.length_S)
        return zeros_S.index_add(0, self.segment_T, value_T) / self.length_S.clamp(min=1)


class Terms(NamedTuple):
    """What each sampled token adds to the loss, without gradient."""

    value_T: Tensor
    slope_T: Tensor
    """d loss / d log p."""
    policy_T: Tensor
    """Of the value, the policy's part,"""
    kl_T: Tensor
    """and the divergence from the reference, without its weight."""
    pull: Pull
    weights: Weights
    dropped_T: Tensor
    """bool: its attempt is left out by objective.opsm_delta."""
    ratio_T: Tensor
    """log r of the loss."""


def needs_reference(config: RLObjectiveConfig) -> bool:
    return config.kl > 0


def build(config: RLObjectiveConfig, *, attempts_per_update: int) -> Objective:
    """
    Args:
        attempts_per_update: nominal number, over all ranks: groups of an update times attempts of a group.
    """

    def loss(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
        attempts = gather_attempts(logprob_T, batch)
        terms = loss_terms(attempts, batch, config)
        share_T = shares(attempts, config)
        # Only where something was sampled: elsewhere anything may stand.
        free_T = torch.where(attempts.sampled_T & ~attempts.impossible_T, logprob_T, 0.0)
        total = (share_T * (terms.value_T + terms.slope_T * (free_T - free_T.detach()))).sum()
        metrics = {"loss": (share_T * terms.value_T).sum()}
        if config.kl:
            metrics |= {"loss_policy": (share_T * terms.policy_T).sum(), "kl": (share_T * terms.kl_T).sum()}
        return LossSum(total.to(logprob_T.dtype), metrics)

    if config.aggregate is Aggregate.token:
        return Objective("sampled token", count_tokens, loss)
    return Objective("attempt", count_attempts, loss, divisor=float(attempts_per_update))


def count_attempts(batch: PackedBatch) -> Tensor:
    return torch.tensor(float(batch.roles.count(Role.ATTEMPT)))


def count_tokens(batch: PackedBatch) -> Tensor:
    parts = batch.weight_T.split(batch.lengths)
    counted = (part for part, role in zip(parts, batch.roles, strict=False) if role is Role.ATTEMPT)
    return torch.tensor(float(sum(int(part.count_nonzero()) for part in counted)))


def gather_attempts(logprob_T: Tensor, batch: PackedBatch) -> Attempts:
    """
    Args:
        logprob_T: log p(target_T[t]) of the policy.
        batch: on the same device.
    """
    device = logprob_T.device
    roles = batch.roles or (Role.WHOLE,) * batch.num_segments
    attempt_S = torch.tensor([role is Role.ATTEMPT for role in roles], device=device)
    segment_T = batch.segment_T
    sampled_T = (batch.weight_T != 0) & attempt_S[segment_T]
    streams = (batch.advantage_T, batch.engine_logprob_T)
    assert None not in streams or Role.ATTEMPT not in roles, "an attempt without advantage_T or engine_logprob_T"

    def sampled(value_T: Tensor | None) -> Tensor:
        if value_T is None:
            return torch.zeros(batch.num_tokens, dtype=torch.float64, device=device)
        return torch.where(sampled_T, value_T.detach().double(), 0.0)

    now_T, engine_T = sampled(logprob_T), sampled(batch.engine_logprob_T)
    old_T = now_T if batch.old_logprob_T is None else sampled(batch.old_logprob_T)
    unknown_T = engine_T.isnan()
    impossible_T = (now_T == -torch.inf) | (old_T == -torch.inf)
    log_ratio_T = torch.where(impossible_T, 0.0, now_T - old_T)
    # A token that old weights give probability 0 has k = 0, whatever the engine says.
    log_k_T = torch.where(unknown_T, 0.0, old_T - engine_T).masked_fill(old_T == -torch.inf, -torch.inf)
    return Attempts(
        segment_T=segment_T,
        sampled_T=sampled_T,
        attempt_S=attempt_S,
        length_S=segment_sums(sampled_T, batch),
        advantage_T=sampled(batch.advantage_T),
        logprob_T=now_T.masked_fill(impossible_T, 0.0),
        log_ratio_T=log_ratio_T,
        log_k_T=log_k_T,
        unknown_T=unknown_T,
        impossible_T=impossible_T,
    )


def shares(attempts: Attempts, config: RLObjectiveConfig) -> Tensor:
    """(T,): how much each token counts, before the divisor."""
    sampled_T = attempts.sampled_T.double()
    match config.aggregate:
        case Aggregate.sequence:
            return sampled_T / attempts.length_S.clamp(min=1)[attempts.segment_T]
        case Aggregate.length:
            assert config.max_length is not None
            return sampled_T / config.max_length
        case Aggregate.token | Aggregate.sequence_sum:
            return sampled_T


def loss_terms(attempts: Attempts, batch: PackedBatch, config: RLObjectiveConfig) -> Terms:
    advantage_T, log_ratio_T, segment_T = attempts.advantage_T, attempts.log_ratio_T, attempts.segment_T
    ratio_T = log_ratio_T
    if config.loss is PolicyLoss.gmpo:
        ratio_T = attempts.means(clipped_log_ratio(log_ratio_T, advantage_T, config.gmpo_clip))[segment_T]
    elif config.has_sequence_ratio:
        ratio_T = attempts.means(log_ratio_T)[segment_T]
    pulled = pull(ratio_T, log_ratio_T, attempts.logprob_T, advantage_T, config)
    log_k_S = attempts.means(attempts.log_k_T)
    weights = correction_weights(
        attempts.log_k_T, log_k_S, log_k_S * attempts.length_S, segment_T, config.correction, *config.bounds
    )
    dropped_T = torch.zeros_like(attempts.sampled_T)
    if config.opsm_delta is not None:
        # log p_engine - log p; where the engine's is unknown, p_old stands for it
        lost_S = -attempts.means(log_ratio_T + attempts.log_k_T)
        dropped_T = (advantage_T < 0) & (lost_S > config.opsm_delta)[segment_T]
    out_T = dropped_T | attempts.impossible_T | ~attempts.sampled_T
    policy_T, slope_T = (
        (-weights.weight_T * value_T).masked_fill(out_T, 0.0) for value_T in (pulled.value_T, pulled.slope_T)
    )
    value_T, kl_T = policy_T, torch.zeros_like(policy_T)
    if config.kl:
        kl_T, kl_slope_T = divergence(attempts, batch, config)
        value_T, slope_T = policy_T + config.kl * kl_T, slope_T + config.kl * kl_slope_T
    return Terms(value_T, slope_T, policy_T, kl_T, pulled, weights, dropped_T, ratio_T)


def divergence(attempts: Attempts, batch: PackedBatch, config: RLObjectiveConfig) -> tuple[Tensor, Tensor]:
    """An estimate of KL(policy || reference) at each sampled token, and its slope with respect to log p.

    With `kl_unbiased` both are those of r * estimate. Log-ratios beyond +-20 count as 20. Source: J. Schulman,
    "Approximating KL divergence", 2020; DeepSeek-V3.2, 2512.02556. Reference 9.
    """
    ref_T = batch.ref_logprob_T
    if ref_T is None:
        assert Role.ATTEMPT not in batch.roles, "the row has no ref_logprob_T"
        ref_T = torch.zeros_like(attempts.logprob_T)
    count_T = attempts.sampled_T & ~attempts.impossible_T
    log_T = (attempts.logprob_T - torch.where(count_T, ref_T.double(), 0.0)).clamp(-LIMIT, LIMIT)
    match config.kl_estimator:
        case KLEstimator.k1:
            value_T, slope_T = log_T, torch.ones_like(log_T)
        case KLEstimator.k2:
            value_T, slope_T = log_T.square() / 2, log_T
        case KLEstimator.k3:
            value_T, slope_T = torch.expm1(-log_T) + log_T, -torch.expm1(-log_T)
    if config.kl_unbiased:
        ratio_T = attempts.log_ratio_T.clamp(max=LIMIT).exp()
        value_T, slope_T = ratio_T * value_T, ratio_T * (value_T + slope_T)
    return value_T * count_T, slope_T * count_T
