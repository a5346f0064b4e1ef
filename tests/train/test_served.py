"""Settings to a model at work: weights, adapters merged in memory, quantised weights."""

import math
from pathlib import Path

import pytest
import torch

from ernie_model.atomic import atomic_folder
from ernie_model.config import PositionAfterVideo
from ernie_model.context import Packed
from ernie_model.inference.quantize import QuantisedModule, Quantization, Scheme, quantise_model, write_quantised
from ernie_model.inference.request import MediaItem
from ernie_model.inference.runner import Row, Runner
from ernie_model.model import ErnieModel
from ernie_model.parts import Part
from ernie_model.rope import position_ids
from tests.tiny import SPARSE, save_tiny, tiny_processor
from train.calibration import quantise
from train.config import PeftConfig, PeftKind, PositionRule, Precision, UserError
from train.inference_config import Bits, QuantizeConfig, Weights
from train.lora.adapt import adapt
from train.served import open_model

CONFIG = SPARSE.replace(num_shared_experts=1, initializer_range=0.1)
GRID = (1, 4, 6)
SETTINGS = dict(precision=Precision.fp32, cpu=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_tiny(CONFIG, folder)
    return folder


def row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and patches of text, an image, and text."""
    image = [CONFIG.image_start_token_id, *[CONFIG.image_token_id] * 6, CONFIG.image_end_token_id]
    ids = torch.tensor([5, 6, 7, *image, 300, 301, 302])
    random = torch.Generator().manual_seed(1)
    return ids, position_ids(ids, [GRID], CONFIG), torch.randn(24, 588, generator=random)


@torch.no_grad()
def logits(model: ErnieModel) -> torch.Tensor:
    ids, positions, patches = row()
    out = model(ids, positions, Packed([len(ids)]), patch_PX=patches, grids=[GRID])
    return model.logits(out.hidden_TD)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_in_memory(base, tmp_path, rslora):
    plain = open_model(Weights(checkpoint=str(base), **SETTINGS)).model
    trained = open_model(Weights(checkpoint=str(base), **SETTINGS))
    targets = ["attention", "text_experts", "vision_experts", "vision"]
    config = PeftConfig(kind=PeftKind.lora, rank=4, alpha=8.0, rslora=rslora, targets=targets)
    adapters = adapt(trained.model, config, seed=0, base=str(base))
    for name, parameter in trained.model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    adapters.publish(tmp_path / "run", "export", trained.processor)
    merged = open_model(Weights(checkpoint=str(base), adapter=str(tmp_path / "run" / "adapter"), **SETTINGS)).model
    torch.testing.assert_close(logits(merged), logits(trained.model), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(plain)).abs().max() > 0.1
    (tmp_path / "run" / "run.json").write_text("{}")  # the run folder will do
    again = open_model(Weights(checkpoint=str(base), adapter=str(tmp_path / "run"), **SETTINGS)).model
    assert torch.equal(logits(again), logits(merged))
    with pytest.raises(UserError, match="adapter=.*nothing cannot be read as an adapter"):
        open_model(Weights(checkpoint=str(base), adapter=str(tmp_path / "nothing"), **SETTINGS))


def test_weights_are_quantised_in_memory_as_they_would_be_in_a_folder(base, tmp_path):
    settings = QuantizeConfig(text_experts=Bits.int4, attention=Bits.int8, group=32)
    served = open_model(Weights(checkpoint=str(base), quantize=settings, **SETTINGS))
    model = open_model(Weights(checkpoint=str(base), **SETTINGS)).model
    quantization = Quantization({Part.TEXT_EXPERTS: Scheme.INT4, Part.ATTENTION: Scheme.INT8}, 32)
    quantise_model(model, quantization)
    folder = tmp_path / "quantised"
    with atomic_folder(folder) as temporary:
        write_quantised(model, quantization, temporary)
        served.processor.save(temporary)
    read = open_model(Weights(checkpoint=str(folder), **SETTINGS))
    assert isinstance(read.model.layers[1].mlp.text.experts, QuantisedModule)
    assert torch.equal(logits(served.model), logits(read.model))
    for change in (dict(adapter="a"), dict(quantize=settings)):
        with pytest.raises(UserError, match="is quantised already"):
            open_model(Weights(checkpoint=str(folder), **change, **SETTINGS))


def test_a_part_that_the_model_lacks():
    text = SPARSE.replace(vision=None, vision_expert_width=0, mrope_section=None)
    processor = tiny_processor(text)
    with pytest.raises(UserError, match="^quantize: this model has no modules in vision;"):
        quantise(ErnieModel(text), processor, QuantizeConfig(vision=Bits.int8))


def test_settings_of_quantize():
    with pytest.raises(UserError, match="group is 48; use 32"):
        QuantizeConfig(group=48)
    dense = QuantizeConfig(dense=Bits.int8, shared=Bits.int4)
    assert dense.parts() == {"dense": "int8", "shared": "int4"}


def test_calibration_with_images_of_a_task(base):
    settings = QuantizeConfig(text_experts=Bits.int2, vision_experts=Bits.int2, vision=Bits.int2, group=32)
    plain = open_model(Weights(checkpoint=str(base), quantize=settings, **SETTINGS)).model
    settings.calibration, settings.examples = "digits", 3
    calibrated = open_model(Weights(checkpoint=str(base), quantize=settings, **SETTINGS)).model
    for name in ("layers.1.mlp.text.experts", "layers.1.mlp.vision.experts", "vision.patch_embed"):
        ours, theirs = (list(model.get_submodule(name).buffers()) for model in (plain, calibrated))
        assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    settings.calibration = "nothing.jsonl"
    with pytest.raises(Exception, match="quantize.calibration"):
        open_model(Weights(checkpoint=str(base), quantize=settings, **SETTINGS))


@pytest.mark.parametrize("bits", Bits)
def test_the_runner_computes_what_a_whole_forward_does(base, bits):
    """With every part quantised: what it fuses, it must leave alone here."""
    parts = {part.value: bits for part in Part if part not in (Part.ROUTER, Part.NORMS)}
    served = open_model(Weights(checkpoint=str(base), quantize=QuantizeConfig(**parts, group=32), **SETTINGS))
    ids, positions, patches = row()
    runner = Runner(served.model, num_pages=4, page_tokens=8, max_rows=2)
    features = runner.media_features([MediaItem(GRID, patches)])
    cut = len(ids) - 2
    first = Row(ids[:cut].tolist(), positions[:, :cut], 0, [0, 1], features, num_logits=cut)
    steps = [runner.run([first]).logit_SV]
    for at in range(cut, len(ids)):
        steps.append(runner.run([Row([int(ids[at])], positions[:, at : at + 1], at, [0, 1])]).logit_SV)
    expected = logits(served.model)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.cat(steps), expected, rtol=1e-4, atol=1e-4)


def test_the_processor_follows_an_overridden_position_rule(base):
    served = open_model(Weights(checkpoint=str(base), position_after_video=PositionRule.last, **SETTINGS))
    assert served.model.config.position_after_video is PositionAfterVideo.LAST
    assert served.processor.config == served.model.config
    assert math.isfinite(logits(served.model).sum())


@pytest.mark.parametrize(
    "file, way_out",
    [
        ("state.json", "ernie export checkpoint="),
        ("adapter_config.json", "checkpoint=BASE adapter="),
        ("export/config.json", "Did you mean checkpoint="),
        ("notes.txt", "Name a folder of weights"),
    ],
)
def test_a_folder_without_weights_is_refused_with_the_way_out(tmp_path, file, way_out):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"^checkpoint={tmp_path} holds no config.json.*{way_out}"):
        open_model(Weights(checkpoint=str(tmp_path), cpu=True))


def test_weights_that_are_rounded_when_they_are_read_are_said_to_be(base, caplog):
    open_model(Weights(checkpoint=str(base), cpu=True))
    assert "precision=fp32 keeps them" in caplog.text
    caplog.clear()
    open_model(Weights(checkpoint=str(base), precision=Precision.fp32, cpu=True))
    assert not caplog.text


def test_the_folder_of_a_run_that_trained_an_adapter_says_how_to_name_it(tmp_path):
    for file in ("run.json", "adapter/adapter_config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"trained an adapter.*checkpoint=BASE adapter={tmp_path / 'adapter'}"):
        open_model(Weights(checkpoint=str(tmp_path), cpu=True))
