"""Who this process is among those that were started, and whom it shares what with.

    world = 8, expert = 4                 rank   0 1 2 3 | 4 5 6 7
    experts of each pool, in quarters            0 1 2 3 | 0 1 2 3
    expert_group       share a layer's experts   {0 1 2 3} {4 5 6 7}        neighbours, so within one machine
    expert_data_group  hold the same experts     {0 4} {1 5} {2 6} {3 7}

Everything that is no expert is on all of them, or is cut up over all of them by ZeRO.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
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
    def lockstep(self) -> bool:
        """Every rank must give every trained parameter a gradient in every backward."""
        return self.zero > 0 or self.expert > 1

    @property
    def joint(self) -> bool:
        """Even a forward is a collective: all ranks run equally many."""
        return self.expert > 1 or self.zero == 3 or self.sequence > 1


def build_accelerator(config: ParallelConfig) -> Accelerator:
    """Find the other processes, if several were started."""
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    # A rank without an image leaves the vision tower without gradients; DDP must look which parameters took part.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    # The model casts its own weights (model.compute_dtype), so accelerate's autocast stays off.
    return Accelerator(cpu=config.cpu, mixed_precision="no", kwargs_handlers=[ddp])


def build_layout(config: ParallelConfig, accelerator: Accelerator) -> Layout:
    """Raises:
    UserError: the processes that were started cannot be laid out like this.
    """
    world = accelerator.num_processes
    if config.processes not in (None, world):
        raise UserError(
            f"parallel.processes is {config.processes}, but {world} {'was' if world == 1 else 'were'} started. Start "
            "as many with accelerate launch or torchrun, or set parallel.processes=null."
        )
    return Layout(rank=accelerator.process_index, world=world)
