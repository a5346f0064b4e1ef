"""Several gloo processes on this machine: what they must be told, and how they are run with a time limit."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.programs import Program

ROOT = Path(__file__).resolve().parents[2]


def environments(world: int) -> list[dict[str, str]]:
    """The environment of each rank, as `accelerate launch` would set it, on a port that was free just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    everyone = {
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stack of every thread
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    return [os.environ | everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def launch(world: int, *arguments: str, limit_s: float = 240.0, fresh: bool = False) -> list[str]:
    """Run a Python program as `world` ranks, as `accelerate launch` would. What each rank printed.

    Args:
        limit_s: after as many seconds ranks that still run are taken to wait for each other for ever.
        fresh: each rank is a start of Python: for those whose time or memory is measured. Else see tests/programs.py.

    Raises:
        AssertionError: a rank failed, or the time was over: with everything they printed and where they stood.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"rank-{rank}.txt" for rank in range(world)]
        ranks = []
        for rank, (environment, path) in enumerate(zip(environments(world), said, strict=True)):
            with path.open("w") as output:
                start = partial(subprocess.Popen, [sys.executable, *arguments])
                start = start if fresh else partial(Program, arguments, nursery=rank)
                ranks.append(start(cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
        deadline, hangs = time.monotonic() + limit_s, False
        try:
            # As a launcher does: when one rank fails, the others would wait for it for ever.
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if hangs := time.monotonic() > deadline:
                    for rank in ranks:
                        rank.send_signal(signal.SIGABRT)
                    for rank in ranks:
                        rank.wait(20)
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()
        printed = [path.read_text() for path in said]
    if hangs or any(rank.returncode for rank in ranks):
        what = f"the ranks still ran after {limit_s:g} seconds" if hangs else "a rank failed"
        each = [f"--- rank {rank} of {world}\n{text}" for rank, text in enumerate(printed)]
        raise AssertionError("\n".join([f"{' '.join(arguments)}: {what}", *each]))
    return printed
