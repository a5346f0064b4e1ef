"""Memory of the process: keeping what was freed, and how much is held."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step instead of giving them back to the kernel.

    A training step allocates the same sizes again and again. By default every large block is mapped afresh and its
    pages are zeroed by the kernel each time: up to a sixth of a CPU step (docs/speed.md). The price is
    memory: a heap has gaps that mapped blocks do not (train.footprint.HEAP_GAPS), and nothing is given back between
    steps. Nothing happens where there is no glibc.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return


@contextmanager
def give_back_freed_memory() -> Iterator[None]:
    """Inside, a freed block goes back to the kernel; afterwards it is kept again.

    For what passes through once: weights that come whole and stay in parts would leave gaps as large as themselves.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        keep_freed_memory()


def held_bytes() -> int | None:
    """What this process holds in memory now; None where the system doesn't tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
