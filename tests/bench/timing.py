"""Timing on noisy machines: one thread, CPU seconds of this process, the competitors in turn, ratios pair by pair."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from train.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def default_allocator() -> None:
    """What glibc's defaults amount to after a few steps: its thresholds grow to 32 and 64 MiB and stay there."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


class Timing(NamedTuple):
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turn(runs: Sequence[Callable[[int], object]], rounds: int, warm_up: int = 2) -> list[Timing]:
    """Run each of `runs` once per round; they get the round's number, so that every round can bring a fresh batch."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(warm_up + rounds):
        for run, found in zip(runs, seconds, strict=True):
            gc.collect()
            start = time.process_time()
            run(number)
            if number >= warm_up:
                found.append(time.process_time() - start)
    return [Timing(found) for found in seconds]


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over rounds of slow / fast: a neighbour's burst hits both runs of a round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of many square products."""
    best = 0.0
    for size in (512, 1024):
        a, b = torch.randn(2, size, size).to(dtype).unbind()
        out = torch.empty(size, size, dtype=dtype)
        for _ in range(12):
            start = time.process_time()
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.process_time() - start))
    return best
