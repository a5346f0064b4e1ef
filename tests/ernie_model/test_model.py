"""The assembled model: what it refuses, its dtypes. Its numbers are tested in tests/parity."""

import pytest
import torch

from ernie_model.config import ErnieConfig, PositionAfterVideo, VisionConfig
from ernie_model.context import Packed
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids

IMAGE, START, END, VIDEO, VIDEO_START, VIDEO_END = 10, 11, 12, 13, 14, 15


def config(**changes) -> ErnieConfig:
    fields = dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, num_experts=4, experts_per_token=2, text_expert_width=8, vision_expert_width=4,
        num_shared_experts=1, sparse_layers=(1,), mrope_section=(1, 1, 2),
        vision=VisionConfig(depth=1, hidden_size=8, num_heads=2, intermediate_size=16),
        image_token_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
        video_token_id=VIDEO, video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END,
    )  # fmt: skip
    return ErnieConfig(**(fields | changes))


def row(model: ErnieModel):
    """Text, a 4 x 4 image (4 tokens), text."""
    token = torch.tensor([1, 2, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 3, 4])
    grids = ((1, 4, 4),)
    torch.manual_seed(3)
    return token, position_ids(token, grids, model.config), torch.randn(16, 588), grids


@pytest.fixture
def model() -> ErnieModel:
    torch.manual_seed(0)
    return ErnieModel(config())


def test_positions_are_the_picture():
    token = torch.tensor([1, 2, 3, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 4, 5, 6, 7])
    assert position_ids(token, [(1, 4, 6)], config()).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9],
    ]


@pytest.mark.parametrize("rule, after", [(PositionAfterVideo.SPATIAL, 5), (PositionAfterVideo.LAST, 7)])
def test_text_after_a_long_clip_follows_the_rule(rule, after):
    """Reference 2.5: 3 text tokens, a clip of 8 frames of 4 x 4 patches (16 tokens), text."""
    token = torch.tensor([1, 2, 3] + [VIDEO] * 16 + [4])
    position = position_ids(token, [(8, 4, 4)], config(position_after_video=rule))
    assert position[0].tolist() == [0, 1, 2] + [3] * 4 + [4] * 4 + [5] * 4 + [6] * 4 + [after]


def test_adjacent_images_need_no_text_between_them():
    """Where transformers merges the two runs and fails (trap 7.14), the grids say where one ends."""
    token = torch.tensor([IMAGE] * 2 + [1])
    assert position_ids(token, [(1, 2, 2), (1, 2, 2)], config())[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "grids, message",
    [
        ([(1, 4, 6)], "needs 6 placeholders from token 1 on; there are fewer"),
        ([], "all 0 images and videos are used up"),
        ([(1, 4, 4), (1, 2, 2)], "1 of 2 images and videos have no placeholder"),
        ([(3, 4, 4)], "must have an even number of frames"),
        ([(1, 3, 4)], "must be even"),
    ],
)
def test_positions_refuse_grids_that_do_not_fit(grids, message):
    with pytest.raises(ValueError, match=message):
        position_ids(torch.tensor([1, IMAGE, IMAGE, IMAGE, IMAGE, 2]), grids, config())


def test_model_refuses_media_that_do_not_fit(model):
    token, position, patch, grids = row(model)
    context = Packed([len(token)])
    with pytest.raises(ValueError, match="describe 16 patches, but 12 were given"):
        model(token, position, context, patch_PX=patch[:12], grids=grids)
    with pytest.raises(ValueError, match="describe 16 patches, but 0 were given"):
        model(token, position, context, grids=grids)
    with pytest.raises(ValueError, match="has 4 placeholder tokens, but its 0 images and videos need 0"):
        model(token, position, context)  # their embeddings mean nothing: they always stand for pixels
    words = torch.ones_like(token)
    with pytest.raises(ValueError, match="16 patches came without grids"):
        model(words, position, context, patch_PX=patch)
    with pytest.raises(ValueError, match="has 3 placeholder tokens, but its 1 images and videos need 4"):
        model(token.index_fill(0, torch.tensor([3]), 5), position, context, patch_PX=patch, grids=grids)


def test_text_only_model_refuses_an_image():
    text = ErnieModel(
        config(vision=None, vision_expert_width=0, mrope_section=None, **dict.fromkeys(MEDIA, None))  # type: ignore
    )
    with pytest.raises(ValueError, match="text-only model"):
        text(
            torch.tensor([1]),
            torch.zeros(3, 1, dtype=torch.int64),
            Packed([1]),
            patch_PX=torch.zeros(4, 588),
            grids=((1, 2, 2),),
        )


MEDIA = (
    "image_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_token_id",
    "video_start_token_id",
    "video_end_token_id",
)


def test_pool_follows_from_token_ids(model):
    token, position, patch, grids = row(model)
    stats = model(token, position, Packed([len(token)]), patch_PX=patch, grids=grids).router
    assert stats.token_2.tolist() == [[4.0, 6.0]]  # two start/end tokens and four placeholders are vision
    assert stats.count_2E.shape == (1, 2, 4) and stats.count_2E.sum(-1).tolist() == [[8.0, 12.0]]


def test_routers_keep_float32_when_the_rest_becomes_bfloat16(model):
    model.set_dtype(torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {
        f"layers.1.mlp.{pool}.router.{what}"
        for pool in ("text", "vision")
        for what in ("weight_ED", "correction_bias_E")
    }
    token, position, patch, grids = row(model)
    assert model(token, position, Packed([10]), patch_PX=patch, grids=grids).hidden_TD.dtype == torch.bfloat16


def test_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = ErnieModel(config())
    assert all(p.is_meta for p in model.parameters())
