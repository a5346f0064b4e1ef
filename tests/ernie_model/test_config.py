"""config.json in every form the family is published in, and the five released sizes."""

import json
from pathlib import Path

import pytest
import transformers
import yaml

from ernie_model.config import ConfigError, ErnieConfig, PositionAfterVideo
from ernie_model.counting import count_parameters

RELEASED = {file.stem: file for file in (Path(__file__).parents[2] / "configs" / "model").glob("ernie_4_5_*.yaml")}

# As Baidu publishes ERNIE-4.5-VL-28B-A3B (reference 1.1, 1.2, 1.4), with the keys that matter.
FLAT_VL_28B = dict(
    model_type="ernie4_5_moe_vl",
    hidden_size=2560,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    intermediate_size=12288,
    vocab_size=103424,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000,
    freq_allocation=20,
    use_bias=False,
    tie_word_embeddings=True,
    moe_num_experts=[64, 64],
    moe_k=6,
    moe_num_shared_experts=2,
    moe_intermediate_size=[1536, 512],
    moe_layer_start_index=[1, 1],
    moe_layer_end_index=[29, 28],
    moe_layer_interval=1,
    moe_capacity=[128, 128, 128],
    moe_gate_act="softmax",
    im_patch_id=100295,
    spatial_conv_size=2,
    temporal_conv_size=2,
    pixel_hidden_size=1280,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    vision_config=dict(
        model_type="DFNRope_vision_transformer",
        depth=32,
        embed_dim=1280,
        hidden_size=1280,
        hidden_act="quick_gelu",
        mlp_ratio=4,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        spatial_merge_size=2,
    ),
)


def released(name: str) -> ErnieConfig:
    return ErnieConfig.from_json(yaml.safe_load(RELEASED[name].read_text())["config"])


# reference 1.1, in billions; the active counts are those in the names of the models, embedding and head included
@pytest.mark.parametrize(
    "name, total, digits, active_text, active_vision",
    [
        ("ernie_4_5_0_3b", 0.361, 3, 0.361, 0.0),
        ("ernie_4_5_21b_a3b", 21.83, 2, 3.35, 0.0),
        ("ernie_4_5_300b_a47b", 299.5, 1, 47.1, 0.0),
        ("ernie_4_5_vl_28b_a3b", 29.40, 2, 3.35, 2.08),
        ("ernie_4_5_vl_424b_a47b", 423.5, 1, 47.1, 26.5),
    ],
)
def test_released_parameter_counts(name: str, total: float, digits: int, active_text: float, active_vision: float):
    count = count_parameters(released(name))
    assert round(count.total / 1e9, digits) == total
    assert count.active_text / 1e9 == pytest.approx(active_text, abs=0.05)
    assert count.active_vision / 1e9 == pytest.approx(active_vision, abs=0.05)


def test_counts_by_hand():
    """28B (reference 1.1): ViT 0.630 B, resampler 0.144 B; 27 layers of 64 experts with three D x F matrices."""
    count = count_parameters(released("ernie_4_5_vl_28b_a3b"))
    assert round(count.vision_tower / 1e9, 3) == 0.630
    assert round(count.resampler / 1e9, 3) == 0.144
    assert count.text_experts == 27 * 64 * 3 * 2560 * 1536
    assert count.vision_experts == 27 * 64 * 3 * 2560 * 512
    assert count.embedding == 103424 * 2560
    # two tokens of different pools share everything but routers of the same size and experts
    assert count.active_text - count.active_vision == 27 * 6 * 3 * 2560 * (1536 - 512)
    # an untied embedding is looked up, one row per token, not multiplied
    large = count_parameters(released("ernie_4_5_300b_a47b"))
    router = 51 * (64 * 8192 + 64)
    attention_and_norms = 54 * (2 * 8192 * 128 * (64 + 8) + 2 * 8192) + 8192
    mlps = 3 * 3 * 8192 * 28672 + 51 * 8 * 3 * 8192 * 3584
    assert large.active_text == attention_and_norms + mlps + router + 103424 * 8192 + 8192


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_what_we_write_we_read_and_transformers_reads(name: str):
    config = released(name)
    assert ErnieConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    theirs = transformers.AutoConfig.for_model(**config.to_json())
    text = theirs.get_text_config()
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert getattr(text, field) == getattr(config, field), field
    assert text.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    # and back: what transformers writes of it, we read the same
    assert ErnieConfig.from_json(json.loads(theirs.to_json_string())) == config


