"""Supervised fine-tuning: the mean negative log-likelihood of what the assistant wrote.

    loss  =  - sum_t weight[t] * log p(target[t])  /  sum_t weight[t]        both sums over the whole global batch

The mean is over target tokens, not over conversations: a long answer counts more than a short one.

Token-balanced (reference 3.5), the same value is reported and the gradient is that of

    - sum_t weight[t] * log p(target[t])  /  S        S = every position the update has room for, a constant

so a target token weighs the same in every update, whether few or many positions beside it are images and prompts. With
a sum of 9 over 6 targets and 10 other positions: reported 9 / 6 = 1.5, gradient of 9 / 16, 0.375 times the plain one.
"""

from torch import Tensor

from data.batch import PackedBatch
from train.config import ObjectiveConfig
from train.objectives import LossSum, Objective


def count_targets(batch: PackedBatch) -> Tensor:
    return batch.weight_T.sum()


def sft_loss(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
    total = -(logprob_T * batch.weight_T).sum()
    return LossSum(total, {"loss": total.detach()})


SFT = Objective("target token", count_targets, sft_loss, linear=True)


def build(config: ObjectiveConfig, *, positions: int) -> Objective:
    """
    Args:
        positions: tokens that one update has room for: data.max_tokens x micro-batches of all ranks. A token-balanced
            gradient does not depend on how an update is cut into rows as long as this number stays.
    """
    return SFT._replace(divisor=float(positions)) if config.token_balanced else SFT
