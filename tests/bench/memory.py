"""Peak memory of one training step at a large vocabulary:  python -m tests.bench.memory

The "small" model with vocabulary 103,424, one conversation of 4,096 tokens, float32, AdamW. Each side runs in a process
of its own; what is compared is the process's peak over what it held with torch imported and nothing built.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from tests.bench.models import SIZES, build_pair, packed, padded, random_segments
from train.policy import Policy, on_device


def status_mib(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) / 1024


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def allocated_mib(step: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> float:
    """The most that torch's CPU allocator holds at once while `step` runs, over what it held before.

    Args:
        prepare: runs first, and what it leaves behind counts.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        left = prepare() if prepare is not None else None
        with torch.profiler.record_function("allocated_mib"):
            step()
    del left
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    (began,) = (e.start_ns() for e in events if e.name() == "allocated_mib")
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())  # one instant: in order
    held = itertools.accumulate(e.nbytes() for e in events)  # pyright: ignore[reportAttributeAccessIssue]
    return max(bytes_ for bytes_, e in zip(held, events, strict=True) if e.start_ns() >= began) / 2**20


def one_step(side: str, tokens: int) -> dict[str, float]:
    torch.set_num_threads(2)
    import transformers  # noqa: F401  (both sides carry it)

    empty = status_mib("VmRSS")
    size = dataclasses.replace(SIZES["small"], vocabulary=103_424)
    theirs, ours = build_pair(size)
    segments = random_segments(size, [tokens])
    row, table = packed(segments, ours.config), padded(segments)
    model = ours if side == "ours" else theirs
    del ours, theirs
    policy = Policy(model, loss_is_linear=True) if side == "ours" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    reset_peak()
    for _ in range(2):
        if policy is not None:
            batch, row_R = on_device(row, torch.device("cpu"))
            loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
        else:
            loss = model(**table, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(loss=loss.item(), peak_mib=status_mib("VmHWM") - empty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--side", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_step(args.side, args.tokens)))
        return
    found = {}
    for side in ("transformers", "ours"):
        command = [sys.executable, "-m", "tests.bench.memory", "--side", side, "--tokens", str(args.tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side:13s} peak {found[side]['peak_mib']:8,.0f} MiB   loss after one update {found[side]['loss']:.4f}")
    print(f"ratio {found['ours']['peak_mib'] / found['transformers']['peak_mib']:.2f}")


if __name__ == "__main__":
    main()
