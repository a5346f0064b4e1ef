"""The name table: complete, one to one, and the one transformers writes."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ernie_model.config import ErnieConfig
from ernie_model.hub import assemble, hub_pieces, hub_tensors, module_pieces, pieces_by_stored_name
from ernie_model.model import ErnieModel
from tests.parity.reference import SHAPES, VL_SHAPE, Shape, make_reference

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as reader:
        return {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}


@each_shape
@pytest.mark.parametrize("layout", [hub_pieces, module_pieces])
def test_every_element_of_ours_has_one_place(shape: Shape, layout, tmp_path: Path):
    make_reference(shape).config.save_pretrained(tmp_path)
    config = ErnieConfig.load(tmp_path)
    ours = {name: torch.zeros_like(t, dtype=torch.int64) for name, t in ErnieModel(config).state_dict().items()}
    for piece in layout(config):
        part = ours[piece.ours][piece.index] if piece.index else ours[piece.ours]
        part += 1
    assert {name: t.unique().tolist() for name, t in ours.items()} == {name: [1] for name in ours}


@each_shape
def test_names_and_shapes_are_those_transformers_writes(shape: Shape, tmp_path: Path):
    reference = make_reference(shape)
    reference.save_pretrained(tmp_path / "hub")
    reference.save_pretrained(tmp_path / "modules", save_original_format=False)
    config = ErnieConfig.load(tmp_path / "hub")
    ours = ErnieModel(config).state_dict()

    hub = {name: tuple(assemble(pieces, ours).shape) for name, pieces in hub_tensors(config).items()}
    # transformers puts `model.` before the vision tower, the public repositories do not (reference 5.2)
    written = header(tmp_path / "hub" / "model.safetensors")
    assert hub == {name.replace("model.vision_model.", "vision_model."): size for name, size in written.items()}
    modules = {piece.stored: piece.stored_shape(ours[piece.ours]) for piece in module_pieces(config)}
    assert modules == header(tmp_path / "modules" / "model.safetensors")
    assert {*written, *hub, *modules} <= set(pieces_by_stored_name(config))


def test_the_listing_of_the_reference(tmp_path: Path):
    """Reference 5.4: the hub layout of the tiny vision-language model has 173 tensors; these are the peculiar ones."""
    make_reference(VL_SHAPE).config.save_pretrained(tmp_path)
    config = ErnieConfig.load(tmp_path)
    ours = ErnieModel(config).state_dict()
    shapes = {name: tuple(assemble(pieces, ours).shape) for name, pieces in hub_tensors(config).items()}
    assert len(shapes) == 173
    assert shapes["model.layers.1.mlp.gate.weight"] == (64, 8)
    assert shapes["model.layers.1.mlp.gate.weight_1"] == (64, 8)
    assert shapes["model.layers.2.mlp.moe_statics.e_score_correction_bias"] == (2, 8)
    assert shapes["model.layers.2.mlp.experts.7.up_proj.weight"] == (48, 64)
    assert shapes["model.layers.2.mlp.experts.8.up_proj.weight"] == (16, 64)
    assert shapes["model.layers.2.mlp.experts.15.down_proj.weight"] == (64, 16)
    assert shapes["vision_model.patch_embed.proj.weight"] == (32, 588)
    assert shapes["model.resampler_model.temporal_linear.3.bias"] == (128,)
    assert "lm_head.weight" not in shapes
    kinds = Counter(name.split(".")[0] for name in shapes)
    assert kinds == {"model": 173 - 27, "vision_model": 27}


def test_pieces_by_hand(tmp_path: Path):
    """E = 8, text width 48: vision expert 2 is stored expert 10; gate rows come before up rows; gates are turned."""
    make_reference(VL_SHAPE).config.save_pretrained(tmp_path)
    config = ErnieConfig.load(tmp_path)
    ours = {name: torch.randn_like(t) for name, t in ErnieModel(config).state_dict().items()}
    table = hub_tensors(config)

    def stored(name: str) -> torch.Tensor:
        return assemble(table[f"model.layers.1.mlp.{name}"], ours)

    text, vision = (ours[f"layers.1.mlp.{pool}.experts.gate_up_EFD"] for pool in ("text", "vision"))
    assert torch.equal(stored("experts.3.gate_proj.weight"), text[3, :48])
    assert torch.equal(stored("experts.3.up_proj.weight"), text[3, 48:])
    assert torch.equal(stored("experts.10.gate_proj.weight"), vision[2, :16])
    assert torch.equal(stored("experts.10.down_proj.weight"), ours["layers.1.mlp.vision.experts.down_EDF"][2])
    assert torch.equal(stored("gate.weight_1"), ours["layers.1.mlp.vision.router.weight_ED"].T)
    bias = stored("moe_statics.e_score_correction_bias")
    assert torch.equal(bias[0], ours["layers.1.mlp.text.router.correction_bias_E"])
    assert torch.equal(bias[1], ours["layers.1.mlp.vision.router.correction_bias_E"])
    # nothing is copied that does not have to move
    assert stored("experts.3.up_proj.weight").data_ptr() == text[3, 48:].data_ptr()
