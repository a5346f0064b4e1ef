"""Experts of a layer shared out among ranks.

    E = 8 experts of a pool, 4 ranks        rank    0     1     2     3
                                            holds  0 1   2 3   4 5   6 7

Consecutive experts, the same of both pools, so every expert tensor of a rank is one contiguous part of the tensor that
a single process holds. `Shard` says which part; a parameter that is one carries it as its `shard`.

Shape letters:  E experts of a pool
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ernie_model.moe import Experts


@dataclass(frozen=True)
class Shard:
    """The part `index` of `of` equal parts along dimension 0."""

    index: int
    of: int

    def __post_init__(self):
        if not 0 <= self.index < self.of:
            raise ValueError(f"there is no part {self.index} of {self.of}.")

    def part_of(self, count: int) -> slice:
        """Which of `count` entries it is.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if count % self.of:
            raise ValueError(f"{count} experts cannot be shared out evenly among {self.of} ranks.")
        each = count // self.of
        return slice(self.index * each, (self.index + 1) * each)


WHOLE = Shard(0, 1)


def shard_of(tensor: Tensor) -> Shard:
    """Which part of the whole tensor this is; `WHOLE` for most."""
    return getattr(tensor, "shard", WHOLE)


def shard_experts(model: nn.Module, shard: Shard) -> None:
    """Cut the experts of both pools of every layer, in memory or on the meta device, to a rank's share, and mark them.

    Raises:
        ValueError: the experts cannot be shared out evenly.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            part = shard.part_of(module.num_experts)
            for name, whole in list(module.named_parameters(recurse=False)):
                # clone: a view would keep the whole tensor in memory
                setattr(module, name, nn.Parameter(whole.detach()[part].clone(), requires_grad=whole.requires_grad))
            module.num_experts = part.stop - part.start
    mark_experts(model, shard)


def mark_experts(model: nn.Module, shard: Shard) -> None:
    """Say of every expert parameter which part it is. Needed again after `to_empty`, which makes new parameters."""
    if shard == WHOLE:
        return
    for module in model.modules():
        if isinstance(module, Experts):
            for parameter in module.parameters(recurse=False):
                parameter.shard = shard  # pyright: ignore[reportAttributeAccessIssue]
