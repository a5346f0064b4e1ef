"""Experts of a layer shared out among ranks, and the rows that travel to them and back.

    E = 8 experts of a pool, 4 ranks        rank    0     1     2     3
                                            holds  0 1   2 3   4 5   6 7

Consecutive experts, the same of both pools, so every expert tensor of a rank is one contiguous part of the tensor that
a single process holds. `Shard` says which part; a parameter that is one carries it as its `shard`.

`ExpertParallel` replaces `route_local` (moe.py). Rows are sorted once, by rank, pool and expert, so that one exchange
each way serves both pools:

    x_TD ── sort ── send ═════════════► regroup ── my text experts ───┬── send back ═════► weigh, add ── + ── y_TD
      │             counts, then rows           └─ my vision experts ─┘                                  │
      └───────────── shared experts, while the rows are under way ───────────────────────────────────────┘

No row is dropped and none is padded on the way: every rank tells every other how many to expect. A rank with nothing
to send, or nothing to compute, takes part all the same, forwards and backwards. The results are those of `route_local`
to the order in which the gradient of a weight is summed.

Shape letters:  T tokens   D model width   K experts per token   E experts of a pool   N ranks
                X experts of both pools on one rank   R rows, grouped by expert   S rows as they travel, grouped by rank
Source: reference 2.8, 2.9.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ernie_model.layers import SwiGLU
from ernie_model.moe import Experts, MoE, Routing, Rows, combine, dispatch, row_multiple, sort_by_expert


@dataclass(frozen=True)
class Shard:
    """The part `index` of `of` equal parts along dimension 0."""

    index: int
    of: int

    def __post_init__(self):
        if not 0 <= self.index < self.of:
            raise ValueError(f"there is no part {self.index} of {self.of}.")

    def part_of(self, count: int) -> slice:
        """Which of `count` entries it is.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if count % self.of:
            raise ValueError(f"{count} experts cannot be shared out evenly among {self.of} ranks.")
        each = count // self.of
        return slice(self.index * each, (self.index + 1) * each)


WHOLE = Shard(0, 1)


def shard_of(tensor: Tensor) -> Shard:
    """Which part of the whole tensor this is; `WHOLE` for most."""
    return getattr(tensor, "shard", WHOLE)


def shard_experts(model: nn.Module, shard: Shard) -> None:
    """Cut the experts of both pools of every layer, in memory or on the meta device, to a rank's share, and mark them.

    The layers cannot run before `connect_experts`.

    Raises:
        ValueError: the experts cannot be shared out evenly.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            part = shard.part_of(module.num_experts)
            for name, whole in list(module.named_parameters(recurse=False)):
                # clone: a view would keep the whole tensor in memory
                setattr(module, name, nn.Parameter(whole.detach()[part].clone(), requires_grad=whole.requires_grad))
            module.num_experts = part.stop - part.start
        if isinstance(module, MoE) and shard != WHOLE:
            module.route = not_connected
    mark_experts(model, shard)


def mark_experts(model: nn.Module, shard: Shard) -> None:
    """Say of every expert parameter which part it is. Needed again after `to_empty`, which makes new parameters."""
    for module in model.modules():
        if isinstance(module, Experts):
            for parameter in module.parameters(recurse=False):
                mark(parameter, shard)


def mark(tensor: Tensor, shard: Shard) -> None:
    """What `shard_of` will say of it."""
    if shard != WHOLE:
        tensor.shard = shard  # pyright: ignore[reportAttributeAccessIssue]


# ------------------------------------------------------------------------------------------------------------- the way


def connect_experts(model: nn.Module, group: dist.ProcessGroup) -> "list[ExpertParallel]":
    """Let every layer send its rows over `group`, whose rank r holds `Shard(r, size)`: one route for each MoE layer."""
    routes = []
    for module in model.modules():
        if isinstance(module, MoE):
            here, there = module.text.experts.num_experts, dist.get_world_size(group)
            if here * there != module.num_experts:
                raise ValueError(f"{there} ranks with {here} experts each do not hold {module.num_experts} experts.")
            module.route = ExpertParallel(group)
            routes.append(module.route)
    return routes


def not_connected(*_: object) -> Tensor:
    raise RuntimeError("the experts lie on several ranks: connect_experts must come before the first forward.")


class ExpertParallel:
    """The route of one layer. Every rank of the group must call it equally often, forwards and backwards."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sent_bytes = 0
        """To other ranks, in forward and backward passes: rows, not their counts (8 bytes per expert)."""
        self.computed_rows = 0
        """By this rank's experts, in forward passes."""

    def __call__(
        self, x_TD: Tensor, routing: Routing, text: Experts, vision: Experts | None, shared: SwiGLU | None
    ) -> Tensor:
        pools = 1 if vision is None else 2
        slots = self.slots(routing.expert_TK, text.num_experts, pools)
        # By slot, not by expert: where the text pool ends (`rows.num_text`) means nothing here.
        rows = sort_by_expert(routing._replace(expert_TK=slots), self.size * pools * text.num_experts)
        sent_NX = rows.count_X.view(self.size, -1)
        came_NX = torch.empty_like(sent_NX)
        dist.all_to_all_single(came_NX, sent_NX, group=self.group)
        x_SD = dispatch(x_TD, rows)  # before the wait, so that a GPU has something to do
        came_X = _round_up(came_NX.sum(0), row_multiple(x_TD))
        # The only wait for the device: how many rows go to and come from every rank, and how many each pool has here.
        lengths = torch.cat((sent_NX.sum(1), came_NX.sum(1), came_X.view(pools, -1).sum(1))).tolist()
        sent, came, in_pools = lengths[: self.size], lengths[self.size : -pools], lengths[-pools:]
        self.computed_rows += sum(came)

        trip = Trip(self, sent, came)
        sent_off = _Send.apply(x_SD, trip)
        del x_SD  # freed as soon as it has left
        shared_TD = None if shared is None else shared(x_TD)
        arrived = regrouping(came_NX, came_X, sum(came), in_pools[0], sum(in_pools))
        y_RD = _compute(_Receive.apply(sent_off, trip, arrived), arrived, text, vision)
        y_TD = combine(_SendBack.apply(y_RD, trip, arrived), routing.weight_TK, rows)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def slots(self, expert_TK: Tensor, local: int, pools: int) -> Tensor:
        """Expert numbers in the order of travel: by rank, then pool, then place on the rank.

        E = 4, 2 ranks:  expert  0 1 2 3 | 4 5 6 7   ->   slot  0 1 4 5 | 2 3 6 7
        """
        pool_TK, inside_TK = expert_TK // (local * self.size), expert_TK % (local * self.size)
        return inside_TK // local * (pools * local) + pool_TK * local + inside_TK % local


