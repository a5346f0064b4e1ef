"""Five updates of the small model on any layout, next to those of one process on the same rows.

    python -m tests.distributed.equality           the whole table: every layout that 2 and 4 ranks allow (an hour)
    python -m tests.distributed.equality 17        every 17th line of it

As a rank (RANK, WORLD_SIZE, ... set), it runs the cases it is given and compares them itself:

    python -m tests.distributed.equality OUT CASE CASE ...

Compared are loss, length of the gradient and routers' numbers of every update, and every weight after the last one.
In float32, with AdamW whose eps is 1e-3: at 1e-8 it makes steps of full size out of gradients that are rounding errors.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import PackedBatch, Role
from data.encode import Example
from ernie_model.expert_parallel import WHOLE, Shard, connect_experts, shard_experts, shard_of
from ernie_model.model import ErnieModel
from ernie_model.recompute import recompute
from tests.distributed.gloo import launch
from tests.train import small
from tests.train.objectives.rows import record
from train.config import ObjectiveConfig, OptimConfig, ParallelConfig, PeftConfig, PeftKind, PoolWeights
from train.dpo_config import DPOObjectiveConfig
from train.loop import Beside, train_step
from train.lora.adapt import adapt
from train.objectives import LossSum, Objective, dpo
from train.objectives.kto import Divergence
from train.objectives.sft import SFT
from train.optim import build_optimizer
from train.parallel.layout import Layout, build_accelerator, build_layout, leave
from train.parallel.partition import partitioner
from train.parallel.settings import deepspeed_config
from train.parallel.updates import build_updates
from train.policy import Policy
from train.reference import AdaptersOff
from train.router import RouterLosses
from train.trained import freeze
from train.weights import Weights

MODEL = small.CONFIG.replace(num_hidden_layers=3, sparse_layers=(1, 2))
OPTIM = OptimConfig(lr=1e-2, eps=1e-3, weight_decay=0.1, lr_scale={"router": 0.5})
ROUTERS = ObjectiveConfig(
    balance=PoolWeights(0.3, 0.7), z_loss=PoolWeights(0.2, 0.05), orthogonal=PoolWeights(0.11, 0.13), bias_update=1e-3
)
PREFERENCES = {
    "dpo": DPOObjectiveConfig(
        beta=0.5,
        pref_loss_ratio=0.8,
        added_losses={"bco_pair": 0.2, "simpo": 0.1},
        sft_loss_ratio=0.5,
        ld_alpha=0.3,
        mdpo_conditional=1.0,
        mdpo_anchor=0.7,
    ),
    "kto_pair": DPOObjectiveConfig(preference_loss_type="kto_pair", beta=0.5),
    "kto": DPOObjectiveConfig(preference_loss_type="kto", beta=0.5, undesirable_weight=1.5),
}
# Who has an image. The third update has none anywhere, in the fourth the last rows are nothing but images.
IMAGES = ("x.x..x..", "....xxxx", "........", ".xxxxxxx", "xxxx....")


class Case(NamedTuple):
    expert: int = 1
    zero: int = 0
    clip: float = 0.5
    rows: int = 1
    """Micro-batches of each rank."""
    lora: str = ""
    """"all" adapts every part, "attention" one; "" trains the model."""
    frozen: str = ""
    recompute: bool = False
    loss: str = "sft"
    """"streams": a loss with weights of both signs, over pairs of segments, as preferences and advantages have them. Or
    one of PREFERENCES, of answers that share their prompt."""
    routers: bool = False
    ragged: bool = False
    """The last rank, or the last ones that share rows, have a row less than the others, or none."""
    offload: bool = False
    poisoned: bool = False
    """The second update has an image of NaN on one rank, and is left out on all."""
    sequence: int = 1
    """Ranks that share each row."""

    def __str__(self) -> str:
        return json.dumps({name: value for name, value in self._asdict().items() if value != getattr(Case(), name)})

    @staticmethod
    def parse(text: str) -> "Case":
        return Case(**json.loads(text))


class Run(NamedTuple):
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    """Whole, parameters and correction biases."""


# -------------------------------------------------------------------------------------------------------- the updates


def rows_of(step: int, count: int, loss: str) -> list[PackedBatch]:
    """The eight records of an update in `count` rows of equally many."""
    records: list[Example] = []
    for index, image in enumerate(IMAGES[step]):
        seed = 10 * step + index
        if loss in PREFERENCES:
            records.append(answers(seed, loss, image=image == "x"))
        else:
            records.append(small.example(seed, 7 + index % 3, image=image == "x", learned=(5, 2, 3, 1)[index % 4]))
    each = len(records) // count
    return [small.row(*records[at : at + each]) for at in range(0, len(records), each)]


def answers(seed: int, loss: str, *, image: bool) -> Example:
    """A pair, or a labelled answer. Where there is an image, some answers have one of their own."""
    if loss == "kto":
        label = Role.UNWANTED if seed % 3 else Role.WANTED
        return record(seed, label, Role.MISMATCHED, image=image, pictures=(Role.MISMATCHED,) * (image and seed % 2))
    corrupted = (Role.CORRUPTED,) * (image and loss == "dpo")
    pictures = (Role.REJECTED,) * (image and seed % 2)
    return record(seed, Role.CHOSEN, Role.REJECTED, *corrupted, image=image, pictures=pictures)


class MadeReference(Beside):
    """Any numbers will do that only depend on what is said, and are so low that the divergence is not below 0."""

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        return [
            dataclasses.replace(batch, ref_logprob_T=-batch.weight_T * (5 + batch.token_T % 5 / 4))
            for batch in microbatches
        ]


def streams(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
    """-log sigmoid of the difference of two segments' sums, and a product with a weight of its own for each token."""
    sum_S = logprob_T.new_zeros(batch.num_segments).index_add(0, batch.segment_T, logprob_T * batch.weight_T)
    pairs = -torch.nn.functional.logsigmoid(0.1 * (sum_S[0::2] - sum_S[1::2])).sum()
    advantage_T = torch.cos(torch.arange(batch.num_tokens, device=logprob_T.device) * 1.7)
    total = pairs - (advantage_T * logprob_T * batch.weight_T).sum()
    return LossSum(total, {"loss": total.detach()})


