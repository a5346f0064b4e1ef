"""Training steps of the small model on the rows of one rank; test_ranks.py runs them alone and as two processes.

python -m tests.distributed.one_step OUT      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import sys
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ernie_model.recompute import recompute
from tests.train import small
from train.config import (
    ObjectiveConfig,
    ParallelConfig,
    PeftConfig,
    PeftKind,
    PoolWeights,
)
from train.heldout import exact
from train.loop import all_sum, any_rank, train_step
from train.lora.adapt import adapt
from train.objectives.sft import SFT
from train.parallel.layout import build_accelerator, leave
from train.parallel.updates import Plain
from train.policy import Policy, on_device
from train.router import RouterLosses

SEGMENTS = {
    "image": small.example(0, 9, image=True),
    "long": small.example(1, 12, learned=5),
    "short": small.example(2, 6, learned=1),
    "image2": small.example(3, 8, image=True, learned=2),
}
PLAIN = ObjectiveConfig()
ROUTERS = ObjectiveConfig(
    balance=PoolWeights(0.3, 0.7), z_loss=PoolWeights(0.2, 0.05), orthogonal=PoolWeights(0.11, 0.13), bias_update=1e-3
)


class Case(NamedTuple):
    first: list[str]
    """The micro-batches of rank 0."""
    second: list[str]
    """And of rank 1."""
    checkpointing: bool = False
    objective: ObjectiveConfig = PLAIN
    adapters: bool = False
    """On vision experts alone: rows without media reach nothing that trains."""


CASES = {
    "rank 0 has an image before the ranks meet": Case(["image", "long"], ["short", "long"]),
    "rank 1 has an image where the ranks meet": Case(["long", "short"], ["short", "image2"]),
    "with activation checkpointing": Case(["image", "short"], ["short", "long"], checkpointing=True),
    "nobody has an image": Case(["long", "short"], ["short", "long"]),
    "router losses, counted beforehand": Case(["image", "long"], ["short", "image2"], objective=ROUTERS),
    "router losses, one micro-batch each": Case(["image"], ["long"], objective=ROUTERS),
    "adapters of vision experts, no image at the end": Case(["image", "long"], ["short", "long"], adapters=True),
    "adapters of vision experts, an image on one rank": Case(["image"], ["long"], adapters=True),
    "adapters of vision experts, nobody has an image": Case(["long", "short"], ["short", "long"], adapters=True),
    "router losses, recomputed": Case(["image"], ["short"], checkpointing=True, objective=ROUTERS),
}


class Catch(torch.optim.SGD):
    """Keeps the gradients that an update would use."""

    def step(self, closure=None):
        self.caught = [p.grad.clone() for p in self.param_groups[0]["params"]]


def one_step(accelerator: Accelerator, names: list[str], case: Case) -> dict:
    policy: Policy = small.policy(dtype=torch.float64)
    if case.adapters:
        adapt(policy.model, PeftConfig(kind=PeftKind.lora, targets=["vision_experts"], rank=2), seed=0)
    if case.checkpointing:
        policy.model.run_layer = recompute
        assert policy.model.vision is not None
        policy.model.vision.run_block = recompute
    optimizer = Catch([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    updates = Plain(policy, optimizer, accelerator)
    updates.policy.train()
    rows = [small.in_double(small.row(SEGMENTS[name])) for name in names]
    routers = RouterLosses(policy, case.objective, accelerator)
    metrics = train_step(updates, SFT, rows, accelerator=accelerator, max_grad_norm=1e9, beside=[routers])
    row, row_R = on_device(rows[0], accelerator.device)
    right = exact(policy(row, row_R).correct_T, row).sum().double()
    return {
        "gradients": dict(zip(updates.names, optimizer.caught, strict=True)),
        "metrics": metrics,
        "biases": {name: b.clone() for name, b in policy.named_buffers() if "correction_bias" in name},
        "right": all_sum(accelerator, right).item(),
        "flag": any_rank(accelerator, accelerator.process_index == 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = build_accelerator(ParallelConfig(cpu=True))
    results = {
        name: one_step(accelerator, (case.first, case.second)[accelerator.process_index], case)
        for name, case in CASES.items()
    }
    if accelerator.is_main_process:
        torch.save(results, sys.argv[1])
    leave()
