"""Updates beside a reference, on the layouts of two ranks; test_references.py compares with what one process computes.

python -m tests.distributed.references FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.fit import Rules
from tests.train.test_reference import ARCHITECTURE, PAIRS, settings
from train import checkpoint
from train.build import build_model
from train.config import ModelConfig, OptimConfig, ParallelConfig, PeftConfig, PeftKind, Precision, TaskData
from train.loop import train_step
from train.optim import build_optimizer
from train.parallel.layout import Layout, build_accelerator, build_layout
from train.parallel.partition import partitioner
from train.parallel.rows import SharedSource
from train.parallel.settings import deepspeed_config
from train.parallel.updates import build_updates
from train.policy import Policy
from train.reference import build_reference
from train.reference_cache import records_of
from train.sources import build_data
from train.weights import trained_weights

ROWS = 4
"""Of an update, over all ranks."""
MODEL = ARCHITECTURE.replace(num_attention_heads=4, num_key_value_heads=2)
LORA = PeftConfig(kind=PeftKind.lora, rank=4, alpha=8.0)


class Case(NamedTuple):
    kind: str = "copy"
    zero: int = 0
    expert: int = 1
    sequence: int = 1
    lora: bool = False
    update: tuple[tuple[str, Any], ...] = ()

    @property
    def alone(self) -> "Case":
        return self._replace(zero=0, expert=1, sequence=1)


EMA, SYNC = (("update", "ema"), ("every", 1), ("mix", 0.3)), (("update", "sync"), ("every", 2))
CASES = {
    "copy, experts and ZeRO-3": Case(zero=3, expert=2),
    "copy, shared rows": Case(sequence=2),
    "adapters off, experts": Case("adapters_off", expert=2, lora=True),
    "adapters off, ZeRO-3": Case("adapters_off", zero=3, lora=True),
    "cache, DDP": Case("cache"),
    "cache, experts and ZeRO-2": Case("cache", zero=2, expert=2),
    "cache, ZeRO-3": Case("cache", zero=3, lora=True),
    "average, experts and ZeRO-2": Case(zero=2, expert=2, update=EMA),
    "average, ZeRO-3": Case(zero=3, update=EMA),
    "synced adapters, ZeRO-3": Case(zero=3, lora=True, update=SYNC),
    "synced adapters, ZeRO-1": Case(zero=1, lora=True, update=SYNC),
}


class Run(NamedTuple):
    losses: list[float]
    numbers: dict[str, list[float]]
    """Of each record that this rank saw, by its place among the updates: the sum of its reference log-probabilities."""


def run(case: Case, accelerator: Any, layout: Layout, parallel: ParallelConfig, folder: Path) -> Run:
    engine = deepspeed_config(parallel, max_grad_norm=1.0, gpu=False)
    if case.zero == 3:  # by default ZeRO-3 keeps small weights whole, and here all are small
        engine["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    config = ModelConfig(config=MODEL.to_json(), processor="tiny", precision=Precision.fp32)
    peft = LORA if case.lora else PeftConfig()
    partition = partitioner(engine) if layout.zero == 3 else None
    model, processor, _ = build_model(config, seed=7, frozen=case.lora, layout=layout, partition=partition)
    weights = trained_weights(model, peft, seed=7, base=None)
    task = TaskData(task="digits", limit=23, max_tokens=96, accumulation=ROWS // layout.data_world)
    data = build_data(
        task, processor, rank=layout.data_rank, world=layout.data_world, max_heldout=3, rules=Rules(max_tokens=96)
    )
    policy = Policy(model, sequence_group=layout.sequence_group)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, eps=1e-3, weight_decay=0.0))
    reference = build_reference(
        settings(case.kind, **dict(case.update)), needed=True, model=config, peft=peft, parallel=parallel, seed=7,
        policy=policy, weights=weights, accelerator=accelerator, layout=layout, engine=engine, folder=folder,
    )  # fmt: skip
    updates = build_updates(policy, optimizer, accelerator, layout, engine)
    reference.start(updates.optimizer, data)
    saved = reference.state()
    source = SharedSource(data.train, layout, accelerator.device)
    updates.policy.train()
    found = Run([], {})
    for step in range(3):
        rows = source.next_step()
        for row in reference.streams(rows):
            for record in records_of(row, MODEL):
                assert row.ref_logprob_T is not None
                total = row.ref_logprob_T[record.tokens].sum().item()
                found.numbers.setdefault(record.id, []).append(total)
        metrics = train_step(
            updates, PAIRS, rows, accelerator=accelerator, max_grad_norm=1.0, beside=[reference]
        )  # fmt: skip
        found.losses.append(metrics["loss"])
        if step == 1:
            checkpoint.save(
                folder / "checkpoints", 2, weights=reference.resumable(weights), optimizer=updates.optimizer,
                state={"reference": reference.state()}, keep=1,
            )  # fmt: skip
    reference.load(saved)
    return found


def main(folder: Path) -> None:
    """One rank."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        parallel = ParallelConfig(cpu=True, zero=case.zero, expert=case.expert, sequence=case.sequence)
        accelerator = build_accelerator(parallel)
        layout = build_layout(parallel, accelerator)
        found[name] = run(case, accelerator, layout, parallel, folder / name)._asdict()
        print(name, found[name]["losses"], flush=True)
    torch.save(found, folder / f"rank-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
