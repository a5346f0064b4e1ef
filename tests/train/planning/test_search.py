"""The search: what it offers fits, the fastest is first, and the largest models are answered in seconds."""

import dataclasses
import time

import pytest

from tests.test_configs import load
from train.config import HeldIn, SFTConfig, UserError
from train.outline import architecture_of, outline
from train.plan import held_subjects
from train.planning.estimate import Estimate, Subject, cache_bytes, check_layout, estimate
from train.planning.search import Found, candidates, fewest_gpus, layout_key, search

LORA = ("experiment=lora_vl_28b", "data.path=-")
FULL = ("experiment=full_vl_28b", "data.path=-")
_found: dict[tuple[str, ...], Found] = {}


def config_of(*settings: str) -> SFTConfig:
    return load("plan.search=true", *settings)


def found(*settings: str) -> Found:
    """Searches are shared by tests."""
    if settings not in _found:
        config = config_of(*settings)
        _found[settings] = search(config, held_subjects(config, architecture_of(config.model)), 989)
    return _found[settings]


def one(*settings: str) -> Estimate:
    config = config_of(*settings)
    model = outline(config, architecture_of(config.model))[0]
    return estimate(config, Subject.of(model), 989)


def test_what_is_offered_fits_and_the_fastest_comes_first():
    told = found(*FULL, "plan.gpus=16")
    assert len(told.fitting) > 5
    for fits in told.fitting:
        assert fits.needed <= 0.92 * 85e9 and not fits.obstacle
        assert fits.host_of_node <= 0.9 * 2000e9
    speeds = [float(f"{fits.pace.tokens_per_s:.2e}") for fits in told.fitting]
    assert speeds == sorted(speeds, reverse=True)
    for misses in told.missing:
        assert misses.obstacle and (misses.needed > 0.92 * 85e9 or misses.host_of_node > 0.9 * 2000e9)
    assert [misses.excess for misses in told.missing] == sorted(misses.excess for misses in told.missing)


def test_every_layout_goes_through_the_same_tokens_in_an_update():
    config = config_of(*FULL)
    architecture = architecture_of(config.model)
    rows = {(c.data.max_tokens, c.data.accumulation) for c in candidates(config, architecture)}
    assert rows == {(8192, 4), (16384, 2), (32768, 1)}
    assert {c.parallel.expert for c in candidates(config, architecture)} == {1, 2, 4, 8}
    narrow = [c for c in candidates(config, architecture) if c.parallel.held_in is HeldIn.bfloat16]
    assert {c.parallel.zero for c in narrow} == {1, 2}


def test_adapters_on_28b_fit_one_gpu_and_a_full_training_does_not_fit_four():
    alone = found(*LORA, "plan.gpus=1").fitting
    assert alone and alone[0].config.model.recompute.value == "layers"
    assert found(*LORA, "plan.gpus=8").fitting[0].pace.tokens_per_s > 4 * alone[0].pace.tokens_per_s
    four = found(*FULL, "plan.gpus=4", "plan.host_gb=200")
    assert not four.fitting and "host memory" in " ".join(misses.obstacle for misses in four.missing)


def test_more_gpus_where_nothing_fits():
    config = config_of(*FULL, "plan.gpus=2", "plan.host_gb=1")
    subjects = held_subjects(config, architecture_of(config.model))
    fits: dict[int, bool] = {}

    def look(more: SFTConfig) -> Found:
        told = search(more, subjects, 989)
        fits[more.plan.gpus] = bool(told.fitting)
        return told

    assert not look(config).fitting
    fewest = fewest_gpus(config, look)
    assert fewest in (8, 16) and fits == {gpus: gpus == fewest for gpus in (2, 4, 8, 16) if gpus <= fewest}


def test_experts_that_are_shared_out_beat_weights_that_are_gathered():
    """At equal ZeRO stages; both must gather or send, and the experts are most of the weights."""
    told = {layout_key(fits.config): fits for fits in found(*FULL, "plan.gpus=16").fitting}
    gathered, shared = (told[3, expert, False, False, "float32"] for expert in (1, 8))
    assert shared.pace.tokens_per_s > gathered.pace.tokens_per_s


@pytest.mark.parametrize(
    "settings",
    [
        (*FULL, "plan.gpus=8"),
        (*FULL, "model=ernie_4_5_vl_424b_a47b", "plan.gpus=128"),
        (*LORA, "model=ernie_4_5_vl_424b_a47b", "peft.targets=[attention,text_experts]", "plan.gpus=64"),
    ],
)
def test_the_largest_models_are_planned_in_seconds(settings):
    began = time.process_time()  # of this process: other processes make no difference
    assert found(*settings).fitting
    assert time.process_time() - began < 20


def test_the_cache_by_hand():
    """28B: keys and values, 28 layers, 4 heads of 128, 2 bytes. It stands beside what stays, not beside a step."""
    config = config_of(*LORA)
    assert cache_bytes(config, architecture_of(config.model)) == 2 * 28 * 4 * 128 * 2
    without, few, many = (
        one(*LORA, "parallel=ep8", f"plan.answers={n}", "plan.answer_tokens=1000") for n in (0, 2, 2000)
    )
    assert (without.cache, few.cache) == (0, 2 * 1000 * 57344)
    assert without.needed == few.needed == without.memory.peak
    assert many.needed == many.memory.weights + many.memory.optimizer + many.cache
    assert "115 GB of KV cache" in many.obstacle


def test_a_checkpoint_by_hand():
    """Full: 12 bytes a weight that trains, 4 a frozen one. Adapters: 12 of their own alone."""
    for settings in (FULL, LORA):
        config = config_of(*settings)
        model = outline(config, architecture_of(config.model))[0]
        trained, frozen = (
            sum(p.numel() for p in model.parameters() if p.requires_grad is kind) for kind in (True, False)
        )
        expected = 12 * trained + (4 * frozen if settings is FULL else 0)
        assert one(*settings).checkpoint == expected


@pytest.mark.parametrize(
    "settings, told",
    [
        (["plan.gpus=8", "parallel.expert=3"], "parallel.expert=3 does not divide plan.gpus=8."),
        (["plan.gpus=128", "parallel.expert=128"], "parallel.expert=128 does not divide the 64 experts of a pool."),
        (["plan.gpus=8", "parallel.processes=4"], "plan.gpus is 8 and parallel.processes 4; they must be the same."),
        (["plan.gpus=8", "parallel.expert=2", "model=ernie_4_5_0_3b"], "does not divide the 0 experts of a pool."),
    ],
)
def test_a_layout_that_cannot_be_is_refused(settings, told):
    config = config_of("model=ernie_4_5_vl_28b_a3b", *settings)
    with pytest.raises(UserError) as caught:
        check_layout(config, architecture_of(config.model))
    assert told in str(caught.value)


def test_a_dense_model_has_no_experts_to_share_out():
    config = config_of("model=ernie_4_5_0_3b")
    assert {c.parallel.expert for c in candidates(config, architecture_of(config.model))} == {1}


def test_what_lies_in_host_memory_is_not_on_the_device():
    here = one(*FULL, "parallel=zero3")
    away = one(*FULL, "parallel=zero3_offload")
    assert away.memory.weights == away.memory.optimizer == away.memory.gradients == 0
    # weights, and 4 + 8 + 4 bytes for each that trains
    trained = here.memory.optimizer / 8
    assert away.memory.host == pytest.approx(here.memory.weights + 16 * trained, rel=1e-6)
    assert here.memory.host == 0
    assert dataclasses.asdict(here.config)["parallel"]["zero"] == 3
