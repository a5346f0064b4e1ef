"""A tiny vision-language configuration that fits the tiny tokenizer, and its processor."""

import pytest

from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.processor import Processor
from ernie_model.tokenizer import Tokenizer, load_tiny_tokenizer, tiny_tokenizer_ids


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tiny_tokenizer()


@pytest.fixture(scope="session")
def vl_config() -> ErnieConfig:
    return ErnieConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        num_experts=4,
        experts_per_token=2,
        text_expert_width=32,
        vision_expert_width=16,
        sparse_layers=(1,),
        mrope_section=(3, 3, 2),
        vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=64),
        **tiny_tokenizer_ids(),
    )


@pytest.fixture(scope="session")
def processor(tokenizer, vl_config) -> Processor:
    return Processor(tokenizer, vl_config)
