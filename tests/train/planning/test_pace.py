"""Seconds, by hand: rates and sizes are round."""

import dataclasses

import pytest

from ernie_model.flops import forward_flops
from ernie_model.parts import Part
from tests.test_configs import load
from tests.train import small
from train.config import Precision, Recompute, UserError
from train.footprint import Kind, Piece, Room
from train.planning.pace import Pace, Work, pace_of, peak_tflops, work_of
from train.planning.traffic import Traffic
from train.shares import Shares, Weights

RATES = ["plan.node_gb_s=100", "plan.network_gb_s=10", "plan.memory_gb_s=1000", "plan.host_gb_s=50", "plan.mfu=0.5"]
RATES += ["plan.host_memory_gb_s=20", "plan.gpus_per_node=8", "plan.imbalance=1.5"]
NO_TRAFFIC = Traffic(0, 0, 0, 0, 0, 0)
# 10^12 operations are a second at 2 TFLOP/s and an mfu of 0.5
WORK = Work(asked=3e12, experts=2e12, again=1e12, experts_again=1e12, shared=0.0)
GB = 10**9


def pace(*settings: str, gpus: int, traffic: Traffic = NO_TRAFFIC, work: Work = WORK, rows: int = 1) -> Pace:
    config = load(*RATES, *settings, f"plan.gpus={gpus}")
    weights = Weights(8 * GB, 4, trained=True, expert=False, product=True, largest=GB)
    room = Room(100, 0, rows, config.plan.imbalance)
    pieces = [Piece(Kind.DENSE, (weights,), True)]
    return pace_of(config, pieces, work, traffic, room, Shares(config.parallel, gpus), tflops=2)


def test_products_and_the_update():
    found = pace(gpus=1, rows=3)
    assert found.products == 12 and found.update == pytest.approx(28 * 8 / 1000)
    assert found.seconds == found.products + found.update
    assert found.tokens == 300 and found.flops == 9e12
    assert pace("parallel.expert=4", gpus=8).products == 4 + 0.5 * 3  # the busiest rank's experts


def test_ranks_of_one_node_and_of_several():
    sent = NO_TRAFFIC._replace(dense_gradients=400 * GB)
    hidden = 4 * 2 / 3  # behind the backward pass
    assert pace(gpus=8, traffic=sent).gradients == pytest.approx(4 - hidden)  # the links of the node
    assert pace("parallel.overlap=false", gpus=8, traffic=sent).gradients == pytest.approx(4)
    assert pace("parallel.overlap=false", gpus=16, traffic=sent).gradients == pytest.approx(5)  # eight ports of 10
    # every eighth rank holds the same experts: one port a node
    same = NO_TRAFFIC._replace(expert_gradients=40 * GB)
    assert pace("parallel.expert=8", gpus=16, traffic=same).gradients == pytest.approx(4)  # after the backward pass
    hidden = (4 + 0.5 * 3) * 2 / 3
    assert pace("parallel.expert=8", "parallel.zero=1", gpus=16, traffic=same).gradients == pytest.approx(4 - hidden)


def test_zero_2_hides_every_rows_exchange():
    sent = NO_TRAFFIC._replace(dense_gradients=1600 * GB)
    assert pace("parallel.zero=0", gpus=8, traffic=sent, rows=4).gradients == pytest.approx(16 - 4 * 2 / 3)
    assert pace("parallel.zero=2", gpus=8, traffic=sent, rows=4).gradients == pytest.approx(16 - 4 * 4 * 2 / 3)


def test_rows_travel_while_the_shared_experts_are_computed():
    sent = NO_TRAFFIC._replace(experts=100 * GB)
    assert pace("parallel.expert=8", gpus=8, traffic=sent).experts == pytest.approx(1)
    shared = WORK._replace(shared=0.3e12)
    assert pace("parallel.expert=8", gpus=8, traffic=sent, work=shared).experts == pytest.approx(0.5 + 0.2)
    # 16 ranks on two nodes: 8 of the 15 others are outside, through a port of 10
    assert pace("parallel.expert=16", gpus=16, traffic=sent).experts == pytest.approx(100 * 8 / 15 / 10 + 7 / 15)


def test_what_is_offloaded_travels_to_the_host():
    """A billion of the 8 on each rank: 4 GB down and 4 up at 50, 28 GB of the host's memory at 20."""
    found = pace("parallel.zero=2", "parallel.offload_optimizer=true", gpus=8)
    assert found.update == pytest.approx(8 / 50 + 28 / 20)
    weights = pace("parallel.zero=3", "parallel.offload_optimizer=true", "parallel.offload_weights=true", gpus=8)
    assert weights.gathers == pytest.approx(2 * 4 / 50)


def test_operations_of_a_row():
    config = load("plan.media_share=0.5", "plan.segment_tokens=32", "model.recompute=layers", "data.max_tokens=64")
    found = work_of(config, small.CONFIG, set(Part))
    # two conversations of 32 tokens, 16 of them one image of 8 x 8 patches
    forward = forward_flops(small.CONFIG, lengths=[32, 32], grids=[(1, 8, 8)] * 2, learned=32)
    tower = (Part.VISION, Part.RESAMPLER, Part.EMBEDDINGS, "vision attention scores")
    assert found.again == sum(count for part, count in forward.items() if part not in tower)
    assert found.experts_again == forward[Part.TEXT_EXPERTS] + forward[Part.VISION_EXPERTS]
    assert found.asked == pytest.approx(3 * sum(forward.values()))
    assert found.experts == 3 * found.experts_again and found.shared == 4 * forward[Part.SHARED]
    half = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence=2))
    assert work_of(half, small.CONFIG, set(Part)).asked == found.asked / 2  # of the same row
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, recompute=Recompute.none))
    assert work_of(kept, small.CONFIG, set(Part)).again == 0


def test_rates_come_from_the_data_sheet_or_are_asked_for():
    assert peak_tflops(load("plan=h100").plan, Precision.bf16) == 989
    assert peak_tflops(load("plan=a100", "plan.tflops=7").plan, Precision.bf16) == 7
    assert 0 < peak_tflops(load("plan=cpu").plan, Precision.fp32) < 100
    with pytest.raises(UserError, match=r"plan.device=H100 has no known rate in fp32. Give plan.tflops"):
        peak_tflops(load("plan=h100").plan, Precision.fp32)
    with pytest.raises(UserError, match="plan.device=B1 has no known rate"):
        peak_tflops(load("plan.device=B1").plan, Precision.bf16)