STREAMS = Objective("segment", lambda batch: torch.tensor(float(batch.num_segments)), streams)


def build(case: Case, layout: Layout, settings: dict[str, Any]) -> tuple[Policy, Weights | None]:
    """The same weights on every layout; the second are the adapters. `settings`: DeepSpeed's."""
    torch.manual_seed(0)
    model = ErnieModel(MODEL)
    if layout.expert > 1:
        shard_experts(model, Shard(layout.expert_rank, layout.expert))
    if case.zero == 3:  # as a run cuts it up: before anything is decided about its weights
        partition = partitioner(settings)
        for module in model.modules():
            partition(module)
    adapters = None
    if case.lora:
        targets = ["attention"] if case.lora == "attention" else None
        adapters = adapt(model, PeftConfig(kind=PeftKind.lora, targets=targets, rank=4, alpha=8.0), seed=0)
    if layout.expert_group is not None:
        connect_experts(model, layout.expert_group)
    freeze(model, dataclasses.replace(OPTIM, freeze=case.frozen.split(",") if case.frozen else []))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():  # B of adapters starts at 0, which would hide half of the gradients
            if "lora_B" in name or "_B_" in name:
                whole = 0.1 * torch.randn((shard_of(p).of * p.shape[0], *p.shape[1:]), generator=generator)
                p.copy_(whole[shard_of(p).part_of(len(whole))])
    if case.recompute:
        model.run_layer = recompute
        assert model.vision is not None
        model.vision.run_block = recompute
    return Policy(model, loss_is_linear=case.loss == "sft", sequence_group=layout.sequence_group), adapters


def run(case: Case, accelerator: Any, layout: Layout, config: ParallelConfig) -> Run:
    settings = deepspeed_config(config, max_grad_norm=case.clip, gpu=False)
    if case.zero == 3:  # by default ZeRO-3 keeps small weights whole, and here all are small
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    policy, adapters = build(case, layout, settings)
    optimizer = build_optimizer(policy.model, OPTIM)
    updates = build_updates(policy, optimizer, accelerator, layout, settings)
    objective = STREAMS if case.loss == "streams" else SFT
    beside: list[Beside] = [RouterLosses(policy, ROUTERS, accelerator, layout)] if case.routers else []
    if case.loss in PREFERENCES:
        reference = MadeReference()
        if adapters is not None:
            reference = AdaptersOff(policy, adapters, accelerator.device, layout)
        divergence = Divergence(PREFERENCES[case.loss]).attach(policy, accelerator, layout)
        objective = dpo.build(PREFERENCES[case.loss], divergence)
        beside += [reference, divergence]
    updates.policy.train()
    metrics = []
    for step in range(len(IMAGES)):
        rows = rows_of(step, ROWS * case.rows, case.loss)
        if case.poisoned and step == 1:
            *rest, last = rows
            assert last.patch_PX is not None
            rows = [*rest, dataclasses.replace(last, patch_PX=last.patch_PX * math.nan)]
        mine = share(rows, case, layout)
        metrics.append(
            train_step(updates, objective, mine, accelerator=accelerator, max_grad_norm=case.clip, beside=beside)
        )
    return Run(metrics, whole_weights(policy, layout))


