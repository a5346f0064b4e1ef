"""Every parameter of every kind of model belongs to exactly one part."""

import re

import pytest
import torch

from ernie_model import parts
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.parts import Part, part_of
from tests.train import small


def models():
    yield small.CONFIG
    yield small.CONFIG.replace(tie_word_embeddings=False)
    yield ErnieConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        use_bias=True,
    )


@pytest.mark.parametrize("config", models(), ids=("tied VL", "untied VL", "dense with biases"))
def test_every_parameter_matches_exactly_one_pattern(config):
    with torch.device("meta"):
        model = ErnieModel(config)
    for name in model.state_dict():
        assert [part for part, pattern in parts._PATTERNS if re.fullmatch(pattern, name)] == [part_of(name)]


def test_a_few_names():
    assert part_of("lm_head.weight") is Part.EMBEDDINGS
    assert part_of("layers.12.mlp.vision.experts.down_EDF") is Part.VISION_EXPERTS
    assert part_of("layers.12.mlp.vision.router.weight_ED") is Part.ROUTER
    assert part_of("vision.blocks.3.mlp.fc1.bias") is Part.VISION
    with pytest.raises(KeyError, match="adapter"):
        part_of("layers.0.adapter.weight")
