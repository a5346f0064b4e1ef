"""DeepSpeed's expert groups, and what its engine must be told about experts that lie on several ranks.

    expert_groups(4)        who shares the experts of a layer, and who holds the same ones (layout.py has the picture)
    tag_experts(model)      every expert shard is summed and cut up among those who hold the same experts,
                            not over the world: untagged, rank 0's experts would be copied over everybody's
    announce(policy, zero)  one empty module that makes the engine look at the tags

The only file that reaches into DeepSpeed's private parts; tests/distributed/test_groups.py holds each of them to what
is relied on. Imports DeepSpeed, which takes seconds, so it is imported only where a layout needs it.
"""

from typing import NamedTuple

import deepspeed
from torch import nn
from torch.distributed import ProcessGroup

from ernie_model.expert_parallel import WHOLE, shard_of
from train.config import UserError

try:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    make_groups = groups._create_expert_and_data_parallel
    expert_group, expert_data_group = groups._get_expert_parallel_group, groups._get_expert_data_parallel_group
except (ImportError, AttributeError) as error:
    raise UserError(
        f"deepspeed {deepspeed.__version__} has other expert groups than this suite knows ({error}). Install the "
        "version that constraints.txt names."
    ) from error


class ExpertGroups(NamedTuple):
    expert: ProcessGroup
    """The ranks that share the experts of a layer: neighbours."""
    expert_data: ProcessGroup
    """The ranks that hold the same experts as this one."""


def expert_groups(size: int) -> ExpertGroups:
    """Every rank must ask, after `deepspeed.init_distributed`. Asking again gives the same groups."""
    make_groups(size)
    return ExpertGroups(expert_group(_name(size)), expert_data_group(_name(size)))


def _name(size: int) -> str:
    return f"ep_size_{size}"  # DeepSpeed's own, by which it finds the groups again


def tag_experts(model: nn.Module) -> None:
    """Tag every expert shard, adapters too, trained or frozen. After `expert_groups` and before the engine is made."""
    for parameter in model.parameters():
        if (shard := shard_of(parameter)) != WHOLE:
            name = _name(shard.of)
            tags = {
                "allreduce": False,  # "is an expert": ZeRO-1 and 2, and the broadcast at the start
                "group_name": name,
                "ds_zero_placement_family": "autoep_expert",  # the same for ZeRO-3
                "ds_zero_partition_group_name": name,
                # for weights that are cut up as they are made (zero.Init), before the engine could look them up
                "ds_zero_partition_process_group": expert_data_group(name),
            }
            for tag, value in tags.items():
                setattr(parameter, tag, value)


def announce(policy: nn.Module, zero: int) -> None:
    """Make the engine look at the tags, which it does in a model with a module of DeepSpeed's own kind.

    ZeRO-1 and 2 refuse such a model without trained experts, and need nothing then: frozen ones have no gradients.
    ZeRO-3 cuts up frozen weights too.
    """
    shards = [parameter for parameter in policy.parameters() if shard_of(parameter) != WHOLE]
    if any(parameter.requires_grad or zero == 3 for parameter in shards):
        policy.add_module("has_expert_shards", _HasExpertShards())


class _HasExpertShards(AutoEPMoELayer):
    """Only its class is looked at. Without weights it leaves no name in the model's state, and nobody calls it."""

    num_experts = 0  # the engine lists it, for checkpoints of its own

    def __init__(self):
        nn.Module.__init__(self)  # not the parent's, which would replace a layer

    def set_deepspeed_parallelism(self, *_, **__) -> None:
        """The groups exist (`expert_groups`)."""
