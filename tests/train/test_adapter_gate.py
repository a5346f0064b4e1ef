"""Every way in which an adapter gets lost, done to real files: the gate names it, and nothing appears."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.lora.test_adapt import PROCESSOR, adapted, randomise, settings
from train import adapter_gate
from train.adapter_gate import AdapterError, check_adapter, check_merged
from train.lora import adapt as adapt_module
from train.lora.files import CONFIG, WEIGHTS

LAYER = "base_model.model.model.language_model.layers.1."
Q = f"{LAYER}self_attn.q_proj.lora_B.weight"
EXPERTS = f"{LAYER}mlp.vision_moe.experts."


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    _, adapters = adapted(settings(merge=True, ranks={"vision_experts": 2}))
    randomise(adapters)
    root = tmp_path_factory.mktemp("gate")
    adapters.publish(root, "export", PROCESSOR)
    return root, adapters


@pytest.fixture
def folder(published, tmp_path):
    """Copies that a test may damage."""
    import shutil

    shutil.copytree(published[0], tmp_path / "run")
    return tmp_path / "run", published[1]


def change(path, name, function):
    tensors = load_file(path)
    value = function(tensors[name])
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value.contiguous()
    save_file(tensors, path)


def set_in(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_was_trained_passes(published):
    root, adapters = published
    checked = check_adapter(root / "adapter", adapters)
    assert checked.tensors == sum(p.requires_grad for p in adapters.model.parameters())
    assert checked.rows > 100 and checked.worst <= 1
    checked = check_merged(root / "export", adapters)
    assert checked.tensors == len(load_file(root / "export" / "model.safetensors"))
    assert checked.worst <= 1


def one_row(value):
    value = value.clone()
    value[3] += 1e-4
    return value


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (Q, lambda x: None, "q_proj.lora_B.weight is missing"),
        (Q, torch.zeros_like, "is all zero, though training moved it"),
        (Q, lambda x: x.T, r"is \(4, 16\) \(transposed\), not \(16, 4\)"),
        (Q, lambda x: x[:-1], r"is \(15, 4\), not \(16, 4\)"),
        (Q, lambda x: x * torch.nan, "is not finite"),
        (Q, lambda x: x * 2, "differs from the live tensor"),
        (Q, one_row, "differs from the live tensor by up to 0.0001"),
        (Q, lambda x: x.flip(0), "differs from the live tensor"),
        (Q.replace("lora_B", "lora_A"), torch.zeros_like, "is all zero, though training moved it"),
        (f"{EXPERTS}lora_B.weight", lambda x: None, "experts.lora_B.weight is missing"),
        # rank by rank where peft reads expert by expert, and the other way round
        (f"{EXPERTS}lora_B.weight", lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1), "differs"),
        (
            f"{EXPERTS}base_layer.lora_A.weight",
            lambda x: x.unflatten(0, (4, 2)).transpose(0, 1).flatten(0, 1),
            "differs",
        ),
        # the last expert's part alone
        (f"{EXPERTS}base_layer.lora_A.weight", lambda x: torch.cat([x[:-2], 0 * x[-2:]]), "differs"),
    ],
)
def test_a_damaged_tensor_is_named(folder, name, function, reason):
    run, adapters = folder
    change(run / "adapter" / WEIGHTS, name, function)
    with pytest.raises(AdapterError, match=reason):
        check_adapter(run / "adapter", adapters)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (dict(lora_alpha=4.0), "scales .* by 1, and it was trained with 2"),
        (dict(use_rslora=True), "scales .* by 4, and it was trained with 2"),
        (dict(r=8), "rank 8, and it was trained with 4"),
        (dict(rank_pattern={}), "rank 4, and it was trained with 2"),
    ],
)
def test_a_wrong_scale_is_named(folder, values, reason):
    run, adapters = folder
    set_in(run / "adapter" / CONFIG, **values)
    with pytest.raises(AdapterError, match=reason):
        check_adapter(run / "adapter", adapters)


def test_a_tensor_of_nobody_and_a_broken_file(folder):
    run, adapters = folder
    path = run / "adapter" / WEIGHTS
    save_file(load_file(path) | {"base_model.model.other": torch.ones(2)}, path)
    with pytest.raises(AdapterError, match="holds base_model.model.other, which no live adapter has"):
        check_adapter(run / "adapter", adapters)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterError, match="cannot be read back"):
        check_adapter(run / "adapter", adapters)


def test_a_forward_that_does_not_do_what_the_factors_say_is_seen(published, monkeypatch):
    """The files equal the live factors; only the layer's function is wrong."""
    root, adapters = published
    module = "layers.1.self_attn.o_proj"
    layer = adapters.layers[module]
    monkeypatch.setattr(layer, "forward", lambda x: layer.base_layer(x))
    with pytest.raises(AdapterError, match=f"rows of W . BA of {module}.weight differ from the live model"):
        check_adapter(root / "adapter", adapters)


