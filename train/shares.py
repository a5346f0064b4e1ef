"""What one rank holds of the weights, their gradients and AdamW's state, under `parallel.*`. Arithmetic, no tensors.

    n weights, r ranks hold the same ones           trained, held in float32 (4 bytes)
                                                    weights    gradients       AdamW           on r ranks
    zero=0   every rank holds everything            4 n        4 n  (+ 4 n)    8 n             DDP's buckets are a copy
    zero=1   its share of the state                 4 n        4 n  + 4 n/r    12 n/r          with a float32 copy
    zero=2   and of the gradients                   4 n        4 n/r           12 n/r
    zero=3   and of the weights                     4 n/r      4 n/r           8 n/r           the weights are the copy

Experts are cut by `parallel.expert` first: a rank computes with 1/expert of them, and r is the number of ranks that
hold the same experts. Everything else is shared by all ranks.
Source: DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py); tests/bench/plan.py compares with measurements.
"""

from typing import NamedTuple

from torch import nn

from ernie_model.layers import Linear
from ernie_model.moe import Experts
from ernie_model.parts import Part, part_of
from train.config import ParallelConfig
from train.parallel.partition import shape_of
from train.trained import MOMENT_BYTES

MASTER_BYTES = 4
"""Of the float32 copy that ZeRO updates."""
MAX_LIVE_BYTES = 4_000_000_000
"""Gathered weights that ZeRO-3 leaves in place for when they come by again: 10^9 of them, in float32."""
EXPERTS = (Part.TEXT_EXPERTS, Part.VISION_EXPERTS)


class Weights(NamedTuple):
    """Weights of one module that are alike in all that matters here."""

    count: int
    """In the whole model."""
    size: int
    """Bytes of one."""
    trained: bool
    expert: bool
    product: bool
    """Part of a matrix product, which rounds wider weights to the dtype of the activations."""
    largest: int
    """Of one parameter."""


def weights_of(module: nn.Module, prefix: str) -> tuple[Weights, ...]:
    """All of a module, by kind. `prefix`: the module's name in the model."""
    counts: dict[tuple[int, bool, bool, bool], list[int]] = {}
    for name, part in module.named_modules(prefix=prefix):
        product = isinstance(part, Linear | Experts)
        for key, p in part.named_parameters(prefix=name, recurse=False):
            kind = (p.element_size(), p.requires_grad, part_of(key) in EXPERTS, product)
            shard = getattr(p, "shard", None)  # a model that is cut already has its own share alone
            counts.setdefault(kind, []).append(shape_of(p).numel() * (shard.of if shard is not None else 1))
    return tuple(Weights(sum(some), *kind, largest=max(some)) for kind, some in counts.items())


class Shares(NamedTuple):
    """Bytes on one rank. Partitions are rounded up; DeepSpeed's padding of a few bytes is left out."""

    parallel: ParallelConfig
    ranks: int

    def holders(self, w: Weights) -> int:
        """Ranks that would hold the same weights without ZeRO."""
        return self.ranks // self.parallel.expert if w.expert else self.ranks

    def local(self, w: Weights) -> int:
        """Weights that this rank computes with."""
        return w.count // self.parallel.expert if w.expert else w.count

    def part(self, w: Weights) -> int:
        """Those of them that this rank updates under ZeRO."""
        return -(-self.local(w) // self.holders(w))

    def weights(self, w: Weights) -> int:
        return w.size * (self.part(w) if self.parallel.zero == 3 else self.local(w))

    def gradients(self, w: Weights) -> int:
        """Once a backward pass is over."""
        return w.trained * w.size * (self.part(w) if self.parallel.zero >= 2 else self.local(w))

    def exchanged(self, w: Weights) -> int:
        """A copy of gradients beside them: the share that ZeRO-1 updates, or DDP's buckets."""
        if self.parallel.zero == 1:
            return w.trained * w.size * self.part(w)
        own = w.expert and self.parallel.expert > 1  # expert shards are left out of DDP
        ddp = self.parallel.zero == 0 and self.ranks > 1 and not own
        return w.trained * w.size * self.local(w) if ddp else 0

    def optimizer(self, w: Weights) -> int:
        if not w.trained:
            return 0
        if self.parallel.zero == 0:
            return MOMENT_BYTES * self.local(w)
        own_copy = self.parallel.zero < 3 or self.parallel.offload_optimizer
        return (MOMENT_BYTES + MASTER_BYTES * own_copy) * self.part(w)

    def gathered(self, w: Weights) -> int:
        """Of a module that is being computed under zero=3."""
        return w.size * self.local(w) if self.parallel.zero == 3 and self.holders(w) > 1 else 0
