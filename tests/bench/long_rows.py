"""Memory of a row's activations against its length, on one process and on two that share it:

    python -m tests.bench.long_rows                                   segments of 4,096 tokens, as many as fill the row
    python -m tests.bench.long_rows --segment 0 --tokens 8192 16384   one segment
    python -m tests.bench.long_rows --tokens 131072 --ranks 1         (minutes)

A narrow model, so that a step on the CPU ends: 2 layers, 64 wide, of which one is sparse; everything but attention is
recomputed by layers (`model.recompute=layers_and_vision`). A segment begins with an image and ends in 1,000 targets.
Printed is the most that a process held in a forward and a backward pass, over what it held before (weights, the row),
on the rank that needed most, and the same per token of the row. In brackets is what PyTorch allocated, for one process:
among several, what gloo's threads free escapes its profiler. Every figure comes from processes of their own.
"""

import argparse
import json

import torch
import torch.distributed as dist

from data.batch import PackedBatch
from data.pack import collate
from ernie_model.model import ErnieModel
from tests.bench.memory import allocated_mib, reset_peak, status_mib
from tests.distributed.gloo import launch
from tests.train import small
from train.build import set_recompute
from train.config import ModelConfig, Recompute
from train.memory import keep_freed_memory
from train.policy import Policy, on_device

TOKENS = (8192, 16384, 32768, 65536)
SEGMENT = 4096
LEARNED = 1000
MODEL = small.CONFIG.replace(hidden_size=64, num_key_value_heads=2, head_dim=32, mrope_section=(6, 6, 4))


def row_of(tokens: int, segment: int) -> PackedBatch:
    return collate([small.example(i, segment, image=True, learned=LEARNED) for i in range(tokens // segment)])


def one_rank(tokens: int, segment: int) -> tuple[float, float | None]:
    """MiB that this rank's process held at most, and that PyTorch allocated, if that can be told."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    policy = Policy(ErnieModel(MODEL), loss_is_linear=True, sequence_group=group).train()
    set_recompute(policy.model, ModelConfig(config={}, processor="tiny", recompute=Recompute.layers_and_vision))

    def step(row: PackedBatch) -> None:
        batch, row_R = on_device(row, torch.device("cpu"), group)
        loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
        loss.backward()
        policy.zero_grad()

    step(row_of(LEARNED + 8, LEARNED + 8))  # what is made once
    row = row_of(tokens, segment)
    held = status_mib("VmRSS")
    reset_peak()
    step(row)
    process = status_mib("VmHWM") - held
    return process, None if group is not None else allocated_mib(lambda: step(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--segment", type=int, default=SEGMENT, help="tokens of a segment; 0 is the whole row")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2), help="processes that share the row")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        print(json.dumps(one_rank(args.tokens[0], args.segment)))
        return
    print(f"{'tokens':>9s}{'segment':>9s}" + "".join(f"{f'{n} rank(s), MiB':>20s}{'B/token':>16s}" for n in args.ranks))
    for tokens in args.tokens:
        segment, cells = args.segment or tokens, ""
        for ranks in args.ranks:
            command = ["-m", "tests.bench.long_rows", "--as-rank", "--tokens", str(tokens), "--segment", str(segment)]
            said = launch(ranks, *command, limit_s=3600, fresh=True)
            process, allocated = max(json.loads(output.splitlines()[-1]) for output in said)
            per_token = f"{process * 2**20 / tokens:,.0f}"
            if allocated is not None:
                per_token += f" ({allocated * 2**20 / tokens:,.0f})"
            cells += f"{process:20,.1f}{per_token:>16s}"
        print(f"{tokens:9,d}{segment:9,d}{cells}", flush=True)


if __name__ == "__main__":
    main()
