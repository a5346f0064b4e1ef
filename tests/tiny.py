"""Tiny vision-language models that fit the small tokenizer that ships with the suite, and the real processor."""

from pathlib import Path

import torch

from ernie_model.checkpoint import save_model
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids

DENSE = ErnieConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    mrope_section=(3, 3, 2),
    vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=64),
    **tiny_tokenizer_ids(),
)
SPARSE = DENSE.replace(
    num_experts=4, experts_per_token=2, text_expert_width=32, vision_expert_width=16, sparse_layers=(1,)
)


def tiny_processor(config: ErnieConfig = DENSE) -> Processor:
    return Processor(load_tiny_tokenizer(), config)


def save_tiny(config: ErnieConfig, folder: Path) -> None:
    """A checkpoint of random weights, the same every time, with its processor."""
    torch.manual_seed(0)
    save_model(ErnieModel(config), folder)
    tiny_processor(config).save(folder)
