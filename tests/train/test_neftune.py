"""NEFTune by hand, and that its noise depends on the record and the step and on nothing else."""

import math

import pytest
import torch

from ernie_model.context import Packed
from tests.train import small
from train.neftune import install, noise

WIDTH = small.CONFIG.hidden_size
TEXT, OTHER, IMAGE = small.example(1, 7), small.example(2, 12), small.example(0, 9, image=True)


def drawn(*segments, step: int = 3, seed: int = 5) -> torch.Tensor:
    row = small.row(*segments)
    return noise(row, torch.zeros(row.num_tokens, WIDTH, dtype=torch.float64), 5.0, seed=seed, step=step)


def test_size_by_hand():
    """5 / sqrt(512) = 0.2209708691 for a segment of 32 tokens at width 16."""
    value = drawn(small.example(4, 32))
    bound = 0.2209708691
    assert value.abs().max() <= bound
    # uniform: variance bound^2 / 3; the mean square of 512 draws is within 5 of its deviations, sqrt(4 / 45 / 512) each
    assert (value**2).mean().item() == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(4 / 45 / 512) * 3)
    assert value.mean().abs() < 5 * bound / math.sqrt(3 * 512)


def test_packing_changes_nothing_step_seed_and_record_do():
    packed, turned = drawn(TEXT, OTHER), drawn(OTHER, TEXT)
    assert torch.equal(packed[:7], drawn(TEXT)) and torch.equal(packed[7:], drawn(OTHER))
    assert torch.equal(turned[12:], packed[:7])
    for other in (drawn(TEXT, step=4), drawn(TEXT, seed=6), drawn(OTHER)[:7] * math.sqrt(12 / 7)):
        assert not torch.allclose(drawn(TEXT), other)


def embeddings(policy, row) -> torch.Tensor:
    """What the first layer gets."""
    seen = []
    handle = policy.model.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    policy(row, row.weight_T.nonzero()[:, 0])
    handle.remove()
    return seen[0]


def test_text_gets_noise_and_media_tokens_do_not():
    policy, row, step = small.policy().train(), small.row(IMAGE, TEXT), 3
    before = embeddings(policy, row)
    install(policy, 5.0, seed=5, step=lambda: step)
    added = embeddings(policy, row) - before
    expected = drawn(IMAGE, TEXT).float()
    expected[1:3] = 0  # the image's two tokens
    torch.testing.assert_close(added, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    step = 4
    assert not torch.allclose(embeddings(policy, row) - before, expected, atol=1e-3)


def test_evaluation_gets_none():
    policy, row = small.policy(), small.row(IMAGE, TEXT)
    before = embeddings(policy.eval(), row)
    install(policy, 5.0, seed=5, step=lambda: 0)
    assert torch.equal(embeddings(policy.eval(), row), before)
    position, context = row.position_3T[:, :4], Packed([4])
    policy.train().model(row.token_T[9:13], position, context)  # a forward that no batch came with: generation
