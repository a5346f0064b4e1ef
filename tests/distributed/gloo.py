"""What several gloo processes on this machine must be told, so that they find each other."""

import os
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environments(world: int) -> list[dict[str, str]]:
    """The environment of each rank, as `accelerate launch` would set it, on a port that was free just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    everyone = {
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    return [os.environ | everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
