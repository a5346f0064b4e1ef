"""What saving and loading take beside the training state, on each of two ranks; test_saving_memory.py runs it.

python -m tests.distributed.saving_memory FOLDER      with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ernie_model.model import ErnieModel
from tests.distributed.reshard import LAYOUTS, ROWS, WHAT, Trained
from tests.train import small
from train import checkpoint
from train.parallel.layout import leave

# 26 M parameters, nearly all of them in experts: 105 MB of weights, 315 MB of training state.
CONFIG = small.CONFIG.replace(
    hidden_size=512, intermediate_size=64, num_experts=8, text_expert_width=1024, vision_expert_width=1024
)
NAMES = ("zero2 x2", "ep2 zero3 x2")


def status(key: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def peak_of(act: Callable[[], object]) -> int:
    """How far the resident memory rises above where it begins."""
    dist.barrier()
    ctypes.CDLL(None).malloc_trim(0)  # or what training has freed would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    act()
    return status("VmHWM") - before


def measure(name: str, folder: Path) -> dict[str, int]:
    torch.manual_seed(0)
    run = Trained(LAYOUTS[name], WHAT["all"], model=ErnieModel(CONFIG))
    run.save(folder / name, 0)  # imports and first-use allocations are not what is measured; no moments yet
    run.losses(ROWS[:1])
    saving = peak_of(lambda: run.save(folder / name, 1))
    path = checkpoint.folder_of(folder / name, 1)
    share = (path / checkpoint.shard_name(run.rank)).stat().st_size
    return {"saving": saving, "loading": peak_of(lambda: run.load(path)), "share": share}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    mine = {name: measure(name, folder) for name in NAMES}
    found = checkpoint.everyones(mine)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    leave()
