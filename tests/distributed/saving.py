"""Two ranks save together while something goes wrong on one of them; test_saving.py runs it.

python -m tests.distributed.saving FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.train import small
from train import checkpoint
from train.config import UserError
from train.parallel.layout import leave
from train.weights import AllWeights


@contextmanager
def broken(rank: int, name: str, error: Exception) -> Iterator[None]:
    """What `checkpoint.NAME` does on one rank is to fail."""

    def fail(*_: Any) -> None:
        raise error

    if dist.get_rank() == rank:
        with patch.object(checkpoint, name, fail):
            yield
    else:
        yield


@contextmanager
def another_disk(rank: int) -> Iterator[None]:
    """One rank's folders are not those that rank 0 makes."""
    if dist.get_rank() == rank:
        with patch.object(Path, "is_dir", lambda path: not path.name.endswith(".partial")):
            yield
    else:
        yield


FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {
    "rank 1 has no room": lambda: broken(1, "write_pieces", FULL),
    "rank 0 has no room": lambda: broken(0, "write_pieces", FULL),
    "rank 0 cannot seal": lambda: broken(0, "save_file", OSError(errno.EIO, "Input/output error")),
    "rank 1 sees another disk": lambda: another_disk(1),
}


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> dict[str, Any]:
    root, rank = folder / "checkpoints", dist.get_rank()
    policy = small.policy(seed=0)
    weights, optimizer = AllWeights(policy.model), small.optimizer(policy)

    def save(step: int) -> None:
        checkpoint.save(root, step, weights=weights, optimizer=optimizer, state={}, keep=5)

    save(1)
    results: dict[str, Any] = {}
    for name, fault in FAULTS.items():
        with fault():
            results[name] = said(lambda: save(2))
        results[f"left by: {name}"] = sorted(path.name for path in root.iterdir())
    with broken(1, "write_pieces", ValueError("a mistake in the program")):
        try:
            save(2)
        except (UserError, ValueError) as error:
            results["a mistake"] = f"{type(error).__name__}: {error}"
    save(2)

    results["looks elsewhere"] = said(lambda: checkpoint.newest_undamaged(root if rank == 0 else folder / "elsewhere"))
    dist.barrier()
    for index in (0, 1):  # whichever rank reads it, both know
        shard = root / "step-000002" / checkpoint.shard_name(index)
        whole = shard.read_bytes()
        dist.barrier()
        if rank == 0:
            shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        dist.barrier()
        found, problems = checkpoint.newest_undamaged(root)
        results[f"damage {index}"] = [found and found.name, {path.name: text for path, text in problems.items()}]
        dist.barrier()
        if rank == 0:
            shard.write_bytes(whole)
        dist.barrier()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(main(folder)))
    leave()
