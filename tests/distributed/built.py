"""Models as each rank of several layouts builds them; test_build.py compares the parts with what one process builds.

python -m tests.distributed.built FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_model.checkpoint import save_model
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import tiny_tokenizer_ids
from tests.train import small
from train.build import build_model
from train.config import TARGETS, HeldIn, ModelConfig, PeftConfig, PeftKind, Precision
from train.parallel.fragments import whole_shape, working
from train.parallel.layout import Layout, leave
from train.weights import trained_weights

ARCHITECTURE = small.CONFIG.replace(**tiny_tokenizer_ids())
LORA = PeftConfig(kind=PeftKind.lora, targets=list(TARGETS), rank=3)


class Case(NamedTuple):
    zero: int = 0
    expert: int = 1
    checkpoint: bool = True
    lora: bool = False
    precision: Precision = Precision.bf16
    held_in: HeldIn = HeldIn.float32


CASES = {
    "experts of a checkpoint": Case(expert=2),
    "experts, random": Case(expert=2, checkpoint=False),
    "experts, in bfloat16": Case(zero=1, expert=2, held_in=HeldIn.bfloat16),
    "experts, adapters on bfloat16": Case(expert=2, lora=True),
    "ZeRO-3 of a checkpoint": Case(zero=3),
    "ZeRO-3, random": Case(zero=3, checkpoint=False),
    "ZeRO-3, adapters on random bfloat16": Case(zero=3, checkpoint=False, lora=True),
    "ZeRO-3, adapters on float32": Case(zero=3, lora=True, precision=Precision.fp32),
    "experts and ZeRO-3 of a checkpoint": Case(zero=3, expert=2),
    "experts and ZeRO-3, adapters on bfloat16": Case(zero=3, expert=2, lora=True),
    "experts and ZeRO-3, adapters on random bfloat16": Case(zero=3, expert=2, checkpoint=False, lora=True),
}


def build(case: Case, folder: Path, layout: Layout) -> ErnieModel:
    partition = None
    if layout.zero == 3:
        from train.parallel.partition import partitioner

        partition = partitioner({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    config = ModelConfig(
        checkpoint=str(folder / "checkpoint") if case.checkpoint else None,
        config=None if case.checkpoint else ARCHITECTURE.to_json(),
        processor="tiny",
        precision=case.precision,
    )
    model = build_model(
        config, seed=7, frozen=case.lora, held_in=case.held_in, layout=layout, partition=partition
    ).model
    if case.lora:
        trained_weights(model, LORA, seed=8, base=None)
    return model


def write_checkpoint(folder: Path) -> None:
    torch.manual_seed(5)
    save_model(ErnieModel(ARCHITECTURE), folder / "checkpoint", max_shard_bytes=20_000)


def parts(model: ErnieModel) -> dict[str, tuple[list[int], int, Tensor]]:
    """Of every tensor: the whole shape, where this rank's part of it begins, and the part, flattened."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: (whole_shape(tensor), *working(tensor)) for name, tensor in tensors.items()}


if __name__ == "__main__":
    import deepspeed

    from train.parallel.groups import expert_groups

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    folder, rank, world = Path(sys.argv[1]), torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name, case in CASES.items():
        groups = expert_groups(case.expert) if case.expert > 1 else (None, None)
        layout = Layout(
            rank=rank, world=world, zero=case.zero, expert=case.expert, expert_rank=rank % case.expert,
            expert_group=groups[0], expert_data_group=groups[1],
        )  # fmt: skip
        found[name] = parts(build(case, folder, layout))
    torch.save(found, folder / f"rank-{rank}.pt")
    leave()
