"""transformers, given an exported folder, writes what our own model writes."""

import pytest
import torch

from data.conversation import PartKind
from data.encode import encode
from data.tasks import digits
from ernie_model.checkpoint import load_model, write_model
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from tests.end_to_end.ask_transformers import ask
from train.heldout import answer


@pytest.fixture
def export(tmp_path):
    """A random vision-language model. Large initial weights, so that different images get different answers."""
    config = ErnieConfig(
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
        initializer_range=0.2,
        vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=64),
        **tiny_tokenizer_ids(),
    )
    torch.manual_seed(0)
    model = ErnieModel(config)
    write_model(model, tmp_path)
    Processor(load_tiny_tokenizer(), config).save(tmp_path)
    return tmp_path


def test_transformers_answers_as_we_do(export):
    conversations = digits.conversations("heldout")[:4]
    assert conversations[0].messages[0].parts[0].kind is PartKind.IMAGE
    model, processor = load_model(export, dtype=torch.float32), Processor.from_pretrained(export)
    examples = [encode(conversation, processor) for conversation in conversations]
    ours = answer(model, examples, stop_id=processor.end_id, max_new_tokens=6)

    theirs = ask(export, conversations, max_new_tokens=6)
    assert theirs == [processor.decode(ids.tolist()).strip() for ids in ours]
    assert len(set(theirs)) > 1  # the image matters
