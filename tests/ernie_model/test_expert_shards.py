"""What a rank holds of the experts, by hand."""

import pytest
import torch

from ernie_model.expert_parallel import WHOLE, Shard, shard_experts, shard_of
from ernie_model.moe import Experts


def test_a_rank_holds_consecutive_experts():
    assert [Shard(i, 4).part_of(8) for i in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert WHOLE.part_of(8) == slice(0, 8)


def test_experts_that_cannot_be_shared_out_are_named():
    with pytest.raises(ValueError, match="8 experts cannot be shared out evenly among 3 ranks"):
        Shard(0, 3).part_of(8)
    with pytest.raises(ValueError, match="no part 2 of 2"):
        Shard(2, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_are_cut_and_marked(device):
    experts = Experts(4, width=3, hidden=2).to(device)
    for value in experts.parameters():  # memory as it was found may hold NaN, which equals nothing
        torch.nn.init.normal_(value)
    whole = {name: value.detach().clone() for name, value in experts.named_parameters()}
    assert shard_of(experts.down_EDF) == WHOLE
    experts.down_EDF.requires_grad_(False)
    shard_experts(experts, Shard(1, 2))
    assert experts.num_experts == 2
    assert experts.gate_up_EFD.requires_grad and not experts.down_EDF.requires_grad
    for name, value in experts.named_parameters():
        assert shard_of(value) == Shard(1, 2)
        assert value.untyped_storage().nbytes() == value.nbytes  # the other half is not kept alive by a view
        if device == "cpu":
            assert torch.equal(value, whole[name][2:])
        assert value.shape == whole[name][2:].shape
