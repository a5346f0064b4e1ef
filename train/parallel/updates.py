"""How gradients become an update: the seam between the loop and whoever holds the training state.

    with updates.microbatch(last=...):       several, whose gradients add up; ranks meet in the last one
        updates.policy(...)  ──►  loss
        updates.backward(loss)
    updates.grad_norm()                      over all ranks and before clipping
    updates.step(...) or updates.drop()      gradients are gone after either

`Plain` is PyTorch's optimizer on whole weights, alone or under DDP.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from train.parallel.layout import Layout


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
    """One process, or DDP."""

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        layout: Layout | None = None,
    ):
        self.layout = layout or Layout(rank=accelerator.process_index, world=accelerator.num_processes)
        self.policy: nn.Module = accelerator.prepare_model(policy)
        self.optimizer = optimizer
        self._names = {p: name for name, p in policy.named_parameters() if p.requires_grad}
        self.names = list(self._names.values())
        self._norm: Tensor | None = None

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.policy, DistributedDataParallel) and not last:
            return self.policy.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for parameter in self._trained():
            if parameter.grad is not None:
                yield self._names[parameter], parameter.grad

    def grad_norm(self) -> Tensor:
        self._norm = get_total_norm([gradient for _, gradient in self.gradients()])
        return self._norm

    def step(self, max_norm: float, *, media: bool) -> None:
        assert self._norm is not None, "grad_norm comes first"
        for parameter in self._trained():
            # The moments of what nothing reached shrink as they do where ranks must always have a gradient (ZeRO).
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clip_grads_with_norm_(self._trained(), max_norm, self._norm)
        with resting(self.optimizer, media=media):
            self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


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
