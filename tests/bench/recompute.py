"""Peak memory of a step against the length of its row, by model.recompute:  python -m tests.bench.recompute

The "small" model with AdamW. A row is made of conversations of 2,048 tokens that each begin with an image of 32 x 32
patches (256 tokens). Every figure comes from a process of its own, which takes a step on a short row first, so that
AdamW's moments exist. Beside it stands what `train.build.arithmetic` says before the first step. On a CPU the peak is
that of the process over what it held before the model was built; on a GPU it is what torch allocated.
"""

import argparse
import json
import subprocess
import sys

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.memory import reset_peak, status_mib
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from train.build import arithmetic, set_recompute
from train.config import ModelConfig, OptimConfig, Precision, Recompute
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
    torch.ones(8, 8) @ torch.ones(8, 8)  # the libraries' own buffers
    empty = status_mib("VmRSS")
    model = ErnieModel(architecture).to(device)
    model.compute_dtype = torch.bfloat16 if precision is Precision.bf16 else None
    set_recompute(model, settings)
    policy = Policy(model, loss_is_linear=True).train()
    optimizer = build_optimizer(model, OptimConfig())
    short = random_segments(SIZES["small"], [64], image_side=4)
    full = random_segments(SIZES["small"], [SEGMENT] * (tokens // SEGMENT), image_side=IMAGE_SIDE)
    for segments in (short, full):
        reset_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batch, row_R = on_device(packed(segments, architecture), device)
        loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert batch.patch_PX is not None
    sums = arithmetic(
        architecture,
        settings,
        max_tokens=tokens,
        max_patches=batch.patch_PX.shape[0],
        accumulation=1,
        ranks=1,
        device=device,
        trained=sum(p.numel() for p in model.parameters()),
    )
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else status_mib("VmHWM") - empty
    return dict(peak_mib=peak, estimate_mib=(sums.state_bytes + sums.activation_bytes) / 2**20)


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
    print(f"{'tokens':>7s}" + "".join(f"{way:>20s} (estimate)" for way in ways) + f"   MiB, {args.precision}")
    for tokens in args.tokens:
        cells = []
        for way in ways:
            command = [sys.executable, "-m", "tests.bench.recompute", "--way", way, "--tokens", str(tokens)]
            command += ["--precision", args.precision]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{found['peak_mib']:20,.0f} ({found['estimate_mib'] / found['peak_mib']:7.2f}x)")
        print(f"{tokens:7,d}" + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
