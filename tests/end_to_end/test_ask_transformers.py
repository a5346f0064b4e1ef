"""transformers, given an exported folder, writes what our own model writes."""

import pytest
import torch

from data.conversation import PartKind
from data.encode import encode
from data.tasks import digits
from ernie_model.checkpoint import load_model
from ernie_model.processor import Processor
from tests.end_to_end.ask_transformers import ask
from tests.tiny import SPARSE, save_tiny
from train.heldout import answer


@pytest.fixture
def export(tmp_path):
    """A random vision-language model. Large initial weights, so that different images get different answers."""
    save_tiny(SPARSE.replace(initializer_range=0.2), tmp_path)
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
