"""Bytes that are sent: by hand, and as the real route sends them in a model of a rank of 64."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.batch import PackedBatch
from ernie_model.expert_parallel import Shard, connect_experts, shard_experts
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE, Routing
from ernie_model.recompute import recompute
from tests.train import small
from train.config import ModelConfig, ParallelConfig, Precision, Recompute
from train.footprint import Room, pieces_of
from train.planning.traffic import Traffic, traffic_of
from train.policy import Policy, on_device
from train.shares import Shares, Weights

CONFIG = small.CONFIG.replace(num_experts=64, num_hidden_layers=3, sparse_layers=(1, 2))
RANK, WORLD, TOKENS = 13, 64, 128


def settings(way: Recompute = Recompute.none) -> ModelConfig:
    return ModelConfig(config={}, processor="tiny", precision=Precision.fp32, recompute=way)


def sent(parallel: ParallelConfig, ranks: int, *, rows: int = 1, way: Recompute = Recompute.none) -> Traffic:
    with torch.device("meta"):
        model = ErnieModel(CONFIG)
    return traffic_of(pieces_of(model), CONFIG, settings(way), Room(TOKENS, 0, rows), Shares(parallel, ranks))


@contextlib.contextmanager
def fake_ranks():
    """This process as one of 64 ranks, whose collectives return at once."""
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", [Recompute.none, Recompute.layers])
@pytest.mark.parametrize("expert", [4, 8, 64])
def test_the_real_route_sends_what_the_formula_says(monkeypatch, expert, way):
    """Every rank chooses alike and evenly, so what comes from each is what this rank sends to itself."""
    counted = 0
    real = dist.all_to_all_single

    def alike(output, given, output_splits=None, input_splits=None, group=None, async_op=False):
        nonlocal counted
        work = real(output, given, output_splits, input_splits, group=group, async_op=async_op)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        own = given.split(input_splits)[rank] if input_splits else given.chunk(size)[rank]
        output.copy_(torch.cat([own] * size))
        counted += (given.numel() - own.numel()) * given.element_size()
        return work

    def evenly(layer: MoE, x_TD, pools):
        choice_TK = torch.arange(TOKENS * layer.experts_per_token).view(TOKENS, -1) % layer.num_experts
        weight_TK = x_TD.new_ones(choice_TK.shape).requires_grad_()
        return Routing(choice_TK, weight_TK, 0), choose(layer, x_TD, pools)[1]

    choose = MoE.choose
    monkeypatch.setattr(MoE, "choose", evenly)
    monkeypatch.setattr(dist, "all_to_all_single", alike)
    model = ErnieModel(CONFIG)
    shard_experts(model, Shard(RANK % expert, expert))
    if way is Recompute.layers:
        model.run_layer = recompute
    token_T = torch.arange(TOKENS) % 30 + 3
    row = PackedBatch(
        token_T=token_T,
        target_T=token_T.roll(-1),
        weight_T=torch.ones(TOKENS),
        position_3T=torch.arange(TOKENS).expand(3, -1),
        lengths=(TOKENS,),
        grids=(),
        patch_PX=None,
    )
    with fake_ranks():
        first = RANK // expert * expert
        connect_experts(model, dist.new_group(range(first, first + expert)))
        batch, row_R = on_device(row, torch.device("cpu"))
        Policy(model, loss_is_linear=True).train()(batch, row_R).logprob_T.sum().backward()
    assert counted == sent(ParallelConfig(expert=expert), WORLD, way=way).experts


def test_an_exchange_by_hand():
    """8 ranks: 128 tokens x 2 choices x 16 numbers x 4 bytes, 4 ways, 2 layers, 7/8; 128 counts of 8 bytes a layer."""
    ways, counts = 4 * 128 * 2 * 16 * 4 * 2, 2 * 128 * 8
    assert sent(ParallelConfig(expert=8), 64).experts == (ways + counts) * 7 / 8
    assert sent(ParallelConfig(expert=8), 64, rows=3).experts == 3 * (ways + counts) * 7 / 8
    again = sent(ParallelConfig(expert=8), 64, way=Recompute.layers).experts
    assert again == (1.5 * ways + 2 * counts) * 7 / 8
    assert sent(ParallelConfig(expert=1), 64).experts == 0


def test_heads_by_hand():
    """64 tokens here of a row on 2 ranks; 2 query heads and 1 key/value head, sent to both, of 8 numbers; 3 layers."""
    config, shares = settings(Recompute.layers), Shares(ParallelConfig(sequence=2), 2)
    with torch.device("meta"):
        pieces = pieces_of(ErnieModel(CONFIG))
    found = traffic_of(pieces, CONFIG, config, Room(64, 0, 1), shares).sequence
    assert found == 3 * 3 * 64 * (2 + 2 + 2 + 2) * 8 * 4 / 2


@pytest.mark.parametrize(
    "zero, rows, times", [(0, 1, 2), (0, 4, 2), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 1), (3, 4, 4)]
)
def test_gradients_by_hand(zero, rows, times):
    """`times` P b (R-1)/R; experts among the 2 ranks that hold the same ones."""
    with torch.device("meta"):
        weights = [w for piece in pieces_of(ErnieModel(CONFIG)) for w in piece.weights]

    def total(expert: bool) -> int:
        return sum(w.count for w in weights if w.expert is expert)

    found = sent(ParallelConfig(zero=zero, expert=4), 8, rows=rows)
    assert found.dense_gradients == times * total(False) * 4 * 7 / 8
    assert found.expert_gradients == times * total(True) / 4 * 4 / 2
    gathers = 2 * rows if zero == 3 else 0
    assert found.dense_weights == gathers * total(False) * 4 * 7 / 8
    assert found.expert_weights == gathers * total(True) / 4 * 4 / 2


def test_what_is_frozen_sends_no_gradients():
    frozen = Weights(100, 4, trained=False, expert=False, product=True, largest=100)
    assert Shares(ParallelConfig(zero=2), 8).gradients(frozen) == 0
