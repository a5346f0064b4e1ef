"""DeepSpeed's ZeRO engine as `Updates`.

    parallel.zero   1   optimizer state in shares      2   gradients too      3   weights too

    policy ──► engine ──► backward ──► averaged gradients, in shares ──► norm ──► clip, AdamW on the shares ──► weights

The engine gets PyTorch's AdamW in our groups and does what is left: cutting up, summing, clipping, gathering. It counts
no micro-batches and scales no loss: the loop has divided already.

DeepSpeed takes seconds to import, so this file is imported only where parallel.zero asks for it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from ernie_model.expert_parallel import WHOLE, shard_of
from train.parallel.groups import announce, tag_experts
from train.parallel.layout import Layout
from train.parallel.updates import resting
from train.policy import Policy


class Zero:
    """DeepSpeed's engine.

    Args:
        policy: on the device. Its parameters become views of shared buffers (ZeRO 1, 2) or empty (ZeRO 3).
        optimizer: AdamW; the engine puts shares in the place of its parameters.
    """

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, layout: Layout, config: dict[str, Any]):
        self.layout = layout
        self._parameters: dict[str, Any] = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.names = list(self._parameters)
        if layout.expert > 1:
            tag_experts(policy)
            announce(policy, layout.zero)
            for group in optimizer.param_groups:
                if shard_of(group["params"][0]) != WHOLE:
                    # by the name it finds the ranks to sum over
                    group |= {"moe": True, "name": group["params"][0].group_name}
        # Any: their classes say little of what is used here; tests hold it.
        self.policy: Any
        self.optimizer: Any
        self.policy, self.optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=config, dist_init_required=False
        )
        if layout.zero == 3:
            # The policy multiplies by the head itself, outside its module.
            deepspeed.zero.register_external_parameter(policy, policy.model.head_VD)
        self._norm: Tensor | None = None

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self.policy.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.policy.backward(loss)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            if self.layout.zero == 3:
                yield name, safe_get_local_grad(parameter)
            elif (mapping := parameter._hp_mapping) is not None:
                yield name, mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def grad_norm(self) -> Tensor:
        if self.layout.zero == 3:
            norm: Tensor = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        self._norm = norm
        return norm  # infinite where any part of it is not finite

    def step(self, max_norm: float, *, media: bool) -> None:
        assert self._norm is not None, "grad_norm comes first"
        assert max_norm == self.policy.gradient_clipping(), "the engine was built with another one"
        with self._told(self._norm), resting(self.optimizer, media=media):
            self.policy.step()

    def drop(self) -> None:
        assert self._norm is not None, "grad_norm comes first"
        with self._told(torch.full_like(self._norm, math.inf)):
            if self.layout.zero < 3:
                self.optimizer.check_grad_overflow = True  # or bfloat16 weights would be updated all the same
            self.policy.step()  # which clears everything and updates nothing

    @contextmanager
    def _told(self, norm: Tensor) -> Iterator[None]:
        """While it lasts, the engine takes this for the norm. It is known already; an infinite one drops an update."""
        zero = self.optimizer
        zero.scaled_global_norm, zero._get_norm_groups = lambda: norm, lambda: [norm]
        try:
            yield
        finally:
            del zero.scaled_global_norm, zero._get_norm_groups
            zero.check_grad_overflow = False
            self._norm = None


def fetch_parts(policy: Policy, layout: Layout, config: dict[str, Any]) -> list[Any]:
    """Let a policy that nobody trains fetch its weights module by module, as ZeRO-3's engine lets the one that trains.

    Args:
        config: the engine's.

    Returns:
        The small parameters that are kept whole, beside their parts.
    """
    if layout.expert > 1:
        tag_experts(policy)
        announce(policy, layout.zero)
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    settings = config | {"zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=policy, config=settings, dist_init_required=False)
    deepspeed.zero.register_external_parameter(policy, policy.model.head_VD)
    fetcher: Any = engine.optimizer
    return fetcher.persistent_parameters
