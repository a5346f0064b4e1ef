"""What this rank holds of the training state, as ranges of the whole tensors, flattened.

    PyTorch's optimizer, DDP     0                                          N     all of it, on every rank
    a share of the experts                  i*N/of         (i+1)*N/of             consecutive experts: `tensor.shard`
    ZeRO 1, 2                       a ........ b                                  what this rank's partition overlaps
    ZeRO 3                              r*n ....... (r+1)*n                       the r-th of equal parts

So one list of ranges describes any layout, and a checkpoint that is made of ranges opens on every other one. Where
several ranks hold the same, each writes an equal share of it.

    weight        what updates are added to: ZeRO's float32 copy where there is one
    exp_avg, exp_avg_sq, step      AdamW's state; none before the first update

DeepSpeed's optimizers are known by their attributes; a test holds them (tests/distributed/reshard.py). Under ZeRO one
state of AdamW covers many parameters, laid end to end (`flat`), and its `step` is that of all.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernie_model.expert_parallel import shard_of
from train.config import UserError
from train.pieces import Piece, Pieces

MOMENTS = ("exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """What is here of one tensor."""

    start: int
    """Its first element, in the whole tensor."""
    weight_N: Tensor
    """Live: what is copied into it is what the run goes on with."""
    share: slice
    """What this rank writes of it."""
    flat: Tensor
    """The optimizer's state goes by this tensor,"""
    offset: int
    """and the part begins here in it."""

    def of_state(self, value: Tensor) -> Tensor:
        """(N,) of a moment that covers all of `flat`."""
        return value.view(-1)[self.offset : self.offset + self.weight_N.numel()]


def whole_shape(tensor: Tensor) -> list[int]:
    """The shape of which this tensor is a part, or all."""
    sizes = list(getattr(tensor, "ds_shape", tensor.shape))
    if (shard := shard_of(tensor)).of > 1:
        sizes[0] *= shard.of
    return sizes


