"""What an algorithm adds to the loop: how log-probabilities become a loss.

Losses return *sums*. The loop counts `unit`s over all ranks and micro-batches before the first forward and divides
once, so that packing, accumulation and data parallelism do not change the gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from data.batch import PackedBatch


class LossSum(NamedTuple):
    total: Tensor
    """Scalar with gradient, summed over units."""
    metrics: dict[str, Tensor]
    """Detached sums over the same units; the loop reports them divided by the count."""


class Objective(NamedTuple):
    unit: str
    """What the loss is averaged over, for messages: "target token"."""
    count: Callable[[PackedBatch], Tensor]
    """Units in a batch, known before the forward pass."""
    loss: Callable[[Tensor, PackedBatch], LossSum]
    """(logprob_T, batch on the same device) → sums."""
    divisor: float | None = None
    """Divides the gradient in place of the count, which stays what reported means are divided by; None: the count."""
    linear: bool = False
    """The total is -sum(weight_T * logprob_T): its slope is known before the backward pass, which saves a product."""
