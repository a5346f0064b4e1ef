"""Preference alignment: losses of pairs, added up by weight, and what to report of each pair.

    loss  =  sum over pairs of  pref_loss_ratio * preference loss + added losses
                                + sft_loss_ratio * NLL per token of the chosen answer          RPO, 2404.19733
                                + mdpo_conditional * -log sigmoid(beta (w - w_corrupted))      mDPO, 2406.11839
                                + mdpo_anchor * -log sigmoid(beta w - delta)
             /  pairs of the whole global batch

The NLL is a mean over the tokens of each answer, and then over pairs: the same however pairs are put into rows. A pair
without corrupted pictures has no conditional loss, and counts as a pair all the same. Reference 7.1, 7.4.

Shape letters:  T tokens   N pairs
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import PackedBatch
from train.dpo_config import DPOObjectiveConfig, PreferenceLoss, needs_reference
from train.objectives import LossSum, Objective
from train.objectives.kto import Divergence, build_labelled
from train.objectives.pairs import PairSums, count_pairs, gather_pairs
from train.objectives.preference import log_ratio, preference_loss, views


def needs_corrupted(config: DPOObjectiveConfig) -> bool:
    """Do pairs with pictures need a segment `Role.CORRUPTED`?"""
    return config.mdpo_conditional > 0


def is_unpaired(config: DPOObjectiveConfig) -> bool:
    """Does it learn from answers that are labelled good or bad, and not from pairs?"""
    return any(loss.unpaired for loss in config.losses())


def needs_mismatched(config: DPOObjectiveConfig) -> bool:
    """Do labelled answers need a segment `Role.MISMATCHED`?"""
    return PreferenceLoss.kto in config.losses()


def build(config: DPOObjectiveConfig, divergence: Divergence | None = None) -> Objective:
    """
    Args:
        divergence: what kto, kto_pair and bco_pair measure answers against; it must be beside the objective then.
            None: nothing.
    """
    divergence = divergence or Divergence(config)
    if is_unpaired(config):
        return build_labelled(config, divergence)

    def loss(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
        pairs = gather_pairs(logprob_T, batch)
        total_N = torch.stack(list(loss_parts(pairs, config, *divergence.of_pairs).values())).sum(0)
        metrics_N = pair_metrics(pairs, config, *divergence.of_pairs)
        divergence.tell_pairs(metrics_N)
        return LossSum(total_N.sum().to(logprob_T.dtype), {name: value_N.sum() for name, value_N in metrics_N.items()})

    return Objective("pair", count_pairs, loss)


def loss_parts(
    pairs: PairSums,
    config: DPOObjectiveConfig,
    kl_w: Tensor | float = 0.0,
    kl_l: Tensor | float = 0.0,
    shift: float = 0.0,
) -> dict[str, Tensor]:
    """Everything that is added up, float64 (N,) each, with gradient, times its weight.

    Args:
        kl_w, kl_l, shift: `Divergence.of_pairs`.
    """
    assert pairs.chosen.ref_logprob_N is not None or not needs_reference(config), "the row has no ref_logprob_T"
    seen = views(pairs, config)._replace(kl_w=kl_w, kl_l=kl_l, shift=shift)
    parts = {loss.value: weight * preference_loss(loss, seen, config) for loss, weight in config.losses().items()}
    if config.sft_loss_ratio:
        parts["sft"] = -config.sft_loss_ratio * seen.cw_mean_N
    if config.mdpo_conditional:
        corrupted_N = seen.w_N if pairs.corrupted is None else log_ratio(pairs.corrupted, pairs.rejected, config)
        conditional_N = -F.logsigmoid(config.beta * (seen.w_N - corrupted_N))
        parts["conditional"] = config.mdpo_conditional * pairs.corrupted_N * conditional_N
    if config.mdpo_anchor:
        parts["anchor"] = -config.mdpo_anchor * F.logsigmoid(config.beta * seen.w_N - config.mdpo_delta)
    return parts


def pair_metrics(
    pairs: PairSums,
    config: DPOObjectiveConfig,
    kl_w: Tensor | float = 0.0,
    kl_l: Tensor | float = 0.0,
    shift: float = 0.0,
) -> dict[str, Tensor]:
    """What is reported of every pair, float64 (N,) each, detached.

    loss                  and loss_NAME of each part, where there are several
    reward_*              beta log p / p_ref; beta log p where there is no reference (simpo, or, orpo: per token)
    reward_accuracy       1 where the chosen answer has the higher reward
    logprob_*, tokens_*   of whole answers: log p, and learned tokens
    nll_chosen            per token
    kl_chosen             log p / p_ref of the chosen answer: an estimate of the KL divergence, where it is a sample
    kl_chosen_k3          another one, never negative (`Answers.kl_N`)
    corrupted             1 where the pair has pictures, for mDPO's loss
    tokens_gap            tokens of the chosen answer - tokens of the rejected one
    """
    parts = loss_parts(pairs, config, kl_w, kl_l, shift)
    chosen, rejected = pairs.chosen, pairs.rejected
    metrics = {"loss": torch.stack(list(parts.values())).sum(0)}
    if len(parts) > 1:
        metrics |= {f"loss_{name}": part_N for name, part_N in parts.items()}
    rewards = []
    for answers in (chosen, rejected):
        if needs_reference(config):
            assert answers.ref_logprob_N is not None
            rewards.append(config.beta * (answers.logprob_N - answers.ref_logprob_N))
        elif any(loss.has_reference for loss in config.losses()):
            rewards.append(config.beta * answers.logprob_N)
        else:
            rewards.append(config.beta * answers.logprob_N / answers.length_N.clamp(min=1))
    metrics |= {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "reward_margin": rewards[0] - rewards[1],
        "reward_accuracy": (rewards[0] > rewards[1]).double(),
        "logprob_chosen": chosen.logprob_N,
        "logprob_rejected": rejected.logprob_N,
        "tokens_chosen": chosen.length_N,
        "tokens_rejected": rejected.length_N,
        "tokens_gap": chosen.length_N - rejected.length_N,
        "nll_chosen": -chosen.logprob_N / chosen.length_N.clamp(min=1),
    }
    if needs_corrupted(config):
        metrics["corrupted"] = pairs.corrupted_N
    if needs_reference(config) and chosen.ref_logprob_N is not None and chosen.kl_N is not None:
        metrics |= {"kl_chosen": chosen.logprob_N - chosen.ref_logprob_N, "kl_chosen_k3": chosen.kl_N}
    return {name: value_N.detach() for name, value_N in metrics.items()}