def test_a_new_adapter_may_be_zero_but_never_its_A(tmp_path):
    _, adapters = adapted()
    adapters.publish(tmp_path, "export", PROCESSOR)
    with torch.no_grad():
        adapters.layers["layers.0.self_attn.q_proj"].lora_A["default"].weight.zero_()
    with pytest.raises(AdapterError, match="is all zero, so it could never be trained"):
        adapters.publish(tmp_path, "best", PROCESSOR)
    assert not (tmp_path / "best_adapter").exists()


HUB = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (f"{HUB}self_attn.q_proj.weight", lambda x: None, "q_proj.weight is missing"),
        (f"{HUB}self_attn.q_proj.weight", torch.zeros_like, "differ from W . BA"),
        (f"{HUB}self_attn.q_proj.weight", lambda x: x.T, "differ from W . BA"),  # 16 x 16: the shape says nothing
        (f"{HUB}self_attn.k_proj.weight", lambda x: x.T, r"is \(16, 8\), not \(8, 16\)"),
        (f"{HUB}self_attn.q_proj.weight", lambda x: x * torch.inf, "is not finite"),
        (f"{HUB}mlp.experts.7.down_proj.weight", lambda x: x * 1.01, "differ from W . BA"),
        (f"{HUB}mlp.experts.4.gate_proj.weight", torch.zeros_like, "differ from W . BA"),
        ("model.norm.weight", lambda x: x * 0.5, "differ from W . BA"),  # not adapted at all
        (f"{HUB}mlp.moe_statics.e_score_correction_bias", lambda x: x + 1, "differ from W . BA"),
    ],
)
def test_a_damaged_merged_tensor_is_named(folder, name, function, reason):
    run, adapters = folder
    change(run / "export" / "model.safetensors", name, function)
    with pytest.raises(AdapterError, match=reason):
        check_merged(run / "export", adapters)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_a_merge_with_another_scale_is_seen(tmp_path, monkeypatch, scale):
    """Also scale 0: the base without its adapter."""
    _, adapters = adapted(settings(merge=True))
    randomise(adapters)
    right = adapters.merged

    def wrong(values):
        def read(tensor, index):
            base = adapters.base_tensor(tensor).detach()
            base = base[index] if index else base
            return base + scale * (right(values).read(tensor, index) - base)

        return right(values)._replace(read=read)

    monkeypatch.setattr(adapters, "merged", wrong)
    with pytest.raises(AdapterError, match="differ from W . BA of the live model"):
        adapters.publish(tmp_path, "export", PROCESSOR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]  # the merged folder never appeared


def test_a_refused_folder_leaves_the_earlier_one(tmp_path, monkeypatch):
    _, adapters = adapted()
    randomise(adapters)
    (folder,) = adapters.publish(tmp_path, "export", PROCESSOR)
    before = (folder / WEIGHTS).read_bytes()
    randomise(adapters, seed=8)
    write = adapt_module.write_adapter

    def lose_one(folder, *rest):
        write(folder, *rest)
        change(folder / WEIGHTS, Q, torch.zeros_like)

    monkeypatch.setattr(adapt_module, "write_adapter", lose_one)
    with pytest.raises(AdapterError, match="all zero"):
        adapters.publish(tmp_path, "export", PROCESSOR)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_sampling_takes_the_first_and_the_last():
    assert adapter_gate._spread(10, 4) == [0, 3, 6, 9]
    assert adapter_gate._spread(2, 4) == [0, 1]
    assert adapter_gate._spread(1, 4) == [0]