def test_the_flat_form_of_baidu_is_the_nested_one():
    flat = ErnieConfig.from_json(FLAT_VL_28B)
    assert flat == released("ernie_4_5_vl_28b_a3b")
    assert flat.sparse_layers == tuple(range(1, 28))  # the published end, 29 and 28, lies beyond the last layer


def test_class_defaults_of_transformers_are_the_released_models():
    """The reference takes three columns of its table from there."""
    for name, theirs in (
        ("ernie_4_5_0_3b", transformers.Ernie4_5Config()),
        ("ernie_4_5_21b_a3b", transformers.Ernie4_5_MoeConfig()),
    ):
        assert ErnieConfig.from_json(json.loads(theirs.to_json_string(use_diff=False))) == released(name).replace(
            initializer_range=0.02
        )


def test_vision_pool_holds_placeholders_and_start_end_tokens():
    config = released("ernie_4_5_vl_28b_a3b")
    assert config.vision_pool_token_ids == (100295, 101304, 101305, 101306, 101307, 103367)
    assert config.placeholder_token_ids == (100295, 103367)
    assert released("ernie_4_5_0_3b").vision_pool_token_ids == ()


def test_position_rule_survives_a_round_trip():
    config = released("ernie_4_5_vl_28b_a3b").replace(position_after_video=PositionAfterVideo.LAST)
    assert ErnieConfig.from_json(config.to_json()).position_after_video is PositionAfterVideo.LAST


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="qwen3"), "model_type is 'qwen3'.*ernie4_5_vl_moe"),
        (dict(model_type=None), "model_type is None"),
        (dict(moe_num_experts=[64, 32]), r"moe_num_experts is \[64, 32\].*same number"),
        (dict(moe_k=65), "moe_k is 65.*between 1 and moe_num_experts"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_scaling={"type": "yarn"}), "rope_type is 'yarn'"),
        (dict(moe_gate_act="sigmoid"), "moe_gate_act is 'sigmoid'"),
        (dict(num_key_value_heads=3), r"num_attention_heads \(20\).*\(3\)"),
        (dict(rope_scaling={"mrope_section": [22, 21, 21]}), "must be equal"),
        (dict(rope_scaling={"mrope_section": [22, 22, 22]}), "adds up to 66"),
        (dict(temporal_conv_size=4), "temporal_merge_size=4"),
    ],
)
def test_refused_configurations(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ErnieConfig.from_json(FLAT_VL_28B | change)


def test_missing_key_is_named():
    raw = {key: value for key, value in FLAT_VL_28B.items() if key != "hidden_size"}
    with pytest.raises(ConfigError, match="'hidden_size' is missing from a ernie4_5_moe_vl"):
        ErnieConfig.from_json(raw)


def test_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        ErnieConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ErnieConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="config.json: model_type is 'bert'"):
        ErnieConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLAT_VL_28B))
    assert (
        ErnieConfig.load(tmp_path / "config.json") == ErnieConfig.load(tmp_path) == ErnieConfig.from_json(FLAT_VL_28B)
    )


@pytest.mark.parametrize("given, width", [({}, 128), ({"head_dim": None}, 64), ({"head_dim": 32}, 32)])
def test_a_dense_configuration_without_head_dim_means_128(given, width):
    """Trap 7.23: the released 0.3B has 16 heads of 128 at hidden size 1024; transformers fills in the same."""
    transformers = pytest.importorskip("transformers")
    raw = dict(
        model_type="ernie4_5", vocab_size=8, hidden_size=1024, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=2, intermediate_size=8, **given,
    )  # fmt: skip
    assert ErnieConfig.from_json(raw).head_dim == width == transformers.Ernie4_5Config(**raw).head_dim
