"""Supervised fine-tuning: the mean negative log-likelihood of what the assistant wrote.

    loss  =  - sum_t weight[t] * log p(target[t])  /  sum_t weight[t]        both sums over the whole global batch

The mean is over target tokens, not over conversations: a long answer counts more than a short one.
"""

from torch import Tensor

from data.batch import PackedBatch
from train.objectives import LossSum, Objective


def count_targets(batch: PackedBatch) -> Tensor:
    return batch.weight_T.sum()


def sft_loss(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
    total = -(logprob_T * batch.weight_T).sum()
    return LossSum(total, {"loss": total.detach()})


SFT = Objective("target token", count_targets, sft_loss, linear=True)
