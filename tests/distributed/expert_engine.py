"""DeepSpeed's engine and experts that lie on two of four ranks; test_groups.py tells what must come out.

python -m tests.distributed.expert_engine FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from ernie_model.expert_parallel import Shard, connect_experts, shard_experts, shard_of
from tests.distributed.expert_routes import ROWS, adapted, small_policy
from train.config import ParallelConfig
from train.parallel.groups import announce, expert_groups, tag_experts
from train.parallel.layout import build_accelerator, leave, start_deepspeed
from train.policy import Policy, on_device

MIXED = ("image", "both", "text", "long")  # the second expert group has no row for its vision experts
LEARNING_RATE = 0.1


class Case(NamedTuple):
    zero: int
    prepare: Callable[[Policy], None] = lambda _: None


CASES = {
    **{f"every weight, ZeRO-{stage}": Case(stage) for stage in (1, 2, 3)},
    **{f"adapters on attention, ZeRO-{stage}": Case(stage, adapted(["attention"])) for stage in (1, 2, 3)},
    **{
        f"adapters on experts, ZeRO-{stage}": Case(stage, adapted(["text_experts", "vision_experts"]))
        for stage in (2, 3)
    },
}


def loss_of(policy, name: str):
    row, row_R = on_device(ROWS[name], torch.device("cpu"))
    return -(policy(row, row_R, join=True).logprob_T * row.weight_T).sum()


def alone(case: Case) -> dict[str, torch.Tensor]:
    """The weights after one step of SGD along the mean of the four rows' gradients."""
    policy = new_policy(case)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for name in MIXED:
        (loss_of(policy, name) / len(MIXED)).backward()
    optimizer.step()
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def new_policy(case: Case, shard: Shard | None = None) -> Policy:
    policy = small_policy(torch.float32)
    if shard is not None:
        shard_experts(policy, shard)
    case.prepare(policy)
    return policy


def groups_of_parameters(policy: Policy) -> list[dict]:
    """As train/optim.py makes them: experts apart."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    dense = {"params": [p for p in trained if shard_of(p).of == 1], "name": "dense"}
    experts = {"params": [p for p in trained if shard_of(p).of > 1], "name": "ep_size_2", "moe": True}
    return [group for group in (dense, experts) if group["params"]]


def with_engine(case: Case, group: dist.ProcessGroup) -> dict:
    policy = new_policy(case, Shard(dist.get_rank(group), dist.get_world_size(group)))
    connect_experts(policy, group)
    names = list(policy.state_dict())
    tag_experts(policy)
    announce(policy, case.zero)
    assert list(policy.state_dict()) == names
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.zero},
    }
    optimizer = torch.optim.SGD(groups_of_parameters(policy), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(loss_of(engine, MIXED[dist.get_rank()]))
    engine.step()
    whole = deepspeed.zero.GatheredParameters(list(policy.parameters()), enabled=case.zero == 3)
    with whole:
        weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    engine.destroy()
    return {
        "weights": weights,
        "shards": [name for name, p in policy.named_parameters() if shard_of(p).of > 1],
        "announced": engine.has_moe_layers,
    }


def main(folder: Path) -> None:
    start_deepspeed(build_accelerator(ParallelConfig(cpu=True)))
    groups = expert_groups(2)
    results: dict = {
        "again": groups == expert_groups(2),
        "expert": dist.get_process_group_ranks(groups.expert),
        "expert_data": dist.get_process_group_ranks(groups.expert_data),
    }
    for name, case in CASES.items():
        print(name, flush=True)  # a test that fails shows where the ranks stood
        results[name] = with_engine(case, groups.expert)
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
