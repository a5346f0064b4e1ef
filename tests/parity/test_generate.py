"""Greedy answers against transformers' `generate`, token for token: text, images and videos, several requests at once.

Both in float64, where no near-tie can be decided by rounding. Images and videos may be long clips: `generate` goes on
from the last position (trap 7.2), and so does the engine, under the rule that transformers follows (trap 7.1).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_model.config import PositionAfterVideo
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import MediaItem, Prompt, SamplingParams
from ernie_model.tokenizer import MEDIA_TOKENS
from tests.parity.reference import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    SHAPES,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VOCAB,
    Conversation,
    Shape,
    in_float64,
    load_ours,
    make_conversations,
    make_reference,
    padded_batch,
    reference_in_float64,
)
from tests.plain_tokens import PlainTokens

NEW = 24
IDS = dict(zip(MEDIA_TOKENS.values(), (IMAGE, IMAGE_START, IMAGE_END, VIDEO, VIDEO_START, VIDEO_END), strict=True))


def generate(model: Any, conversation: Conversation) -> list[int]:
    """transformers' greedy answer to one conversation."""
    batch = padded_batch([conversation], torch.float64, is_vl=model.config.model_type == "ernie4_5_vl_moe")
    del batch["labels"]
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        suppress_tokens=sorted(IDS.values()),
    )  # fmt: skip
    return out[0, len(conversation.token) :].tolist()


@pytest.mark.parametrize("settings", [{}, dict(step_tokens=7, page_tokens=4)], ids=["whole", "chunks of 7"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_greedy_answers_are_those_of_generate(shape: Shape, settings: dict[str, int], tmp_path: Path):
    conversations = make_conversations(shape.rows, seed=2)
    reference = make_reference(shape)
    ours = load_ours(reference, tmp_path, dtype=torch.float64, rule=PositionAfterVideo.SPATIAL)
    with in_float64(), torch.no_grad():
        theirs = reference_in_float64(reference)
        expected = [generate(theirs, conversation) for conversation in conversations]
    engine = Engine(ours, PlainTokens(VOCAB, IDS), EngineSettings(cache_gib=0.02, **settings))
    prompts = [
        Prompt(tuple(c.token), tuple(MediaItem(g, p) for g, p in zip(c.grids, c.patches, strict=True)))
        for c in conversations
    ]
    params = SamplingParams(temperature=0, max_new_tokens=NEW, ignore_end=True)
    assert [list(completion.token_ids) for completion in engine.generate(prompts, params)] == expected
    assert len({tuple(answer) for answer in expected}) > 1  # answers that say something