ROWS = 4
"""Of an update, for each row that a case gives to a rank of four."""


def share(rows: list[PackedBatch], case: Case, layout: Layout) -> list[PackedBatch]:
    mine, last = (rows[at :: layout.data_world] for at in (layout.data_rank, layout.data_world - 1))
    if not case.ragged or layout.data_world == 1:
        return mine
    # the last one's first row goes to the first
    if layout.data_rank == 0:
        return [*mine, last[0]]
    return last[1:] if layout.data_rank == layout.data_world - 1 else mine


def whole_weights(policy: Policy, layout: Layout) -> dict[str, Tensor]:
    out = {name: buffer.clone() for name, buffer in policy.named_buffers() if "correction_bias" in name}
    for name, parameter in policy.named_parameters():
        value = parameter.detach()
        if layout.zero == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        if shard_of(parameter) != WHOLE:
            parts = [torch.empty_like(value) for _ in range(layout.expert)]
            dist.all_gather(parts, value.contiguous(), group=layout.expert_group)
            value = torch.cat(parts)
        out[name] = value.clone()
    return out


# --------------------------------------------------------------------------------------------------------- comparing


class Distance(NamedTuple):
    """Largest differences from one process: relative, relative, absolute, relative, relative."""

    loss: float
    norm: float
    weights: float
    routers: float
    ratios: float
    """Of what is reported of log p / p_ref."""
    where: str
    """The weight that is farthest."""


def compare(here: Run, one: Run) -> Distance:
    def relative(*keys: str) -> float:
        if not keys:
            return 0.0
        both = [(a, b) for a, b in zip(here.metrics, one.metrics, strict=True) if not b["skipped"]]
        found = []
        for key in keys:
            pairs = [(a[key], b[key]) for a, b in both if key in b]
            # To the largest of all updates: a loss with terms of both signs may come out near zero in one of them.
            largest = max(abs(b) for _, b in pairs)
            found += [abs(a - b) / max(largest, 1e-9) for a, b in pairs]
        return max(found)

    assert here.weights.keys() == one.weights.keys()
    assert all(a.keys() == b.keys() for a, b in zip(here.metrics, one.metrics, strict=True))
    for a, b in zip(here.metrics, one.metrics, strict=True):
        for key in ("units", "tokens", "image_tokens", "patches", "skipped"):
            assert a[key] == b[key], (key, a[key], b[key])
    far = {name: (here.weights[name] - value).abs().max().item() for name, value in one.weights.items()}
    where = max(far, key=far.__getitem__)
    routers = [key for key in one.metrics[0] if key.startswith("router_")]
    losses = [key for key in one.metrics[0] if key.startswith("loss")]
    ratios = [key for key in one.metrics[0] if key in ("kl", "reward_margin", "reward_chosen", "reward_wanted")]
    return Distance(relative(*losses), relative("grad_norm"), far[where], relative(*routers), relative(*ratios), where)


