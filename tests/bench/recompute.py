"""Peak memory of a step against the length of its row, by model.recompute:  python -m tests.bench.recompute

The "small" model with AdamW. A row is made of conversations of 2,048 tokens that each begin with an image of 32 x 32
patches (256 tokens). Every figure comes from a process of its own, which takes a step on a short row first, so that
AdamW's moments exist. In brackets stands what `train.footprint` says before the first step, as a share of the peak.
The peak is what torch allocated at once. On a CPU the process takes more (gaps in the C library's heap): a second
figure, over what the process held before the model was built and with the libraries that a first update loads.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.memory import allocated_mib, reset_peak, status_mib
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from train.build import compute_dtype, set_recompute
from train.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    Recompute,
)
from train.footprint import footprint
from train.memory import keep_freed_memory
from train.optim import build_optimizer
from train.policy import Policy, on_device

SEGMENT, IMAGE_SIDE = 2048, 32
TOKENS = (2048, 4096, 8192, 16384, 32768)
WAYS = {
    "none": dict(recompute=Recompute.none),
    "layers": dict(recompute=Recompute.layers),
    "layers and vision": dict(recompute=Recompute.layers_and_vision),
    "offloaded": dict(recompute=Recompute.layers_and_vision, offload_activations=True),
}


def one_step(way: str, tokens: int, precision: Precision) -> dict[str, float]:
    keep_freed_memory()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.set_num_threads(1)
    architecture = ErnieConfig.from_json(transformers_config(SIZES["small"]).to_dict())
    settings = ModelConfig(config={}, processor="tiny", precision=precision, **WAYS[way])
    load_libraries()
    empty = status_mib("VmRSS")
    model = ErnieModel(architecture).to(device)
    model.compute_dtype = compute_dtype(settings)
    set_recompute(model, settings)
    policy = Policy(model, loss_is_linear=True).train()
    optimizer = build_optimizer(model, OptimConfig())

    def step(segments: list[dict[str, Any]]) -> None:
        batch, row_R = on_device(packed(segments, architecture), device)
        loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    images = tokens // SEGMENT
    row = random_segments(SIZES["small"], [SEGMENT] * images, image_side=IMAGE_SIDE)
    step(random_segments(SIZES["small"], [64], image_side=4))
    memory = footprint(
        model,
        settings,
        max_tokens=tokens,
        max_patches=images * IMAGE_SIDE**2,
        accumulation=1,
        parallel=ParallelConfig(),
        ranks=1,
        device=device,
    )
    found = dict(estimate_mib=memory.peak / 2**20)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step(row)
        return found | dict(peak_mib=torch.cuda.max_memory_allocated() / 2**20)
    reset_peak()
    step(row)
    process = status_mib("VmHWM") - empty
    held = (memory.weights + memory.optimizer) / 2**20
    return found | dict(
        peak_mib=held + allocated_mib(lambda: step(row)),
        process_mib=process,
        process_estimate_mib=memory.process / 2**20,
    )


def load_libraries() -> None:
    """What a first update brings into the process, whatever the model."""
    layer = torch.nn.Linear(8, 8)
    layer(torch.ones(8, 8)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--precision", choices=[p.value for p in Precision], default="fp32")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_step(args.way, args.tokens[0], Precision(args.precision))))
        return
    ways = [way for way in WAYS if way != "offloaded" or torch.cuda.is_available()]
    print(f"{'tokens':>7s}" + "".join(f"{way:>30s}" for way in ways) + f"   MiB, {args.precision}")
    for tokens in args.tokens:
        cells = []
        for way in ways:
            command = [sys.executable, "-m", "tests.bench.recompute", "--way", way, "--tokens", str(tokens)]
            command += ["--precision", args.precision]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            cell = f"{found['peak_mib']:,.0f} ({found['estimate_mib'] / found['peak_mib']:.2f})"
            if "process_mib" in found:
                share = found["process_estimate_mib"] / found["process_mib"]
                cell += f" {found['process_mib']:,.0f} ({share:.2f})"
            cells.append(f"{cell:>30s}")
        print(f"{tokens:7,d}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
