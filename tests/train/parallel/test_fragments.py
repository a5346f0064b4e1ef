"""Who writes what of tensors that several ranks hold, and fingerprints that do not depend on it.

What ZeRO holds needs its engines: tests/distributed/test_reshard.py.
"""

import pytest
import torch
from torch import nn

from ernie_model.expert_parallel import Shard, mark
from train.parallel.fragments import bit_sums, pieces_to_write, whole_shape


def adamw(*parameters: nn.Parameter) -> torch.optim.AdamW:
    """After one update."""
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_that_hold_the_same_write_all_of_it_once(world):
    weight, bias, buffer = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(2)), torch.arange(4)
    optimizer = adamw(weight, bias)
    tensors = {"weight": weight, "bias": bias, "buffer": buffer}
    pieces = [piece for rank in range(world) for piece in pieces_to_write(tensors, optimizer, rank=rank, world=world)]
    expected = {"weight/step": torch.ones(1), "bias/step": torch.ones(1), "buffer/weight": buffer}
    for name, tensor in (("weight", weight), ("bias", bias)):
        expected |= {f"{name}/{key}": optimizer.state[tensor][key].flatten() for key in ("exp_avg", "exp_avg_sq")}
        expected |= {f"{name}/weight": tensor.flatten()}
    assert {piece.name for piece in pieces} == expected.keys()
    for name, whole in expected.items():
        mine = sorted((piece for piece in pieces if piece.name == name), key=lambda piece: piece.start)
        assert torch.equal(torch.cat([piece.value for piece in mine]), whole), name
        assert [piece.start for piece in mine] == [sum(p.value.numel() for p in mine[:i]) for i in range(len(mine))]


def test_experts_are_written_by_those_who_hold_them():
    """4 experts of 6 numbers, 2 to a rank, on 4 ranks: ranks 0 and 2 hold the first two, 1 and 3 the last two."""
    starts = {}
    for rank in range(4):
        experts = nn.Parameter(torch.full((2, 2, 3), float(rank % 2)))
        mark(experts, Shard(rank % 2, 2))
        assert whole_shape(experts) == [4, 2, 3]
        (piece,) = pieces_to_write({"experts": experts}, torch.optim.AdamW([experts]), rank=rank, world=4)
        assert piece.value.tolist() == [rank % 2] * 6
        starts[rank] = piece.start
    assert starts == {0: 0, 2: 6, 1: 12, 3: 18}


def test_before_the_first_update_there_are_no_moments():
    weight = nn.Parameter(torch.randn(3))
    (piece,) = pieces_to_write({"w": weight}, torch.optim.AdamW([weight]), rank=0, world=1)
    assert piece.name == "w/weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [7, 1024, 5000])  # less than a sample for each, as many, several to a sample
def test_fingerprints_add_up_over_ranks(dtype, count):
    value = torch.randn(count).to(dtype)

    def total(tensor, world):
        sums = [bit_sums(tensor, rank=rank, world=world) for rank in range(world)]
        return [sum(numbers) % 2**64 for numbers in zip(*sums, strict=True)]

    whole = total(value, 1)
    assert all(total(value, world) == whole for world in (2, 3, 7, 9))
    halves = value[: count // 2 * 2].clone()
    parts = [halves[: count // 2], halves[count // 2 :]]
    for index, part in enumerate(parts):
        mark(part, Shard(index, 2))
    sums = [bit_sums(part, rank=index, world=2) for index, part in enumerate(parts)]
    assert [sum(numbers) % 2**64 for numbers in zip(*sums, strict=True)] == total(halves, 1)
    # by definition, in whole numbers
    bits = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]).tolist()
    assert whole[0] == sum(bits) % 2**64
    stride = max(1, count // 1024)
    places = enumerate(bits[::stride])
    assert whole[1] == sum(b * (2 * place + 1) * 0x9E3779B97F4A7C15 for place, b in places) % 2**64
    # any value counts, and the order does
    changed, swapped = value.clone(), value.clone()
    changed[count // 2] += 1
    swapped[[0, stride]] = value[[stride, 0]]
    assert total(changed, 1)[0] != whole[0]
    assert total(swapped, 1)[0] == whole[0] and total(swapped, 1)[1] != whole[1]
