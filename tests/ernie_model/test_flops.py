"""Operations counted by hand, and against PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.context import Packed
from ernie_model.flops import SCORES, VISION_SCORES, forward_flops, training_flops
from ernie_model.model import ErnieModel
from ernie_model.parts import Part
from tests.train import small

C = small.CONFIG


def test_by_hand():
    """Width 16, 2 query heads and 1 key head of 8, 4 experts (2 chosen), widths 8 and 4, one shared, vocabulary 50.

    10 tokens in segments of 6 and 4; an image of 1 x 2 x 4 patches makes 2 media tokens, 4 vision tokens with brackets.
    """
    flops = forward_flops(C, lengths=(6, 4), grids=((1, 2, 4),), learned=3)
    assert flops == {
        Part.ATTENTION: 2 * 2 * 10 * 16 * (16 + 8 + 8 + 16),
        SCORES: 2 * 2 * (21 + 10) * (16 + 16),
        Part.DENSE: 2 * 10 * 3 * 16 * 24,
        Part.SHARED: 2 * 10 * 3 * 16 * 8,
        Part.ROUTER: 2 * 10 * 16 * 4,
        Part.TEXT_EXPERTS: 2 * 6 * 2 * 3 * 16 * 8,
        Part.VISION_EXPERTS: 2 * 4 * 2 * 3 * 16 * 4,
        Part.EMBEDDINGS: 2 * 3 * 16 * 50,
        Part.VISION: 2 * 8 * (588 * 8 + 3 * 8 * 8 + 8 * 8 + 2 * 8 * 16),
        VISION_SCORES: 2 * 8 * 8 * (8 + 8),
        Part.RESAMPLER: 2 * (2 * 2 * 32 * 32 + 2 * (64 * 32 + 32 * 32 + 32 * 16)),
    }


def test_branches_see_their_stem():
    """Of 6 + 4 + 2 tokens, the 4 and the 2 see the 6 as well: 21 + (10 + 24) + (3 + 12) pairs; nothing else changes."""
    shared, apart = forward_flops(C, lengths=(6, 4, 2), stems=(-1, 0, 0)), forward_flops(C, lengths=(6, 4, 2))
    assert shared[SCORES] == 2 * 2 * (21 + 34 + 15) * (16 + 16)
    assert shared == {**apart, SCORES: shared[SCORES]}


def test_text_alone_pays_nothing_for_vision():
    flops = forward_flops(C, lengths=(10,))
    assert not {Part.VISION, Part.RESAMPLER, Part.VISION_EXPERTS, VISION_SCORES} & flops.keys()
    assert flops[Part.EMBEDDINGS] == 2 * 10 * 16 * 50


def counted(config: ErnieConfig, *, train: bool) -> tuple[float, dict]:
    """What PyTorch counts of one row, in float64, where every product is a plain one; and what we say."""
    torch.manual_seed(0)
    model = ErnieModel(config).set_dtype(torch.float64)
    segments = [small.example(0, 9, image=config.vision is not None), small.example(1, 7)]
    row = small.in_double(small.row(*segments))
    with FlopCounterMode(display=False) as counter:
        output = model(row.token_T, row.position_3T, Packed(row.lengths), patch_PX=row.patch_PX, grids=row.grids)
        logits = output.hidden_TD @ model.head_VD.T
        if train:
            logits.sum().backward()
    return counter.get_total_flops(), forward_flops(config, lengths=row.lengths, grids=row.grids)


def extra(config: ErnieConfig, flops: dict, lengths: tuple[int, ...]) -> float:
    """What this implementation multiplies beyond what the architecture asks for, forward only.

    Attention: whole tiles; segments this short are one tile each, padded to a multiple of 8: L² pairs, not L(L+1)/2.
    Routers: a mixed row multiplies both, the architecture one per token.
    """
    padded = sum((-(-length // 8) * 8) ** 2 for length in lengths)
    exact = sum(length * (length + 1) // 2 for length in lengths)
    return flops[SCORES] * (padded / exact - 1) + (flops[Part.ROUTER] if config.vision else 0)


STATISTICS = 2 * 2 * 16 * 4
"""The (2, T) x (T, E) product that sums probabilities per pool; it has no backward pass here."""
KINDS = (C, C.replace(vision=None, vision_expert_width=0, mrope_section=None))


@pytest.mark.parametrize("config", KINDS, ids=("vision", "text"))
def test_forward_equals_what_torch_counts(config):
    total, flops = counted(config, train=False)
    assert total == pytest.approx(sum(flops.values()) + extra(config, flops, (9, 7)) + STATISTICS, rel=1e-12)


@pytest.mark.parametrize("config", KINDS, ids=("vision", "text"))
def test_training_equals_what_torch_counts(config):
    total, flops = counted(config, train=True)
    pixels = 2 * 8 * 588 * 8 if config.vision else 0  # their gradient is nobody's; a part pays for all of its products
    ours = training_flops(flops, set(Part)) + 3 * extra(config, flops, (9, 7)) + STATISTICS - pixels
    assert total == pytest.approx(ours, rel=1e-12)


def test_training_everything_costs_three_forwards_less_what_nothing_precedes():
    flops = forward_flops(C, lengths=(6, 4), grids=((1, 2, 4),))
    assert training_flops(flops, set(Part)) == 3 * sum(flops.values())


def test_frozen_parts_pay_no_weight_gradient():
    flops = {Part.VISION: 1000.0, VISION_SCORES: 100.0, Part.RESAMPLER: 10.0, Part.ATTENTION: 1.0, SCORES: 0.5}
    language = set(Part) - {Part.VISION}
    assert training_flops(flops, language) == 1000 + 100 + 2 * 10 + 3 * 1 + 3 * 0.5
    assert training_flops(flops, {Part.VISION}) == 3 * 1000 + 3 * 100 + 2 * 10 + 2 * 1 + 3 * 0.5
    assert training_flops(flops, set()) == sum(flops.values())
    # LoRA: gradients pass, but no base weight has one
    assert training_flops(flops, set(), adapted={Part.ATTENTION}) == 1000 + 100 + 10 + 2 * 1 + 3 * 0.5
    assert training_flops(flops, set(), adapted={Part.VISION}) == 2 * 1000 + 3 * 100 + 2 * 10 + 2 * 1 + 3 * 0.5


def test_six_operations_per_active_parameter_and_token():
    """The rule of thumb, exactly, when attention scores are left out."""
    from ernie_model.counting import count_parameters

    config = ErnieConfig.from_json(
        dict(
            model_type="ernie4_5_moe",
            vocab_size=1000,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=128,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=32,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            moe_layer_interval=1,
        )
    )
    flops = forward_flops(config, lengths=(100,))
    without_scores = {part: count for part, count in flops.items() if part != SCORES}
    norms = (2 * 3 + 1) * 64
    biases = 2 * 8  # correction biases count as parameters
    active = count_parameters(config).active_text - norms - biases
    assert training_flops(without_scores, set(Part)) == 6 * active * 100


def test_video_frames_attend_apart():
    one = forward_flops(C, lengths=(30,), grids=((4, 4, 4),))
    assert one[VISION_SCORES] == 2 * 4 * 16 * 16 * 2 * 8
    assert isinstance(C.vision, VisionConfig)
