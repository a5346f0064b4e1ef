"""However a layer is run, the gradients are the same bits; what it leaves behind is what recompute.py says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ernie_model import recompute as module
from ernie_model.context import Packed
from ernie_model.model import ErnieModel
from ernie_model.recompute import Runner, keep_activations, recompute, recompute_offload
from tests.train import small

RUNNERS = (keep_activations, recompute, recompute_offload)
ROW = small.row(small.example(0, 9, image=True), small.example(1, 7))
TOKENS, WIDTH = 16, small.CONFIG.hidden_size


def build(layers: Runner, blocks: Runner, device: str = "cpu") -> ErnieModel:
    torch.manual_seed(0)
    model = ErnieModel(small.CONFIG).to(device)
    assert model.vision is not None
    model.run_layer, model.vision.run_block = layers, blocks
    return model


def backward(model: ErnieModel) -> dict[str, Tensor]:
    row = ROW.to(model.head_VD.device)
    out = model(row.token_T, row.position_3T, Packed(row.lengths), patch_PX=row.patch_PX, grids=row.grids)
    (out.hidden_TD @ model.head_VD.T).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers, blocks", [(layers, blocks) for layers in RUNNERS for blocks in RUNNERS])
def test_the_gradients_are_the_same_bits(layers, blocks):
    expected, found = backward(build(keep_activations, keep_activations)), backward(build(layers, blocks))
    assert expected.keys() == found.keys() and len(found) > 40
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("layers, blocks", [(layers, blocks) for layers in RUNNERS for blocks in RUNNERS])
def test_the_gradients_are_the_same_bits_on_a_gpu(layers, blocks):
    torch.use_deterministic_algorithms(True)
    try:
        expected = backward(build(keep_activations, keep_activations, "cuda"))
        found = backward(build(layers, blocks, "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.gpu
def test_inputs_leave_the_gpu():
    x = torch.randn(1 << 20, device="cuda")
    kept = module._to_host(x)
    assert isinstance(kept, module._OnHost) and kept.host.is_pinned()
    expected = x.clone()
    del x
    torch.empty(1 << 20, device="cuda").fill_(7.0)  # would overwrite memory that was given away too early
    assert torch.equal(module._to_device(kept), expected)


def kept_by_layers(run: Runner) -> list[Tensor]:
    """What the text layers of one forward pass leave behind."""
    kept: list[Tensor] = []

    def watched(layer, *arguments):
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return run(layer, *arguments)

    model = build(watched, keep_activations)
    backward(model)
    return kept


def test_a_recomputed_layer_keeps_its_input_only():
    assert [tuple(x.shape) for x in kept_by_layers(recompute)] == [(TOKENS, WIDTH)] * 2
    assert len(kept_by_layers(keep_activations)) > 20


def moved(monkeypatch, prepare: Callable[[ErnieModel], object]) -> list[tuple[int, ...]]:
    """Shapes of what would go to host memory, and back, in a step whose layers and blocks all offload."""
    away: list[tuple[int, ...]] = []
    back: list[tuple[int, ...]] = []
    monkeypatch.setattr(module, "_to_host", lambda x: away.append(tuple(x.shape)) or x.clone())
    monkeypatch.setattr(module, "_to_device", lambda x: back.append(tuple(x.shape)) or x)
    model = build(recompute_offload, recompute_offload)
    prepare(model)
    backward(model)
    assert back == away[::-1]  # each once, the last one first
    return away


def test_offloading_moves_the_inputs_and_nothing_else(monkeypatch):
    assert moved(monkeypatch, lambda model: None) == [(8, 8), (TOKENS, WIDTH), (TOKENS, WIDTH)]


def test_offloading_moves_nothing_for_a_frozen_tower(monkeypatch):
    def freeze_tower(model: ErnieModel) -> None:
        assert model.vision is not None
        model.vision.requires_grad_(False)

    assert moved(monkeypatch, freeze_tower) == [(TOKENS, WIDTH), (TOKENS, WIDTH)]