def main(out: str, texts: list[str]) -> None:
    """One rank."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    found, ones = {}, {}
    for text in texts:
        case = Case.parse(text)
        config = ParallelConfig(
            cpu=True, zero=case.zero, expert=case.expert, sequence=case.sequence, offload_optimizer=case.offload
        )
        accelerator = build_accelerator(config)
        layout = build_layout(config, accelerator)
        here = run(case, accelerator, layout, config)
        if layout.rank == 0:
            same = case._replace(expert=1, zero=0, offload=False, ragged=False, sequence=1)
            if same not in ones:
                ones[same] = alone(same)
            found[text] = compare(here, ones[same])._asdict()
            print(f"{layout.world} ranks {text}: {found[text]}", flush=True)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    leave()


def alone(case: Case) -> Run:
    """In one process, although others stand by."""
    return run(case, Alone(), Layout(), ParallelConfig(cpu=True))


class Alone:
    """What the loop asks of an accelerator, for a process that has no others."""

    device, num_processes, process_index = torch.device("cpu"), 1, 0

    def prepare_model(self, policy: Policy) -> Policy:
        return policy


COVERING = {
    # Each setting beside each stage of ZeRO and each size of an expert group, over the list.
    2: [
        Case(rows=2, routers=True),
        Case(zero=1, rows=2, recompute=True, loss="streams"),
        Case(zero=2, clip=1e9, routers=True),
        Case(zero=3, rows=2, recompute=True),
        Case(zero=1, ragged=True),
        Case(zero=2, ragged=True, rows=2, loss="streams"),
        Case(zero=3, lora="all", clip=1e9, recompute=True),
        Case(zero=2, offload=True, frozen="vision"),
        Case(zero=1, poisoned=True),
        Case(zero=2, poisoned=True, offload=True),
        Case(zero=3, poisoned=True, rows=2),
        Case(expert=2, poisoned=True),
        Case(expert=2, rows=2, loss="streams"),
        Case(expert=2, lora="attention", recompute=True),
        Case(expert=2, zero=1, routers=True, rows=2),
        Case(expert=2, zero=2, lora="all", recompute=True),
        Case(expert=2, zero=3, ragged=True, frozen="vision,text_experts"),
        Case(sequence=2, zero=1, rows=2, loss="streams"),
        Case(sequence=2, zero=2, routers=True),
        Case(sequence=2, zero=3, recompute=True, lora="all"),
        Case(sequence=2, expert=2, recompute=True, routers=True),
        Case(sequence=2, expert=2, zero=3, rows=2, loss="streams"),
        Case(rows=2, ragged=True, loss="kto"),
        Case(zero=2, ragged=True, loss="kto_pair"),
        Case(expert=2, zero=1, recompute=True, loss="dpo"),
        Case(zero=3, lora="all", rows=2, loss="dpo"),
        Case(expert=2, zero=3, ragged=True, loss="kto"),
        Case(expert=2, lora="all", loss="kto_pair"),
        Case(sequence=2, zero=2, loss="kto"),
        Case(sequence=2, expert=2, lora="attention", recompute=True, loss="dpo"),
    ],
    4: [
        Case(expert=2, recompute=True, frozen="router"),
        Case(expert=4, zero=2, rows=2, loss="streams"),
        Case(expert=2, zero=3, recompute=True),
        Case(expert=4, zero=1, lora="all"),
        Case(sequence=2, expert=2, zero=1, ragged=True, recompute=True),
        Case(sequence=2, expert=4, zero=2, routers=True),
        Case(sequence=2, expert=2, zero=3, ragged=True, loss="dpo"),
    ],
}
"""By the number of ranks."""
LIMITS = {"loss": 2e-6, "norm": 2e-6, "weights": 1e-5, "routers": 1e-6, "ratios": 1e-5}
"""What may differ: sums of a few thousand float32 terms in another order (1e-7), grown over five updates. Log-ratios
are differences of numbers ten times as large."""


def grid(world: int) -> list[Case]:
    """Everything beside everything, where it makes sense on so many ranks."""
    every = product((1, 2, 4), (0, 1, 2, 3), (0.5, 1e9), (1, 2), ("", "all", "attention"), ("", "vision,router"))
    cases = []
    for (expert, zero, clip, rows, lora, frozen), again, loss in product(every, (False, True), ("sft", "streams")):
        case = Case(expert, zero, clip, rows, lora, frozen, again, loss)
        if world % expert == 0 and not (lora and frozen):  # adapters freeze the rest
            cases.append(case)
    return cases


def table(every: int = 1) -> list[str]:
    """Print every so many-th line of the grid, `BATCH` cases per launch. Returns those that are too far."""
    far = []
    for world in (2, 4):
        cases = grid(world)[::every]
        for at in range(0, len(cases), BATCH):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.json"
                chosen = [str(case) for case in cases[at : at + BATCH]]
                launch(world, "-m", "tests.distributed.equality", str(out), *chosen, limit_s=60 * BATCH)
                for text, distance in json.loads(out.read_text()).items():
                    told = "  ".join(f"{key} {distance[key]:.1e}" for key in LIMITS)
                    good = all(distance[key] <= limit for key, limit in LIMITS.items())
                    print(line := f"{'ok ' if good else 'FAR'} {world} ranks  {told}  {text}", flush=True)
                    far += [] if good else [line]
    return far


BATCH = 40


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(bool(table(*map(int, sys.argv[1:]))))
