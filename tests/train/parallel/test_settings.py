"""What DeepSpeed is told, and the layouts that are refused, each with its reason and the way out."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.train import small
from train.config import HeldIn, ObjectiveConfig, ParallelConfig, PoolWeights, UserError
from train.parallel.layout import Layout, build_layout, check_launcher
from train.parallel.settings import deepspeed_config
from train.router import RouterLosses


def test_deepspeed_is_told_the_stage_the_norm_and_no_precision():
    config = ParallelConfig(zero=3, bucket_mb=8, overlap=False, offload_optimizer=True, offload_weights=True)
    told = deepspeed_config(config, max_grad_norm=0.5, gpu=True)
    assert json.loads(json.dumps(told)) == told
    assert told["gradient_clipping"] == 0.5 and not told.keys() & {"bf16", "fp16", "optimizer", "scheduler"}
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (3, False, 2_000_000)
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    narrow = deepspeed_config(
        ParallelConfig(zero=2, held_in=HeldIn.bfloat16, bucket_mb=8), max_grad_norm=1.0, gpu=False
    )
    assert narrow["zero_optimization"]["reduce_bucket_size"] == 4_000_000


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(zero=3, held_in=HeldIn.bfloat16), "ZeRO-3 holds all weights in one dtype, and routers must be float32"),
        (dict(held_in=HeldIn.bfloat16), "Only ZeRO has the float32 copy that updates are added to"),
        (dict(offload_optimizer=True), "parallel.offload_optimizer is true, but parallel.zero is 0"),
        (dict(zero=2, offload_weights=True), "only ZeRO-3 fetches weights layer by layer. Set parallel.zero=3"),
        (dict(zero=4), "parallel.zero is 4"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(processes=4), "parallel.processes is 4, but 6 were started."),
        (dict(expert=4), "parallel.expert is 4, which does not divide the 6 processes that were started"),
    ],
)
def test_processes_that_do_not_fit_are_refused(settings: dict[str, Any], told: str):
    six: Any = SimpleNamespace(num_processes=6, process_index=0)
    with pytest.raises(UserError, match=re.escape(told)):
        build_layout(ParallelConfig(**settings), six)


@pytest.mark.parametrize(
    ("zero", "settings", "told"),
    [
        (1, dict(orthogonal_decoupled=True), "the step would be undone. Set objective.orthogonal_decoupled=false"),
        (3, dict(), "it needs all rows of a router at once, and parallel.zero=3 cuts them up"),
    ],
)
def test_router_losses_that_need_whole_routers_are_refused(zero: int, settings: dict[str, Any], told: str):
    config = ObjectiveConfig(orthogonal=PoolWeights(text=1.0), **settings)
    with pytest.raises(UserError, match=re.escape(told)):
        RouterLosses(small.policy(), config, small.accelerator(), Layout(zero=zero))


def test_a_launch_with_a_deepspeed_configuration_of_its_own_is_refused():
    with pytest.raises(UserError, match=re.escape("Launch without --use_deepspeed")):
        check_launcher(ParallelConfig(), {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"})
