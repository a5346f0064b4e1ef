"""Codes and scales by definition; quantised modules against the same modules with w^; files there and back."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ernie_model.checkpoint import CheckpointError, load_model, save_model
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.context import Packed
from ernie_model.inference import quantize
from ernie_model.inference.quantize import (
    QUANTISABLE,
    Calibration,
    QuantisedExperts,
    QuantisedModule,
    Quantization,
    Scheme,
    dequantise,
    load_quantised,
    pack,
    quantise,
    quantise_model,
    quantization_of,
    stored_bytes,
    unpack,
    write_quantised,
)
from ernie_model.model import ErnieModel
from ernie_model.moe import Experts
from ernie_model.parts import Part, part_of
from ernie_model.rope import position_ids

EVERYTHING = {part: Scheme.INT4 for part in QUANTISABLE}


@pytest.fixture(scope="module")
def config() -> ErnieConfig:
    return ErnieConfig(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=112,
        num_experts=4,
        experts_per_token=2,
        text_expert_width=48,
        vision_expert_width=16,
        num_shared_experts=1,
        sparse_layers=(1, 2),
        mrope_section=(3, 3, 2),
        vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=64),
        image_token_id=152,
        image_start_token_id=150,
        image_end_token_id=151,
        video_token_id=155,
        video_start_token_id=153,
        video_end_token_id=154,
    )


def random_model(config: ErnieConfig, dtype: torch.dtype = torch.float32) -> ErnieModel:
    torch.manual_seed(3)
    model = ErnieModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.set_dtype(dtype).requires_grad_(False).eval()


def run(model: ErnieModel, seed: int = 0) -> torch.Tensor:
    """Logits of a row with text and an image."""
    random = torch.Generator().manual_seed(seed)
    image = [150, *[152] * 6, 151]
    ids = torch.tensor([*torch.randint(3, 140, (9,), generator=random).tolist(), *image, 7, 8, 9])
    grids = [(1, 4, 6)]
    patches = torch.randn(24, model.config.vision.patch_dim, generator=random)
    positions = position_ids(ids, grids, model.config)
    with torch.no_grad():
        out = model(ids, positions, Packed([len(ids)]), patch_PX=patches, grids=grids)
        return model.logits(out.hidden_TD)


@given(st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_unpacking_what_was_packed(bits, rows, eights, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 8 * eights), generator=random, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(unpack(packed, bits, torch.float32), codes.float())


def test_packing_by_hand():
    assert pack(torch.tensor([1, 2, 3, 15], dtype=torch.uint8), 4).tolist() == [1 + 3 * 16, 2 + 15 * 16]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [1 + 2 * 4 + 3 * 16]


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("shape", [(5, 128), (3, 7, 100), (2, 588), (1, 1)])
def test_no_weight_is_off_by_more_than_half_a_step(scheme, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, shape[-1])
    weight[0] = 0
    weight[-1].flatten()[0] = -3.0
    one = quantise(weight, scheme, 32, search=False)
    back = dequantise(one, scheme, shape[-1], torch.float64)
    scale = one.scale.double()[..., None]
    if scheme is not Scheme.INT8:
        scale = scale.expand(*one.scale.shape, quantize.group_of(shape[-1], 32)).flatten(-2)[..., : shape[-1]]
    assert ((back - weight.double()).abs() <= scale / 2 * (1 + 1e-6)).all()
    assert (one.codes.shape, one.scale.shape) == quantize.shapes_of(shape, scheme, 32)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_searched_scale_is_never_worse_and_weighs_errors(scheme):
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 128, generator=random)
    importance = torch.logspace(-3, 3, 128)

    def error(**options) -> torch.Tensor:
        back = dequantise(quantise(weight, scheme, 64, **options), scheme, 128, torch.float32)
        return (back - weight).square() @ importance

    plain, searched = error(search=False), error(importance=importance)
    assert (searched <= plain * (1 + 1e-6)).all()
    if scheme is Scheme.INT2:
        assert searched.sum() < 0.8 * plain.sum() and searched.sum() < error().sum()


def test_each_expert_has_its_own_importance():
    weight = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(4))
    importance = torch.stack([torch.logspace(-2, 2, 64), torch.logspace(2, -2, 64)])
    both = quantise(weight, Scheme.INT2, 64, importance)
    for expert in range(2):
        alone = quantise(weight[expert], Scheme.INT2, 64, importance[expert])
        assert torch.equal(both.codes[expert], alone.codes) and torch.equal(both.scale[expert], alone.scale)


def test_int8_is_torchaos_to_a_step():
    """An implementation that is not ours. It divides by 127.5 or 127 and does not round scales to bfloat16."""
    # Not among the tests' packages: wherever it is installed, transformers and peft load it, and it warns at length.
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore

    linear = torch.nn.Linear(96, 32, bias=False).requires_grad_(False)
    one = quantise(linear.weight, Scheme.INT8, search=False)
    ours = dequantise(one, Scheme.INT8, 96, torch.float32)
    weight = linear.weight.clone()
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    theirs = linear.weight.dequantize()
    step = one.scale.float()[:, None]
    assert ((ours - theirs).abs() <= 1.01 * step).all()
    assert (ours - weight).square().mean() < 1.05 * (theirs - weight).square().mean()


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), Scheme.INT8)


# ------------------------------------------------------------------------------------------------------------- modules


def with_written_out_weights(quantised: ErnieModel, plain: ErnieModel) -> ErnieModel:
    """The plain model with w^ in the place of every quantised weight."""
    out = copy.deepcopy(plain)
    names = {"gate_up": "gate_up_EFD", "down": "down_EDF", "weight": "weight"}
    for name, module in quantised.named_modules():
        if isinstance(module, QuantisedModule):
            for ours in module.shapes:
                target = out.get_submodule(name).get_parameter(names[ours])
                target.data = module.dequantised(ours, torch.float64).to(target.dtype)
    return out


@pytest.mark.parametrize("scheme", Scheme)
def test_a_quantised_model_computes_with_the_written_out_weights(config, scheme):
    plain = random_model(config, torch.float64)
    quantised = copy.deepcopy(plain)
    replaced = quantise_model(quantised, Quantization({part: scheme for part in QUANTISABLE}, 32))
    expected = {n for n, m in plain.named_modules() if type(m).__name__ in ("Linear", "Experts", "Embedding")}
    assert set(replaced) == expected
    written_out = with_written_out_weights(quantised, plain)
    torch.testing.assert_close(run(quantised), run(written_out), rtol=1e-10, atol=1e-10)
    assert (run(quantised) - run(plain)).abs().max() > 1e-3  # something was quantised


@pytest.mark.parametrize("part", QUANTISABLE)
def test_each_part_alone(config, part):
    model = random_model(config)
    replaced = quantise_model(model, Quantization({part: Scheme.INT8}))
    assert replaced and {part_of(f"{name}.weight") for name in replaced} == {part}
    assert run(model).isfinite().all()


def test_bfloat16_on_the_cpu_uses_kernels_for_few_rows(config, monkeypatch):
    """What the kernels compute differs from the written-out product by the rounding of bfloat16 alone."""
    plain = random_model(config, torch.bfloat16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    called, kernel = [], quantize._int4_kernel
    monkeypatch.setattr(quantize, "_int4_kernel", lambda *args: called.append(1) or kernel(*args))
    for scheme in (Scheme.INT4, Scheme.INT8):
        model = copy.deepcopy(plain)
        quantise_model(model, Quantization({Part.ATTENTION: scheme, Part.TEXT_EXPERTS: scheme}, 32))
        linear, experts = model.layers[1].self_attn.q_proj, model.layers[1].mlp.text.experts
        weight = linear.dequantised("weight", torch.float64)
        counts = torch.tensor([1, 0, 2, 0])
        gate_up, down = (experts.dequantised(name, torch.float64) for name in ("gate_up", "down"))
        written_out = Experts(4, 64, 48).double()
        written_out.gate_up_EFD.data, written_out.down_EDF.data = gate_up, down
        quantize.prepare(model)
        assert linear.for_kernel == experts.for_kernel == (scheme is Scheme.INT4)
        called.clear()
        # 2^-8 is the rounding of one bfloat16; products of 64 terms, each rounded weight and input exact
        out = linear(x).double()
        exact = x.double() @ weight.T
        assert (out - exact).abs().max() < 2**-7 * exact.abs().max()
        out, exact = experts(x, counts).double(), written_out(x.double(), counts).detach()
        assert (out - exact).abs().max() < 2**-5 * exact.abs().max()
        assert bool(called) == (scheme is Scheme.INT4)


@pytest.mark.parametrize("scheme", Scheme)
def test_few_rows_of_a_width_that_no_kernel_likes(config, scheme):
    """A patch has 588 numbers."""
    model = random_model(config, torch.bfloat16)
    quantise_model(model, Quantization({Part.VISION: scheme}))
    linear = model.vision.patch_embed
    weight = linear.dequantised("weight", torch.float64)
    quantize.prepare(model)
    for rows in (1, 2, 16, 40):
        x = torch.randn(rows, 588, generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact = x.double() @ weight.T
        assert (linear(x).double() - exact).abs().max() < 2**-6 * exact.abs().max()


def test_experts_without_rows(config):
    model = random_model(config)
    quantise_model(model, Quantization({Part.VISION_EXPERTS: Scheme.INT4}))
    experts = model.layers[1].mlp.vision.experts
    assert isinstance(experts, QuantisedExperts)
    assert experts(torch.zeros(0, 64), torch.zeros(4, dtype=torch.int64)).shape == (0, 64)


def test_a_part_that_is_not_there_and_one_that_stays(config):
    text = config.replace(vision=None, vision_expert_width=0, mrope_section=None)
    with pytest.raises(ValueError, match="no modules in vision"):
        quantise_model(ErnieModel(text), Quantization({Part.VISION: Scheme.INT4}))
    with pytest.raises(ValueError, match="router cannot be quantised"):
        Quantization({Part.ROUTER: Scheme.INT8})
    with pytest.raises(ValueError, match="group is 48"):
        Quantization({}, 48)


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration_is_the_mean_square_of_what_each_tensor_meets(config):
    model = random_model(config)
    seen: dict[str, list[torch.Tensor]] = {}
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, x: seen.setdefault("o", []).append(x[0]))
    experts = model.layers[1].mlp.text.experts
    experts.register_forward_pre_hook(lambda m, x: seen.setdefault("e", []).append(x))
    with Calibration(model, Quantization(EVERYTHING)) as calibration:
        run(model, 0), run(model, 1)
    found = calibration.importance()
    torch.testing.assert_close(found["layers.0.self_attn.o_proj.weight"], torch.cat(seen["o"]).square().mean(0))
    expert, rows, hidden = 1, [], []
    pool = torch.cat([x for x, _ in seen["e"]]).square().mean(0)
    for x, counts in seen["e"]:
        start, count = counts[:expert].sum(), counts[expert]
        rows.append(x[start : start + count])
        gate, up = (rows[-1] @ experts.gate_up_EFD[expert].T).chunk(2, -1)
        hidden.append(F.silu(gate) * up)
    square = torch.cat(rows).square()
    expected = (square.sum(0) + 16 * pool) / (len(square) + 16)
    torch.testing.assert_close(found["layers.1.mlp.text.experts.gate_up_EFD"][expert], expected)
    assert found["layers.1.mlp.text.experts.down_EDF"].shape == (4, 48)
    assert found["embed_tokens.weight"].shape == (64,)  # the tied head
    names = {name for name, p in model.named_parameters() if p.ndim > 1 and ".router." not in name}
    assert set(found) == names
    run(model)  # no hook is left behind
    assert calibration.importance().keys() == found.keys()


def test_calibrated_scales_make_the_outputs_better(config):
    torch.manual_seed(0)
    layer = ErnieModel(config)
    inputs = torch.randn(500, 64) * torch.logspace(-2, 1, 64)
    linear = layer.layers[0].self_attn.q_proj
    exact = inputs @ linear.weight.T

    def error(importance) -> float:
        one = quantise(linear.weight.detach(), Scheme.INT2, 64, importance)
        return (inputs @ dequantise(one, Scheme.INT2, 64, torch.float32).T - exact).square().mean().item()

    assert error(inputs.square().mean(0)) < 0.9 * error(None)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_there_and_back(config, tmp_path, dtype):
    model = random_model(config, dtype)
    settings = Quantization({Part.TEXT_EXPERTS: Scheme.INT4, Part.ATTENTION: Scheme.INT8, Part.VISION: Scheme.INT2}, 32)
    quantise_model(model, settings)
    write_quantised(model, settings, tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert quantization_of(tmp_path) == settings
    again = load_quantised(tmp_path)
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert again.layers[1].mlp.text.router.weight_ED.dtype == torch.float32
    if dtype is torch.float32:
        assert torch.equal(run(again), run(model))
        wide = load_quantised(tmp_path, dtype=torch.bfloat16)
        assert wide.norm.weight.dtype == torch.bfloat16 and run(wide).dtype == torch.bfloat16
    sizes = stored_bytes(config, settings, dtype)
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in model.state_dict().values())
    with pytest.raises(CheckpointError, match="quantised"):
        load_model(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="of which 1 are not there: model-00002"):
        load_quantised(tmp_path)


@pytest.mark.parametrize(("scheme", "expected"), [(None, 56), (Scheme.INT4, 14), (Scheme.INT2, 7)])
def test_the_size_of_the_28b_model(scheme, expected):
    """GiB, from the configuration alone; `python -m tests.bench.quantize --sizes` shows more."""
    path = Path(__file__).resolve().parents[3] / "configs" / "model" / "ernie_4_5_vl_28b_a3b.yaml"
    config = ErnieConfig.from_json(yaml.safe_load(path.read_text())["config"])
    sizes = stored_bytes(config, Quantization({part: scheme for part in QUANTISABLE} if scheme else {}))
    assert sum(sizes.values()) / 2**30 == pytest.approx(expected, rel=0.05)


def test_files_that_do_not_fit(config, tmp_path):
    model = random_model(config)
    settings = Quantization({Part.DENSE: Scheme.INT4})
    quantise_model(model, settings)
    write_quantised(model, settings, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["parts"]["dense"] = "int2"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="_proj.weight_codes is .* and config.json asks for"):
        load_quantised(tmp_path)
    raw["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="quant_method='awq'"):
        load_quantised(tmp_path)
    save_model(random_model(config), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        load_quantised(tmp_path / "plain")
