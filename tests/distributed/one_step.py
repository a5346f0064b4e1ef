"""Training steps of the small model on the rows of one rank; test_ranks.py runs them alone and as two processes.

python -m tests.distributed.one_step OUT      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn

from tests.train import small
from train.build import build_accelerator
from train.config import ParallelConfig
from train.evaluate import exact
from train.loop import all_sum, any_rank, train_step
from train.objectives.sft import SFT
from train.policy import Policy, on_device

SEGMENTS = {
    "image": small.example(0, 9, image=True),
    "long": small.example(1, 12, learned=5),
    "short": small.example(2, 6, learned=1),
    "image2": small.example(3, 8, image=True, learned=2),
}
# The micro-batches of rank 0, of rank 1, and whether to recompute activations.
CASES: dict[str, tuple[list[str], list[str], bool]] = {
    "rank 0 has an image before the ranks meet": (["image", "long"], ["short", "long"], False),
    "rank 1 has an image where the ranks meet": (["long", "short"], ["short", "image2"], False),
    "with activation checkpointing": (["image", "short"], ["short", "long"], True),
    "nobody has an image": (["long", "short"], ["short", "long"], False),
}


class Catch(torch.optim.SGD):
    """Keeps the gradients that an update would use."""

    def step(self, closure=None):
        self.caught = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


def one_step(accelerator: Accelerator, names: list[str], *, checkpointing: bool) -> dict:
    policy: Policy = small.policy(dtype=torch.float64)
    policy.model.gradient_checkpointing = checkpointing
    optimizer = Catch(policy.parameters(), lr=1.0)
    wrapped = accelerator.prepare_model(policy)
    assert isinstance(wrapped, nn.Module)
    wrapped.train()
    rows = [small.in_double(small.row(SEGMENTS[name])) for name in names]
    metrics = train_step(wrapped, SFT, optimizer, rows, accelerator=accelerator, max_grad_norm=1e9)
    row, row_R = on_device(rows[0], accelerator.device)
    right = exact(policy(row, row_R).correct_T, row).sum().double()
    return {
        "gradients": {name: g for (name, _), g in zip(policy.named_parameters(), optimizer.caught, strict=True)},
        "metrics": metrics,
        "right": all_sum(accelerator, right).item(),
        "flag": any_rank(accelerator, accelerator.process_index == 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = build_accelerator(ParallelConfig(cpu=True))
    results = {
        case: one_step(accelerator, ranks[accelerator.process_index], checkpointing=checkpointing)
        for case, (*ranks, checkpointing) in CASES.items()
    }
    if accelerator.is_main_process:
        torch.save(results, sys.argv[1])
    accelerator.end_training()
