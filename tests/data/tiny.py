"""The real processor, with the small tokenizer that ships with the suite, for a tiny vision-language model."""

from pathlib import Path

import ernie_model
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.processor import Processor
from ernie_model.tokenizer import MEDIA_TOKENS, Tokenizer


def tiny_processor() -> Processor:
    tokenizer = Tokenizer.load(Path(ernie_model.__file__).parent / "assets" / "tiny_tokenizer")
    config = ErnieConfig(
        vocab_size=2048,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        mrope_section=(3, 3, 2),
        vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=64),
        **{field: tokenizer.require(string) for field, string in MEDIA_TOKENS.items()},
    )
    return Processor(tokenizer, config)
