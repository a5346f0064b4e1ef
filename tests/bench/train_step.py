"""One training step against transformers:  python -m tests.bench.train_step [--size small] [--rounds 8]

Forward, backward and a fused AdamW update; the same weights, the same fresh tokens in every round, one process, one
thread, CPU seconds. transformers runs with the fastest of its expert back-ends; bfloat16 means float32 weights with a
bfloat16 forward on both sides (autocast there, `compute_dtype` here).

The suite tells the C library to keep freed memory (train/memory.py) and transformers doesn't; that is worth up to a
tenth to both. By default each side runs as its users run it; --allocator same gives transformers our setting too.
"""

import argparse
import contextlib
import math
from typing import NamedTuple

import torch

from data.batch import PackedBatch
from ernie_model.config import ErnieConfig
from ernie_model.flops import forward_flops, training_flops
from ernie_model.parts import Part
from tests.bench.models import SIZES, Size, build_pair, packed, padded, random_segments
from tests.bench.timing import Timing, default_allocator, in_turn, matmul_peak, ratio
from train.memory import keep_freed_memory
from train.policy import Policy, on_device


def lognormal_lengths(count: int, seed: int) -> list[int]:
    """Lengths of real conversations: lognormal around 330 tokens, cut to 64 .. 2048."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (5.8 + 0.9 * torch.randn(count, generator=generator)).exp()
    return drawn.clamp(64, 2048).long().tolist()


def step_flops(config: ErnieConfig, batch: PackedBatch) -> float:
    """FLOPs of the matrix products of one step in which everything trains; nothing recomputed counts."""
    learned = int((batch.weight_T > 0).sum())
    return training_flops(forward_flops(config, lengths=batch.lengths, grids=batch.grids, learned=learned), set(Part))


class Comparison(NamedTuple):
    tokens: float
    theirs: Timing
    ours: Timing
    flops: float


def compare(
    size: Size, segments, dtype: torch.dtype, rounds: int, backends: list[str], same_allocator: bool
) -> Comparison:
    """Time one setting; `theirs` is the expert back-end that was fastest."""
    theirs, ours = build_pair(size)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    ours.compute_dtype = dtype
    policy = Policy(ours, loss_is_linear=True)
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (theirs, ours)}
    batches = [segments(number) for number in range(rounds + 2)]
    rows = [packed(b, ours.config) for b in batches]
    tables = [padded(b) for b in batches]

    def loss_ours(number: int) -> torch.Tensor:
        batch, row_R = on_device(rows[number], torch.device("cpu"))
        return -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()

    def loss_theirs(number: int) -> torch.Tensor:
        with autocast:
            return theirs(**tables[number], use_cache=False).loss

    def step(model, loss) -> None:
        loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    def their_step(backend: str):
        def run(number: int) -> None:
            (keep_freed_memory if same_allocator else default_allocator)()
            theirs.set_experts_implementation(backend)
            step(theirs, loss_theirs(number))

        return run

    with torch.no_grad():
        first = loss_ours(0).item(), loss_theirs(0).item()
    # float32: rounding. bfloat16: autocast rounds elsewhere; a mean over 2,000 tokens still agrees to a part in 1,000.
    assert math.isclose(*first, rel_tol=1e-5 if dtype == torch.float32 else 1e-3), f"the losses differ: {first}"

    def our_step(number: int) -> None:
        keep_freed_memory()
        step(ours, loss_ours(number))

    timings = in_turn([our_step, *map(their_step, backends)], rounds)
    return Comparison(
        tokens=sum(r.num_tokens for r in rows[2:]) / rounds,
        theirs=min(timings[1:], key=lambda t: t.median),
        ours=timings[0],
        flops=sum(step_flops(ours.config, r) for r in rows[2:]) / rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--data", default="text,image,packed")
    parser.add_argument("--dtype", default="fp32,bf16")
    parser.add_argument("--conversations", type=int, default=8, help="in a batch of --data packed")
    parser.add_argument("--allocator", default="own", choices=["own", "same"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[args.size]
    kinds = {
        "text": lambda number: random_segments(size, [512] * 4, seed=number),
        "image": lambda number: random_segments(size, [512] * 4, image_side=16, seed=number),
        "packed": lambda number: random_segments(size, lognormal_lengths(args.conversations, number), seed=number),
    }
    print("| data | dtype | transformers tokens/s | ours tokens/s | ratio | transformers' share of peak | ours |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.data.split(","):
        for name in args.dtype.split(","):
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            # padded batches are several times larger: fewer rounds, and the loop over experts is no faster there
            rounds, backends = (args.rounds, ["grouped_mm", "eager"]) if kind != "packed" else (4, ["grouped_mm"])
            found = compare(size, kinds[kind], dtype, rounds, backends, args.allocator == "same")
            peak = matmul_peak(dtype)
            slow, fast = found.theirs.median, found.ours.median
            print(
                f"| {kind} | {name} | {found.tokens / slow:,.0f} | {found.tokens / fast:,.0f} "
                f"| {ratio(found.theirs, found.ours):.2f} "
                f"| {found.flops / slow / peak:.2f} | {found.flops / fast / peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
