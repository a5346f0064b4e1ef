"""What a rank holds, by hand: 960 weights in float32, 320 of them experts, on 8 ranks."""

import pytest
import torch

from ernie_model.expert_parallel import Shard, shard_experts
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE
from tests.train import small
from train.config import ParallelConfig
from train.shares import Shares, Weights, weights_of

DENSE = Weights(640, 4, trained=True, expert=False, product=True, largest=640)
EXPERTS = Weights(320, 4, trained=True, expert=True, product=True, largest=320)


def held(zero: int, w: Weights, *, expert: int = 1, offload: bool = False) -> tuple[int, int, int, int]:
    shares = Shares(ParallelConfig(zero=zero, expert=expert, offload_optimizer=offload), 8)
    return shares.weights(w), shares.gradients(w), shares.exchanged(w), shares.optimizer(w)


@pytest.mark.parametrize(
    "zero, dense, experts",
    [
        # weights, gradients, their copy, AdamW. Dense: 640, of which a rank updates 80. Experts: 80 here, 40 updated.
        (0, (2560, 2560, 2560, 5120), (320, 320, 0, 640)),
        (1, (2560, 2560, 320, 960), (320, 320, 160, 480)),
        (2, (2560, 320, 0, 960), (320, 160, 0, 480)),
        (3, (320, 320, 0, 640), (160, 160, 0, 320)),
    ],
)
def test_every_stage_by_hand(zero, dense, experts):
    assert held(zero, DENSE) == dense
    assert held(zero, EXPERTS, expert=4) == experts


def test_experts_that_are_not_shared_out_lie_like_everything_else():
    assert held(0, EXPERTS) == held(0, EXPERTS._replace(expert=False)) == (1280, 1280, 1280, 2560)


def test_what_is_frozen_has_no_gradients_and_no_moments():
    for zero in range(4):
        assert held(zero, DENSE._replace(trained=False))[1:] == (0, 0, 0)
    assert held(3, DENSE._replace(trained=False, size=2))[0] == 160


def test_an_offloaded_optimizer_has_a_copy_of_its_own():
    assert held(3, DENSE, offload=True)[3] == 960


def test_one_process_has_no_copies():
    shares = Shares(ParallelConfig(), 1)
    assert (shares.exchanged(DENSE), shares.gathered(DENSE)) == (0, 0)


def test_a_partition_is_rounded_up():
    assert Shares(ParallelConfig(zero=1), 3).part(DENSE) == 214


def test_a_model_that_is_cut_already_counts_as_whole():
    with torch.device("meta"):
        whole, cut = ErnieModel(small.CONFIG), ErnieModel(small.CONFIG)
        shard_experts(cut, Shard(1, 2))
    assert weights_of(whole.layers[1], "layers.1") == weights_of(cut.layers[1], "layers.1")
    layer = next(module for module in cut.modules() if isinstance(module, MoE))
    assert layer.text.experts.num_experts == small.CONFIG.num_experts // 2
