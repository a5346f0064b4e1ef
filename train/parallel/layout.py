"""Who this process is among those that were started, and whom it shares what with.

    world = 8, expert = 4                 rank   0 1 2 3 | 4 5 6 7
    experts of each pool, in quarters            0 1 2 3 | 0 1 2 3
    expert_group       share a layer's experts   {0 1 2 3} {4 5 6 7}        neighbours, so within one machine
    expert_data_group  hold the same experts     {0 4} {1 5} {2 6} {3 7}

Everything that is no expert is on all of them, or is cut up over all of them by ZeRO.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed import ProcessGroup

from train.config import ParallelConfig, UserError
from train.memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One process that does everything, until told otherwise."""

    rank: int = 0
    world: int = 1
    zero: int = 0
    """Stage of ZeRO; 0 is none."""
    expert: int = 1
    """Ranks of an expert group; 1 is none."""
    expert_rank: int = 0
    """This rank's place in its expert group."""
    expert_group: ProcessGroup | None = None
    expert_data_group: ProcessGroup | None = None
    sequence: int = 1
    """Ranks that share one packed row."""
    sequence_rank: int = 0
    sequence_group: ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """Which of the rows of an update are this rank's; the ranks that share a row have the same."""
        return self.rank // self.sequence

    @property
    def data_world(self) -> int:
        """Rows that are computed at once."""
        return self.world // self.sequence

    @property
    def lockstep(self) -> bool:
        """Every rank must give every trained parameter a gradient in every backward."""
        return self.zero > 0 or self.expert > 1

    @property
    def joint(self) -> bool:
        """Even a forward is a collective: all ranks run equally many."""
        return self.expert > 1 or self.zero == 3 or self.sequence > 1


def build_accelerator(config: ParallelConfig) -> Accelerator:
    """Find the other processes, if several were started.

    Raises:
        UserError: the launcher started other processes than were meant.
    """
    check_launcher(config, os.environ)
    meet_again(config, os.environ)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    # A rank without an image leaves the vision tower without gradients; DDP must look which parameters took part.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    # The model casts its own weights (model.compute_dtype), so accelerate's autocast stays off.
    wait = InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s))
    return Accelerator(cpu=config.cpu, mixed_precision="no", kwargs_handlers=[ddp, wait])


def check_launcher(config: ParallelConfig, environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, and says in no variable that it was to be two.

    Only by starting several does its other launcher number them; this one leaves no more than an address to meet at.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "accelerate launch was told to use DeepSpeed, with a configuration of its own; here parallel.* writes it "
            "(parallel=zero2), and on a CPU each process would believe itself alone. Launch without --use_deepspeed: "
            "--multi_gpu, or torchrun."
        )
    numbered = any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    alone = "ACCELERATE_USE_CPU" in environment and not numbered
    if alone and "MASTER_PORT" in environment and config.processes != 1:
        raise UserError(
            "accelerate launch was asked for several processes and started one: on a CPU it does, unless told "
            "--multi_gpu. Use --config_file launch/accelerate/multi_gpu.yaml --num_processes N with parallel.cpu=true, "
            "or torchrun. If one is meant, set parallel.processes=1."
        )


def meet_again(config: ParallelConfig, environment: Mapping[str, str]) -> None:
    """After a restart (--max_restarts) the launcher's store still tells where the ended processes were to be found.

    PyTorch reads it under the same names in every attempt; these get names of their own.
    """
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, world, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    timeout = timedelta(seconds=config.timeout_s)
    store = TCPStore(environment["MASTER_ADDR"], port, world, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo" if config.cpu or not torch.cuda.is_available() else "nccl",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def build_layout(config: ParallelConfig, accelerator: Accelerator) -> Layout:
    """Raises:
    UserError: the processes that were started cannot be laid out like this; DeepSpeed is missing.
    """
    world = accelerator.num_processes
    if config.processes not in (None, world):
        raise UserError(
            f"parallel.processes is {config.processes}, but {world} {'was' if world == 1 else 'were'} started. Start "
            "as many with accelerate launch or torchrun, or set parallel.processes=null."
        )
    if world % config.expert:
        raise UserError(
            f"parallel.expert is {config.expert}, which does not divide the {world} processes that were started: each "
            f"expert group needs as many. Start a multiple of {config.expert}, or set parallel.expert=1."
        )
    if world % config.sequence:
        raise UserError(
            f"parallel.sequence is {config.sequence}, which does not divide the {world} processes that were started: "
            f"that many share each row. Start a multiple of {config.sequence}, or set parallel.sequence=1."
        )
    layout = with_sequence_groups(
        Layout(rank=accelerator.process_index, world=world, zero=config.zero), config.sequence
    )
    if config.zero == 0 and config.expert == 1:
        return layout
    start_deepspeed(accelerator)
    if config.expert == 1:
        return layout
    from train.parallel.groups import expert_groups

    groups = expert_groups(config.expert)
    return replace(
        layout,
        expert=config.expert,
        expert_rank=layout.rank % config.expert,
        expert_group=groups.expert,
        expert_data_group=groups.expert_data,
    )


def with_sequence_groups(layout: Layout, sequence: int) -> Layout:
    """`sequence` neighbours share a row. All ranks call it."""
    if sequence == 1:
        return layout
    groups = [dist.new_group(list(range(at, at + sequence))) for at in range(0, layout.world, sequence)]
    return replace(
        layout,
        sequence=sequence,
        sequence_rank=layout.rank % sequence,
        sequence_group=groups[layout.rank // sequence],
    )


def start_deepspeed(accelerator: Accelerator) -> None:
    """Let DeepSpeed use the processes that accelerate has found."""
    if accelerator.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    if not dist.is_initialized():  # one process: accelerate starts no group, and DeepSpeed needs one
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(accelerator.local_process_index))
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "parallel.zero and parallel.expert need DeepSpeed, which is not installed. Install it with pip install "
            "'ernie-train[deepspeed]', or use parallel=ddp."
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Faster exchanges between CPU processes of one machine, for which it would compile a C++ file first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    world = deepspeed.comm.get_world_size()
    assert world == accelerator.num_processes, f"DeepSpeed sees {world} ranks, accelerate {accelerator.num_processes}"


GOODBYE_S = 0.2
"""For gloo's threads to let go of tensors; each takes microseconds of them."""


def leave() -> None:
    """Leave the other processes, at the end of a program. All ranks call it, when they have no more to tell each other.

    A thread of gloo holds the tensors of its last exchange until some moments after everybody has them, and to let go
    of them it needs Python's lock. If Python begins to go away meanwhile, the thread is ended inside a destructor and
    takes the process with it: "terminate called without an active exception", and the exit code of a run that failed.
    `destroy_process_group` would wait for a group's threads if nobody held the group any more, but DeepSpeed's
    parameters hold theirs to the end. So nobody holds the lock for a while.
    """
    if not dist.is_initialized():
        return
    if "gloo" in dist.get_backend():
        time.sleep(GOODBYE_S)
    dist.destroy_process_group()
