"""Which parts of the model a run has reached: those that have had a gradient other than zero.

Told at the end, because a part that was to learn and that no token came by is rarely what was meant.
"""

import torch
from torch import Tensor, nn

from ernie_model.moe import RouterStats
from ernie_model.parts import Part, part_of
from train.ledger import bare
from train.loop import Beside
from train.parallel.updates import Updates


class Reach(Beside):
    """Looks at the gradients of parts that were not reached yet, until all are.

    Args:
        reached: `TrainState.reached`, which grows.
    """

    def __init__(self, updates: Updates, reached: list[str], device: torch.device):
        self.updates, self.reached, self.device = updates, reached, device
        self._left = {part_of(bare(name)).value for name in updates.names} - {*reached}
        self._found: list[str] = []

    def sums(self) -> Tensor | None:
        """1 for each part that has a gradient here."""
        if not self._left:
            return None
        gradients: dict[str, list[Tensor]] = {}
        for name, gradient in self.updates.gradients():
            gradients.setdefault(part_of(bare(name)).value, []).append(gradient)
        zero = torch.zeros((), dtype=torch.bool, device=self.device)
        found = [
            torch.stack([gradient.any() for gradient in gradients[part]]).any() if part in gradients else zero
            for part in sorted(self._left)
        ]
        return torch.stack(found).float()

    def report(self, sums: Tensor) -> dict[str, float]:
        self._found = [part for part, ranks in zip(sorted(self._left), sums.tolist(), strict=True) if ranks]
        return {}

    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        self.reached += self._found
        self._left -= {*self._found}
        self._found = []


def unreached_parts(model: nn.Module, reached: list[str]) -> list[Part]:
    """Parts that were to learn and that no token of the run came by."""
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [part for part in Part if part in trained and part.value not in reached]
