"""ZeRO-3's partition of weights before there is an engine: a rank keeps its part of a module as soon as it is filled.

    module        allocate ── fill ── cut up ── the rest is free again     then the next module
    rank 0                             ├ 1/N ┤
    rank 1                                   ├ 1/N ┤                       so no rank ever holds the whole model

DeepSpeed's own `zero.Init` cuts up what is made inside of it, at random; weights from a file would need a second copy.
Imports DeepSpeed where it is used, which takes seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Partition = Callable[[nn.Module], None]


def partitioner(config: dict[str, Any]) -> Partition:
    """What `load_model` calls with every module that is filled. After the groups of the layout are made.

    Args:
        config: DeepSpeed's, as the engine gets it: says where the parts are kept.
    """
    import deepspeed

    from train.parallel.groups import tag_experts

    first: list[Any] = []

    def partition(module: nn.Module) -> None:
        """A module's own weights, not those of modules inside of it."""
        tag_experts(module)  # whom they are shared out among
        own = list(module.parameters(recurse=False))
        if own and not first:
            deepspeed.zero.Init(module=nn.ParameterList(own), config_dict_or_path=config)
            first.append(own[0])
        elif own:
            first[0].convert_to_zero_parameters(param_list=own)

    return partition


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module are whole, if ZeRO-3 has cut them up. All ranks enter and leave together."""
    parts = [parameter for parameter in module.parameters() if is_part(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


@contextmanager
def found_by_reading(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass of the bare model fetches weights that a module reads from another one, as layers with
    adapters do; afterwards ZeRO-3 knows of them. DeepSpeed's engine does so around its own passes alone."""
    modules = [module for module in model.modules() if hasattr(module._parameters, "_in_forward")]
    for module in modules:
        module._parameters._in_forward = True  # pyright: ignore[reportAttributeAccessIssue] DeepSpeed's own dictionary
    try:
        yield
    finally:
        for module in modules:
            module._parameters._in_forward = False  # pyright: ignore[reportAttributeAccessIssue]


def shape_of(tensor: Tensor) -> torch.Size:
    """Of the whole tensor, where ZeRO-3 has cut it up too: what is left in its place has no elements and one dimension.

    Of experts that are shared out, this rank's are the whole.
    """
    return getattr(tensor, "ds_shape", tensor.shape)


def is_part(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