def _compute(x_RD: Tensor, rows: Rows, text: Experts, vision: Experts | None) -> Tensor:
    """Both pools always, rows or not: another rank may have some, and ranks sum the gradients of weights together."""
    if vision is None:
        return text(x_RD, rows.count_X)
    x_text, x_vision = x_RD.split([rows.num_text, x_RD.shape[0] - rows.num_text])
    count_text, count_vision = rows.count_X.chunk(2)
    return torch.cat((text(x_text, count_text), vision(x_vision, count_vision)))


def _round_up(count_X: Tensor, multiple: int) -> Tensor:
    return count_X if multiple == 1 else (count_X + multiple - 1) // multiple * multiple


def regrouping(came_NX: Tensor, padded_X: Tensor, travelled: int, num_text: int, num_rows: int) -> Rows:
    """Rows lie by rank, then expert, and the experts need them by expert: where each comes from and goes to.

    A row that came is a token with one choice. Built where the counts are, without waiting for them.
    """
    device, count = came_NX.device, came_NX.flatten()
    row_S = torch.arange(travelled, device=device)
    part_S = torch.repeat_interleave(torch.arange(count.shape[0], device=device), count, output_size=travelled)
    first = count.cumsum(0) - count  # of each part, as it came
    goes_NX = padded_X.cumsum(0) - padded_X + came_NX.cumsum(0) - came_NX  # first of each part, by expert
    place_S = row_S + (goes_NX.flatten() - first)[part_S]
    came_R = row_S.new_zeros(num_rows).index_copy_(0, place_S, row_S)
    return Rows(came_R, place_S[:, None], padded_X, num_text)


class Trip:
    """One exchange of rows between the ranks of a group, and whichever collective of it is under way."""

    def __init__(self, route: ExpertParallel, sent: list[int], came: list[int]):
        self.route, self.sent, self.came = route, sent, came
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def start(self, x_SD: Tensor, *, back: bool = False) -> None:
        """Give rows away. `back`: from the experts to the tokens."""
        outgoing, incoming = (self.came, self.sent) if back else (self.sent, self.came)
        arriving_SD = x_SD.new_empty(sum(incoming), x_SD.shape[1])
        work = dist.all_to_all_single(
            arriving_SD, x_SD.contiguous(), incoming, outgoing, group=self.route.group, async_op=True
        )
        assert work is not None
        self._under_way = work, arriving_SD
        away = sum(outgoing) - outgoing[self.route.rank]
        self.route.sent_bytes += away * x_SD.shape[1] * x_SD.element_size()

    def finish(self) -> Tensor:
        """The rows that came instead."""
        assert self._under_way is not None
        work, arriving_SD = self._under_way
        self._under_way = None
        work.wait()
        return arriving_SD


class _Send(torch.autograd.Function):
    """Rows on their way to the experts.

    What autograd sees between here and `_Receive` is a tensor without elements: nobody can read rows that are not yet
    there, nor gradients, which are under way from `_Receive` to here while the shared experts compute theirs.
    """

    @staticmethod
    def forward(ctx, x_SD, trip):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip = trip
        trip.start(x_SD)
        return x_SD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.trip.finish(), None


class _Receive(torch.autograd.Function):
    """Wait for the rows and lay them out by expert."""

    @staticmethod
    def forward(ctx, sent, trip, arrived):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip = trip
        ctx.save_for_backward(arrived.place_TK)
        return trip.finish().index_select(0, arrived.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):  # pyright: ignore[reportIncompatibleMethodOverride]
        (place_S1,) = ctx.saved_tensors
        ctx.trip.start(grad_RD.index_select(0, place_S1[:, 0]), back=True)
        return grad_RD.new_empty(0), None, None


class _SendBack(torch.autograd.Function):
    """Results to where their tokens are, in the order in which the rows were sent."""

    @staticmethod
    def forward(ctx, y_RD, trip, arrived):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip, ctx.num_rows = trip, y_RD.shape[0]
        ctx.save_for_backward(arrived.place_TK)
        trip.start(y_RD.index_select(0, arrived.place_TK[:, 0]), back=True)
        return trip.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD):  # pyright: ignore[reportIncompatibleMethodOverride]
        (place_S1,) = ctx.saved_tensors
        ctx.trip.start(grad_SD)
        came_SD = ctx.trip.finish()
        # zeros, not a gather: padding must send no gradient to the weights
        grad_RD = came_SD.new_zeros(ctx.num_rows, came_SD.shape[1]).index_copy_(0, place_S1[:, 0], came_SD)
        return grad_RD, None, None
