"""What experts on several ranks cost: rows that travel, and ranks that wait for the one with the most work.

    expert_mb_per_layer      10^6 bytes that a rank sent to others in this update, mean over ranks and sparse layers.
                             Even routing, T tokens of D numbers to K experts, N ranks to share them:
                                 forward    2 * T * K * D * bytes * (N - 1) / N         to the experts and back
                                 backward   as much again, and once more where activations are recomputed
    expert_rank_imbalance    rows computed by the busiest rank over the mean, mean over layers; 1 is even

Counted from the lengths of what is sent, which the host knows anyway. The counts themselves (8 bytes per expert and
layer) are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.expert_parallel import ExpertParallel
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE
from train.loop import Beside
from train.parallel.layout import Layout


class Traffic(Beside):
    """To stand first beside the loop: what the others compute before the first micro-batch counts too."""

    def __init__(self, model: ErnieModel, layout: Layout, device: torch.device):
        self.layout, self.device = layout, device
        routes = [layer.mlp.route for layer in model.layers if isinstance(layer.mlp, MoE)]
        self.routes = [route for route in routes if isinstance(route, ExpertParallel)]

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        for route in self.routes:
            route.sent_bytes = route.computed_rows = 0

    def sums(self) -> Tensor | None:
        """Bytes, then the rows of each layer, in this rank's column of as many as there are ranks."""
        if not self.routes:
            return None
        rows_LW = torch.zeros(len(self.routes), self.layout.world, dtype=torch.float64)
        rows_LW[:, self.layout.rank] = torch.tensor([float(route.computed_rows) for route in self.routes])
        sent = torch.tensor([float(sum(route.sent_bytes for route in self.routes))], dtype=torch.float64)
        return torch.cat((sent, rows_LW.flatten())).to(self.device)

    def report(self, sums: Tensor) -> dict[str, float]:
        rows_LW = sums[1:].view(len(self.routes), self.layout.world)
        return {
            "expert_mb_per_layer": float(sums[0]) / rows_LW.numel() / 1e6,
            "expert_rank_imbalance": float((rows_LW.amax(1) / rows_LW.mean(1)).mean()),
        }
