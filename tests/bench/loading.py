"""Host memory of every rank while it loads its share of a checkpoint: at most the share, one shard and one module.

python -m tests.bench.loading                     a table for 2 and 4 gloo ranks, of a 300 MB checkpoint
python -m tests.bench.loading FOLDER CASE         one rank of it, with RANK, WORLD_SIZE, ... as a launcher sets them

The kernel counts: the high-water mark of the process from just before loading, less what it had then. Pages of the
files count as long as they are open. A rank that shares its experts out under ZeRO-3 has one module whole for a moment.
"""

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_model.checkpoint import load_model, save_model
from ernie_model.expert_parallel import Shard
from ernie_model.model import ErnieModel
from tests.ernie_model.test_checkpoint_memory import CONFIG
from train.memory import give_back_freed_memory

MIB = 2**20
SHARD = 16 * MIB
MODEL = CONFIG.replace(num_hidden_layers=9, sparse_layers=tuple(range(1, 9)))


class Case(NamedTuple):
    world: int
    zero: int = 0
    expert: int = 1

    def __str__(self) -> str:
        return " ".join(filter(None, [f"ep{self.expert}" * (self.expert > 1), f"zero{self.zero}" * (self.zero > 0)]))


CASES = [Case(world, zero, expert) for world in (2, 4) for zero, expert in ((0, world), (3, 1), (3, 2))]


class Measured(NamedTuple):
    share: int
    """Bytes of this rank's part of the weights."""
    module: int
    """Bytes of the largest module, which is whole for a moment under ZeRO-3."""
    peak: int


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def part(tensor: Tensor) -> Tensor:
    return getattr(tensor, "ds_tensor", tensor)


def measure(folder: Path, case: Case) -> Measured:
    rank, settings, module = torch.distributed.get_rank(), {}, 0
    if case.expert > 1:
        from train.parallel.groups import expert_groups

        expert_groups(case.expert)
        settings["experts"] = Shard(rank % case.expert, case.expert)
    if case.zero == 3:
        from train.parallel.partition import partitioner

        settings["ready"] = partitioner({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    load_model(folder / "tiny", dtype=torch.float32, **settings)  # what is allocated once, and is not measured
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    with give_back_freed_memory() if case.zero == 3 else nullcontext():  # as build_model does
        model = load_model(folder / "model", dtype=torch.float32, **settings)
    peak = status("VmHWM") - before
    if case.zero == 3:
        sizes = [[p.ds_numel * 4 for p in m.parameters(recurse=False)] for m in model.modules()]  # pyright: ignore
        module = max(sum(size) for size in sizes)
    return Measured(sum(part(p).nbytes for p in model.parameters()), module, peak)


def prepare(folder: Path) -> None:
    with torch.device("meta"):
        model = ErnieModel(MODEL)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    save_model(model, folder / "model", max_shard_bytes=SHARD)
    save_model(ErnieModel(CONFIG.replace(vocab_size=8, num_hidden_layers=2, sparse_layers=(1,))), folder / "tiny")


def main() -> None:
    from tests.distributed.test_ranks import launch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        print(f"a checkpoint of {size / MIB:.0f} MiB in shards of {SHARD / MIB:.0f} MiB; MiB per rank, the largest\n")
        print(f"{'ranks':>5}  {'layout':12}{'share':>8}{'module':>8}{'peak':>8}{'bound':>8}")
        for number, case in enumerate(CASES):
            launch(case.world, "-m", "tests.bench.loading", str(folder), str(number), fresh=True)
            found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.world)]
            share, module, peak = (max(values) / MIB for values in zip(*found, strict=True))
            bound = share + module + SHARD / MIB
            print(f"{case.world:5}  {case!s:12}{share:8.0f}{module:8.0f}{peak:8.0f}{bound:8.0f}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        from accelerate import Accelerator

        from train.parallel.layout import start_deepspeed

        torch.set_num_threads(1)
        start_deepspeed(Accelerator(cpu=True))
        folder, case = Path(sys.argv[1]), CASES[int(sys.argv[2])]
        (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(measure(folder, case)))
