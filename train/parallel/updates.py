"""How gradients become an update: the seam between the loop and whoever holds the training state.

    with updates.microbatch(last=...):       several, whose gradients add up; ranks meet in the last one
        updates.policy(...)  ──►  loss
        updates.backward(loss)
    updates.grad_norm()                      over all ranks and before clipping
    updates.step(...) or updates.drop()      gradients are gone after either

`Plain` is PyTorch's optimizer, alone or under DDP; zero.py has DeepSpeed's engine.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ernie_model.expert_parallel import WHOLE, shard_of
from train.parallel.layout import Layout
from train.policy import Policy


class Updates(Protocol):
    policy: nn.Module
    """What the forward pass goes through."""
    optimizer: torch.optim.Optimizer
    """Its groups have the learning rates."""
    layout: Layout
    names: list[str]
    """Of the parameters that train, in the policy."""

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and the backward pass of each micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients up. Ranks average theirs."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each parameter's gradient; every element is held somewhere."""
        ...

    def grad_norm(self) -> Tensor:
        """Of the whole gradient, equal on all ranks; a number on the device."""
        ...

    def step(self, max_norm: float, *, media: bool) -> None:
        """Clip and update.

        Args:
            media: some rank has had an image or a video. Without any, what only media reach stays as it is.
        """
        ...

    def drop(self) -> None:
        """Leave the update out."""
        ...


class Plain:
    """One process, or DDP. Experts that are shared out are summed here, over the ranks that hold the same ones."""

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        layout: Layout | None = None,
    ):
        self.layout = layout or Layout(rank=accelerator.process_index, world=accelerator.num_processes)
        self.optimizer = optimizer
        trained = {p: name for name, p in policy.named_parameters() if p.requires_grad}
        self.names = list(trained.values())
        self._whole = {p: name for p, name in trained.items() if shard_of(p) == WHOLE}
        self._shards = {p: name for p, name in trained.items() if shard_of(p) != WHOLE}
        # Frozen ones too: at the start DDP copies rank 0's values to everybody.
        shards = [name for name, p in policy.named_parameters() if shard_of(p) != WHOLE]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, shards)
        # DDP wants something to do: with adapters on experts alone there is nothing.
        self.policy: nn.Module = accelerator.prepare_model(policy) if self._whole else policy.to(accelerator.device)
        self._norm: Tensor | None = None

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        ddp = self.policy if isinstance(self.policy, DistributedDataParallel) else None
        with nullcontext() if last or ddp is None else ddp.no_sync():
            yield
        if last and self._shards:
            self._sum_shards()

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # or nothing that trains was used: adapters of vision experts, and no rank has media
            loss.backward()

    def _sum_shards(self) -> None:
        """Rows of every rank of the expert group have come here, so this is the rest of the average over the world."""
        for parameter in self._shards:
            assert parameter.grad is not None, "join=True gives every weight a gradient on every rank"
            dist.all_reduce(parameter.grad, group=self.layout.expert_data_group)
            parameter.grad /= self.layout.world

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for parameter, name in (self._whole | self._shards).items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def grad_norm(self) -> Tensor:
        norm = get_total_norm([p.grad for p in self._whole if p.grad is not None])
        if self._shards:
            square = get_total_norm([p.grad for p in self._shards if p.grad is not None]).square()
            dist.all_reduce(square, group=self.layout.expert_group)
            norm = (norm.square() + square).sqrt()
        self._norm = norm
        return norm

    def step(self, max_norm: float, *, media: bool) -> None:
        assert self._norm is not None, "grad_norm comes first"
        trained = [*self._whole, *self._shards]
        for parameter in trained:
            # The moments of what nothing reached shrink as they do where ranks must always have a gradient (ZeRO).
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clip_grads_with_norm_(trained, max_norm, self._norm)
        with resting(self.optimizer, media=media):
            self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None


@contextmanager
def resting(optimizer: torch.optim.Optimizer, *, media: bool) -> Iterator[None]:
    """Without media, what only media reach has a learning rate of 0: neither momentum nor decay moves it."""
    groups = [] if media else [group for group in optimizer.param_groups if group.get("media")]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def build_updates(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    layout: Layout,
    settings: dict[str, Any],
) -> Updates:
    """Args:
    settings: DeepSpeed's (`deepspeed_config`), for ZeRO.
    """
    if layout.zero == 0:
        return Plain(policy, optimizer, accelerator, layout)
    from train.parallel.zero import Zero  # DeepSpeed takes seconds to import

    return Zero(policy, optimizer, layout, settings)
