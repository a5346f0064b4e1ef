"""Timed training steps of one of several ranks; tests/bench/scaling.py starts them and prints what they find.

python -m tests.bench.scaling_rank CASE...      each a JSON object with the fields of `Case`
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch

from ernie_model.config import ErnieConfig
from ernie_model.expert_parallel import Shard, connect_experts, shard_experts
from ernie_model.model import ErnieModel
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from train.config import OptimConfig, ParallelConfig
from train.loop import train_step
from train.objectives.sft import SFT
from train.optim import build_optimizer
from train.parallel.layout import build_accelerator, build_layout
from train.parallel.settings import deepspeed_config
from train.parallel.updates import build_updates
from train.policy import Policy


@dataclass(frozen=True)
class Case:
    zero: int = 0
    expert: int = 1
    experts: int = 16
    rows: int = 1
    """Micro-batches of each rank."""
    tokens: int = 2048
    """Of a row, in conversations of 512 or one shorter one."""
    rounds: int = 5


def run(case: Case) -> dict:
    """Medians over rounds: seconds of a step, and how many of them this rank's thread computed in."""
    parallel = ParallelConfig(cpu=True, threads=1, zero=case.zero, expert=case.expert)
    accelerator = build_accelerator(parallel)
    layout = build_layout(parallel, accelerator)
    size = replace(SIZES["small"], experts=case.experts)
    torch.manual_seed(0)
    model = ErnieModel(ErnieConfig.from_json(transformers_config(size).to_dict())).train()
    if layout.expert_group is not None:
        shard_experts(model, Shard(layout.expert_rank, layout.expert))
        connect_experts(model, layout.expert_group)
    updates = build_updates(
        Policy(model, loss_is_linear=True),
        build_optimizer(model, OptimConfig()),
        accelerator,
        layout,
        deepspeed_config(parallel, max_grad_norm=1.0, gpu=False),
    )
    length = min(512, case.tokens)
    walls, computed = [], []
    for number in range(2 + case.rounds):  # two to warm up
        rows = [
            packed(
                random_segments(size, [length] * (case.tokens // length), seed=1000 * number + 10 * row + layout.rank),
                model.config,
            )
            for row in range(case.rows)
        ]
        accelerator.wait_for_everyone()
        wall, thread = time.perf_counter(), time.thread_time()
        train_step(updates, SFT, rows, accelerator=accelerator, max_grad_norm=1.0)
        walls.append(time.perf_counter() - wall)
        computed.append(time.thread_time() - thread)
    return {"step_s": statistics.median(walls[2:]), "computed_s": statistics.median(computed[2:])}


if __name__ == "__main__":
    for words in sys.argv[1:]:
        case = Case(**json.loads(words))
        print(json.dumps({"case": asdict(case), **run(case)}), flush=True)
