"""What a step is said to hold in memory, against what torch's allocator hands out while one is taken."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.memory import allocated_mib
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from train.build import compute_dtype, set_recompute
from train.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PeftConfig,
    PeftKind,
    Precision,
    Recompute,
)
from train.footprint import Footprint, Kind, _highest, _Stage, footprint, pieces_of
from train.optim import build_optimizer
from train.policy import Policy, on_device
from train.trained import freeze
from train.weights import trained_weights

CPU = torch.device("cpu")
TINY = dataclasses.replace(SIZES["small"], layers=3, width=128, ffn=384, experts=4, vocabulary=2048, vision_layers=2)


def build(size, settings: ModelConfig, *, frozen: list[str], adapters: bool, device: str = "cpu") -> ErnieModel:
    with torch.device(device):
        model = ErnieModel(ErnieConfig.from_json(transformers_config(size).to_dict()))
        model.compute_dtype = compute_dtype(settings)
        set_recompute(model, settings)
        if adapters:
            trained_weights(model, PeftConfig(kind=PeftKind.lora), seed=0, base=None)
    freeze(model, OptimConfig(freeze=frozen))
    return model


def both(
    size,
    settings: ModelConfig,
    *,
    lengths: list[int],
    patches: int,
    rows: int = 1,
    frozen: list[str] | None = None,
    adapters: bool = False,
) -> tuple[Footprint, float]:
    """The estimate, and the bytes that a step of `rows` micro-batches held at most."""
    model = build(size, settings, frozen=frozen or [], adapters=adapters)
    policy = Policy(model, loss_is_linear=True).train()
    optimizer = build_optimizer(model, OptimConfig(freeze=[]))

    def step(segments: list[dict], rows: int) -> None:
        for _ in range(rows):
            batch, row_R = on_device(packed(segments, model.config), CPU)
            loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = random_segments(size, lengths, image_side=math.isqrt(patches))
    step(random_segments(size, [64], image_side=4), 1)  # AdamW's moments exist
    said = footprint(
        model,
        settings,
        max_tokens=sum(lengths),
        max_patches=patches * len(lengths),
        accumulation=rows,
        parallel=ParallelConfig(),
        ranks=1,
        device=CPU,
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values() if x.ndim)
    assert said.weights + said.optimizer == held
    return said, held + allocated_mib(lambda: step(row, rows)) * 2**20


def settings(way: Recompute = Recompute.none, precision: Precision = Precision.fp32) -> ModelConfig:
    return ModelConfig(config={}, processor="tiny", recompute=way, precision=precision)


def said_only(settings: ModelConfig, **chosen) -> Footprint:
    model = build(TINY, settings, **chosen, device="meta")
    return footprint(model, settings, **ROOM, accumulation=1, parallel=ParallelConfig(), ranks=1, device=CPU)


ROW: dict[str, Any] = dict(
    lengths=[1100], patches=24**2
)  # both longer than LONGEST_KEPT, whose probabilities are not counted
ROOM: dict[str, Any] = dict(max_tokens=1100, max_patches=24**2)


@pytest.mark.parametrize(
    "way, precision", [*((way, Precision.fp32) for way in Recompute), (Recompute.none, Precision.bf16)]
)
def test_a_small_step(way, precision):
    said, found = both(TINY, settings(way, precision), **ROW)
    assert said.peak == pytest.approx(found, rel=0.1)


def test_a_frozen_tower_keeps_nothing():
    tower, found = both(TINY, settings(), **ROW, frozen=["vision", "resampler"])
    assert tower.peak == pytest.approx(found, rel=0.15)  # nearly all of it is the head's, which is counted generously
    assert tower.peak < 0.95 * said_only(settings(), frozen=[], adapters=False).peak


def test_adapters_beside_weights_in_bfloat16():
    low = settings(precision=Precision.bf16)
    adapted, found = both(TINY, low, **ROW, adapters=True)
    assert adapted.peak == pytest.approx(found, rel=0.1)
    assert adapted.peak < 0.8 * said_only(low, frozen=[], adapters=False).peak


def test_the_second_row_of_an_update_meets_all_gradients():
    two, found = both(TINY, settings(), **ROW, rows=2)
    assert two.peak == pytest.approx(found, rel=0.1)
    assert two.peak - said_only(settings(), frozen=[], adapters=False).peak > 0.5 * two.gradients


def test_the_highest_point_by_hand():
    stages = [
        _Stage(kept=10, forward=20, backward=2, gradients=7),
        _Stage(kept=5, forward=5, backward=30, gradients=1),
        _Stage(kept=4, forward=13, backward=1, gradients=3),
    ]
    # forward 20, 10 + 5, 15 + 13 = 28; backward 19 + 1 + 3 = 23, 15 + 30 + 4 = 49, 10 + 2 + 11 = 23
    assert _highest(stages, already=None) == 49
    assert _highest(stages, already=11) == 15 + 30 + 11
    assert _highest([stages[0], stages[2]], already=None) == 10 + 13


def test_state_by_hand():
    """Bytes: 4 + 4 + 8 a parameter. Under adapters, in bfloat16: 2 a frozen one, 4 a router's, 16 an adapter's."""
    model = build(TINY, settings(), frozen=[], adapters=False, device="meta")
    here: dict[str, Any] = dict(max_tokens=64, max_patches=None, accumulation=1, parallel=ParallelConfig(), device=CPU)
    count = sum(p.numel() for p in model.parameters())
    assert footprint(model, settings(), ranks=1, **here).state == 16 * count
    assert footprint(model, settings(), ranks=2, **here).state == 20 * count
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    low = settings(precision=Precision.bf16)
    model = build(TINY, low, frozen=[], adapters=True, device="meta")
    own = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    state = footprint(model, low, ranks=1, **here).state
    assert 0 < own < count and state == 2 * (count - routers) + 4 * routers + 16 * own


def test_rounded_copies_are_of_the_matrices_of_products():
    model = build(TINY, settings(precision=Precision.bf16), frozen=[], adapters=False, device="meta")
    others = ("norm", ".ln.", ".router.", "embed_tokens")  # not kept, or never rounded; the head is counted apart
    count = sum(p.numel() for name, p in model.named_parameters() if not any(other in name for other in others))
    pieces = [piece for piece in pieces_of(model) if piece.kind is not Kind.HEAD]
    assert count == sum(w.count for piece in pieces for w in piece.weights if w.product)


@pytest.mark.slow
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("way", Recompute)
@pytest.mark.parametrize("conversations", [1, 2, 4])
def test_the_steps_of_docs_speed(conversations, way, precision):
    said, found = both(SIZES["small"], settings(way, precision), lengths=[2048] * conversations, patches=32**2)
    assert said.peak == pytest.approx(found, rel=0.1)
