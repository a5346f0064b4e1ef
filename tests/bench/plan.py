"""What `ernie plan` says a rank holds, against what torch allocated there:  python -m tests.bench.plan

Gloo ranks on this machine, each in a process of its own: the model is built, cut up and given to the engine as a run
does it, takes a step on a short row, and then the one that is measured. Rows are 1,024 tokens with an image of 576
patches, float32, AdamW, everything trains. Peaks are those of rank 0, from the first tensor on.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from typing import Any

import torch

from ernie_model.config import ErnieConfig
from ernie_model.expert_parallel import Shard, connect_experts, shard_experts
from ernie_model.model import ErnieModel
from tests.bench.memory import allocated_mib
from tests.bench.models import SIZES, Size, packed, random_segments, transformers_config
from tests.distributed.gloo import launch
from train.build import set_recompute
from train.config import HeldIn, ModelConfig, OptimConfig, ParallelConfig, Precision, Recompute
from train.footprint import Footprint, footprint
from train.optim import build_optimizer
from train.parallel.layout import Layout, build_accelerator, build_layout
from train.parallel.settings import deepspeed_config
from train.parallel.updates import Updates, build_updates
from train.policy import Policy, on_device

MODELS = {
    "tiny": dataclasses.replace(
        SIZES["small"], layers=3, width=128, ffn=384, experts=4, vocabulary=2048, vision_layers=2
    ),
    "small": SIZES["small"],
    "medium": SIZES["medium"],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "ddp": {},
    "zero=1": dict(zero=1),
    "zero=2": dict(zero=2),
    "zero=3": dict(zero=3),
    "expert=2": dict(expert=2),
    "expert=2 zero=1": dict(zero=1, expert=2),
    "expert=2 zero=2": dict(zero=2, expert=2),
    "expert=2 zero=3": dict(zero=3, expert=2),
    "zero=2 bfloat16": dict(zero=2, held_in=HeldIn.bfloat16),
}
MAX_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    layout: str
    tokens: int = 1024
    image_side: int = 24
    accumulation: int = 1
    recompute: str = "none"

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(cpu=True, threads=1, bucket_mb=4, **LAYOUTS[self.layout])

    @property
    def settings(self) -> ModelConfig:
        narrow = self.parallel.held_in is HeldIn.bfloat16
        precision = Precision.bf16 if narrow else Precision.fp32
        return ModelConfig(config={}, processor="tiny", precision=precision, recompute=Recompute(self.recompute))


def build(size: Size, case: Case, layout: Layout | None = None) -> ErnieModel:
    """On `layout`'s rank; without one on the meta device, as a plan sees it."""
    with torch.device("meta" if layout is None else "cpu"):
        model = ErnieModel(ErnieConfig.from_json(transformers_config(size).to_dict()))
    if case.parallel.held_in is HeldIn.bfloat16:
        model.set_dtype(torch.bfloat16)
    set_recompute(model, case.settings)
    if layout is not None and layout.expert_group is not None:
        shard_experts(model, Shard(layout.expert_rank, layout.expert))
        connect_experts(model, layout.expert_group)
    return model


def measure(case: Case, accelerator, layout: Layout) -> float:
    """MiB at the highest point of the second step."""
    size = MODELS[case.model]
    held: dict[str, Any] = {}

    def step(segments: list[dict[str, Any]], rows: int) -> None:
        updates: Updates = held["updates"]
        for number in range(rows):
            with updates.microbatch(last=number == rows - 1):
                batch, row_R = on_device(packed(segments, held["config"]), torch.device("cpu"))
                loss = -(updates.policy(batch, row_R, join=layout.joint).logprob_T * batch.weight_T).sum() / len(row_R)
                updates.backward(loss)
        updates.grad_norm()
        updates.step(MAX_NORM, media=True)

    def prepare() -> None:
        model = build(size, case, layout)
        held["config"] = model.config
        policy, optimizer = Policy(model, loss_is_linear=True).train(), build_optimizer(model, OptimConfig())
        settings = deepspeed_config(case.parallel, max_grad_norm=MAX_NORM, gpu=False)
        held["updates"] = build_updates(policy, optimizer, accelerator, layout, settings)
        step(random_segments(size, [64], image_side=4), 1)

    row = random_segments(size, [case.tokens], image_side=case.image_side)
    gc.collect()
    return allocated_mib(lambda: step(row, case.accumulation), prepare=prepare)


def said(case: Case, ranks: int) -> Footprint:
    return footprint(
        build(MODELS[case.model], case),
        case.settings,
        max_tokens=case.tokens,
        max_patches=case.image_side**2,
        accumulation=case.accumulation,
        parallel=case.parallel,
        ranks=ranks,
        device=torch.device("cpu"),
    )


def rank(cases: list[Case]) -> None:
    """One rank: a line of JSON for each case."""
    for case in cases:
        accelerator = build_accelerator(case.parallel)
        found = measure(case, accelerator, build_layout(case.parallel, accelerator))
        print(json.dumps(dict(case=dataclasses.asdict(case), mib=found)), flush=True)


def compare(cases: list[Case], *, limit_s: float = 600.0) -> dict[Case, tuple[float, float]]:
    """Case → (measured, said), in MiB. Cases with as many ranks share their processes."""
    found = {}
    for ranks in (1, 2):
        some = [case for case in cases if (case.layout == "one process") == (ranks == 1)]
        told = ["-m", "tests.bench.plan", "--rank", json.dumps([dataclasses.asdict(case) for case in some])]
        if not some:
            continue
        if ranks == 1:  # without what tells a process that others exist
            printed = subprocess.run([sys.executable, *told], check=True, stdout=subprocess.PIPE, text=True).stdout
        else:
            printed = launch(ranks, *told, limit_s=limit_s, fresh=True)[0]
        for line in printed.splitlines():
            if line.startswith('{"case"'):
                one = json.loads(line)
                case = Case(**one["case"])
                found[case] = one["mib"], said(case, ranks).peak / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--recompute", choices=[way.value for way in Recompute], default="none")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank([Case(**case) for case in json.loads(args.rank)])
        return
    print(f"{'model':8s} {'layout':18s} {'measured':>10s} {'said':>8s}   MiB, accumulation {args.accumulation}")
    for model in args.models:
        cases = [
            Case(model, layout, accumulation=args.accumulation, recompute=args.recompute) for layout in args.layouts
        ]
        for case, (mib, estimate) in compare(cases).items():
            print(f"{case.model:8s} {case.layout:18s} {mib:10,.0f} {estimate:8,.0f}   {estimate / mib:.2f}", flush=True)


if __name__ == "__main__":
    main()
