"""A tiny vision-language configuration that fits the tiny tokenizer, and its processor."""

import pytest

from ernie_model.config import ErnieConfig
from ernie_model.processor import Processor
from ernie_model.tokenizer import Tokenizer, load_tiny_tokenizer
from tests.tiny import SPARSE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tiny_tokenizer()


@pytest.fixture(scope="session")
def vl_config() -> ErnieConfig:
    return SPARSE


@pytest.fixture(scope="session")
def processor(tokenizer, vl_config) -> Processor:
    return Processor(tokenizer, vl_config)