def part_of(tensor: Any, optimizer: Any, *, rank: int, world: int) -> Part | None:
    """What this rank holds of a parameter or buffer of the model; None where ZeRO has put all of it elsewhere."""
    start, working_N = working(tensor)
    if hasattr(tensor, "_hp_mapping"):  # ZeRO 1, 2: what trains
        if (mapping := tensor._hp_mapping) is None:
            return None
        return Part(
            start=start + mapping.lp_fragment_address.start,
            weight_N=mapping.hp_fragment.detach(),
            share=slice(None),
            flat=optimizer.single_partition_of_fp32_groups[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
        )
    if hasattr(tensor, "ds_tensor"):  # ZeRO 3
        if not working_N.numel():
            return None
        if not tensor.requires_grad:
            return Part(start, working_N, slice(None), tensor, 0)
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(tensor)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return Part(start, flat.detach()[offset : offset + working_N.numel()], slice(None), flat, offset)
    # Consecutive ranks hold different experts, so the copies of one share are `of` ranks apart.
    of = shard_of(tensor).of
    return Part(start, working_N, _equal_share(working_N.numel(), copy=rank // of, copies=world // of), tensor, 0)


def working(tensor: Any) -> tuple[int, Tensor]:
    """What the forward pass is made from: its first element in the whole tensor, and the values (N,), live."""
    shard = shard_of(tensor)
    if hasattr(tensor, "ds_tensor"):  # ZeRO 3; the last parts are filled up to equal length
        first = tensor.ds_zero_partition_rank * tensor.ds_tensor.ds_numel
        values_N = tensor.ds_tensor.detach().view(-1)[: max(0, tensor.ds_numel - first)]
        return shard.index * tensor.ds_numel + first, values_N
    return shard.index * tensor.numel(), tensor.detach().view(-1)


def _equal_share(count: int, *, copy: int, copies: int) -> slice:
    each = math.ceil(count / copies)
    return slice(min(count, copy * each), min(count, (copy + 1) * each))


# ---------------------------------------------------------------------------------------------------------- saving


def pieces_to_write(tensors: Mapping[str, Tensor], optimizer: Any, *, rank: int, world: int) -> Iterator[Piece]:
    """This rank's share of the training state. All ranks' together are all of it, once.

    Args:
        tensors: parameters and buffers of the model, by name.
        optimizer: PyTorch's, or the one of DeepSpeed's engine.
    """
    for name, tensor in tensors.items():
        part = part_of(tensor, optimizer, rank=rank, world=world)
        if part is None:
            continue
        state = _inner(optimizer).state.get(part.flat, {})
        for kind, value_N in {"weight": part.weight_N, **_moments(part, state)}.items():
            start, _, _ = part.share.indices(value_N.numel())
            if (share_N := value_N[part.share]).numel():
                yield Piece(f"{name}/{kind}", part.start + start, share_N)
        if state and part.start == 0 and part.share.indices(1)[0] == 0:
            yield Piece(f"{name}/step", 0, torch.tensor([float(state["step"])]))


def _moments(part: Part, state: dict[str, Any]) -> dict[str, Tensor]:
    return {kind: part.of_state(state[kind]) for kind in MOMENTS if kind in state}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer, which ZeRO keeps inside its own."""
    return getattr(optimizer, "optimizer", optimizer)


# --------------------------------------------------------------------------------------------------------- loading


@torch.no_grad()
def restore(pieces: Pieces, tensors: Mapping[str, Tensor], optimizer: Any, *, rank: int, world: int) -> None:
    """Put weights and the optimizer's state back, on this layout, whichever one wrote them. All ranks do it together.

    Raises:
        PieceError: something is missing.
        UserError: the parameters have seen unequally many updates, and the layout counts one number for several.
    """
    steps = {name: pieces.read(f"{name}/step", 0, 1).item() for name in tensors if f"{name}/step" in pieces}
    if _inner(optimizer) is not optimizer:  # ZeRO
        _check_one_step(steps, [name for name, tensor in tensors.items() if tensor.requires_grad])
    for name, tensor in tensors.items():
        pieces.read_into(f"{name}/weight", *working(tensor))
        part = part_of(tensor, optimizer, rank=rank, world=world)
        if part is None:
            continue
        if part.flat is not tensor:  # ZeRO's float32 copy is exact, whatever the forward pass is rounded to
            pieces.read_into(f"{name}/weight", part.start, part.weight_N)
        if name in steps:
            state = _state_of(part.flat, _inner(optimizer))
            state["step"] = _like(state["step"], steps[name])
            for kind, value_N in _moments(part, state).items():
                pieces.read_into(f"{name}/{kind}", part.start, value_N)
    if kept := getattr(optimizer, "persistent_parameters", None):
        kept[0].partition(kept)  # ZeRO 3 keeps small ones whole as well: they are gathered anew when they are needed


def _state_of(flat: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's state, made here if no update has made it yet."""
    state = optimizer.state[flat]
    if not state:
        # As in torch.optim.AdamW: a fused kernel reads the step on the device. DeepSpeed's CPUAdam counts in ints.
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        zero = torch.zeros((), device=flat.device if fused else "cpu")
        state["step"] = zero if isinstance(optimizer, torch.optim.AdamW) else 0
        state |= {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS}
    return state


def _like(step: Tensor | int, value: float) -> Tensor | int:
    return torch.full_like(step, value) if isinstance(step, Tensor) else int(value)


def _check_one_step(steps: dict[str, float], trained: list[str]) -> None:
    counts = {name: steps.get(name, 0.0) for name in trained}
    if len(set(counts.values())) > 1:
        few, many = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        raise UserError(
            f"{many} has seen {counts[many]:.0f} updates and {few} {counts[few]:.0f}, and ZeRO counts one number for "
            "both. Resume with parallel.zero=0."
        )


# ----------------------------------------------------------------------------------------------------- fingerprints

SAMPLES = 1024
SCATTER = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio, odd, as int64: neighbours get unlike factors


def bit_sums(tensor: Tensor, optimizer: Any = None, *, rank: int, world: int) -> tuple[int, int]:
    """Of this rank's share of a tensor: the sum of its bits as integers, and one that knows the order.

    Sums of all ranks add up to those of the whole tensor, modulo 2**64. The second is over evenly spaced values, each
    times a factor that goes by its place.
    """
    part = part_of(tensor, optimizer, rank=rank, world=world)
    if part is None:
        return 0, 0
    first = part.start + part.share.indices(part.weight_N.numel())[0]
    value_N = part.weight_N[part.share]
    bits_N = value_N.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value_N.element_size()])
    total = sum(int(block.sum(dtype=torch.int64)) for block in bits_N.split(2**22))  # sum would widen a copy of all
    stride = max(1, math.prod(whole_shape(tensor)) // SAMPLES)
    picked = bits_N[-first % stride :: stride].to(torch.int64)
    place = torch.arange(picked.numel(), device=picked.device) + math.ceil(first / stride)
    return total, int((picked * (2 * place + 1) * SCATTER).sum())
