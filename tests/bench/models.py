"""Models and batches for the benchmarks: the same random weights in transformers and here.

"small" is the model that the figures in docs/speed.md speak of: 26 M parameters, 6.8 M active per text token.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.checkpoint import load_model
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids

IMAGE, IMAGE_START, IMAGE_END, VIDEO, VIDEO_START, VIDEO_END = 4, 5, 6, 7, 8, 9
FIRST_WORD = 16
"""Ids below are special; random text uses the rest."""


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    expert_widths: tuple[int, int]
    experts: int
    top_k: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int


SIZES = {
    "small": Size(256, 6, 8, 2, 1024, (192, 64), 16, 2, 8192, 192, 4, 4),
    "medium": Size(512, 8, 8, 2, 2048, (384, 128), 32, 4, 16384, 320, 6, 5),
}


def transformers_config(size: Size) -> Any:
    """The configuration in transformers' form; the first layer is dense, every other one holds experts."""
    from transformers import Ernie4_5_VLMoeConfig

    half = size.width // size.heads // 2
    time = half // 3 - (half - half // 3) % 2
    section = [(half - time) // 2, (half - time) // 2, time]
    return Ernie4_5_VLMoeConfig(
        text_config=dict(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.ffn,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            moe_intermediate_size=list(size.expert_widths), moe_k=size.top_k, moe_num_experts=size.experts,
            moe_num_shared_experts=2, max_position_embeddings=32768, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0, mrope_section=section),
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        vision_config=dict(
            depth=size.vision_layers, hidden_size=size.vision_width, num_heads=size.vision_heads,
            intermediate_size=4 * size.vision_width, patch_size=14, spatial_merge_size=2,
        ),
        image_token_id=IMAGE, image_start_token_id=IMAGE_START, image_end_token_id=IMAGE_END,
        video_token_id=VIDEO, video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END, tie_word_embeddings=True,
    )  # fmt: skip


def build_pair(size: Size, *, seed: int = 0) -> tuple[Any, ErnieModel]:
    """A random transformers model and ours with the same weights, float32, in training mode."""
    import transformers

    transformers.set_seed(seed)
    theirs = transformers.Ernie4_5_VLMoeForConditionalGeneration._from_config(
        transformers_config(size), dtype=torch.float32, attn_implementation="sdpa"
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(Path(folder), dtype=torch.float32)
    return theirs.train(), ours.train()


def random_segments(size: Size, lengths: list[int], *, image_side: int = 0, seed: int = 1) -> list[dict[str, Any]]:
    """Conversations of random words; with `image_side` each begins with an image of that many patches a side."""
    generator = torch.Generator().manual_seed(seed)
    segments = []
    for length in lengths:
        token_T = torch.randint(FIRST_WORD, size.vocabulary, (length,), generator=generator)
        weight_T = torch.ones(length)
        weight_T[-1] = 0
        grids, patch_PX = (), None
        if image_side:
            count = image_side**2 // 4
            token_T[4], token_T[5 : 5 + count], token_T[5 + count] = IMAGE_START, IMAGE, IMAGE_END
            weight_T[3 : 5 + count] = 0  # the targets of rows 3 .. 4+count are the image's tokens
            grids = ((1, image_side, image_side),)
            patch_PX = torch.randn(image_side**2, 588, generator=generator)
        segments.append(dict(token_T=token_T, weight_T=weight_T, grids=grids, patch_PX=patch_PX))
    return segments


def packed(segments: list[dict[str, Any]], config: ErnieConfig) -> PackedBatch:
    """All segments end to end in one row."""
    tokens: list[Tensor] = [s["token_T"] for s in segments]
    patches = [s["patch_PX"] for s in segments if s["patch_PX"] is not None]
    return PackedBatch(
        token_T=torch.cat(tokens),
        target_T=torch.cat([torch.cat((t[1:], t.new_zeros(1))) for t in tokens]),
        weight_T=torch.cat([s["weight_T"] for s in segments]),
        position_3T=torch.cat([position_ids(s["token_T"], s["grids"], config) for s in segments], dim=1),
        lengths=tuple(len(t) for t in tokens),
        grids=tuple(g for s in segments for g in s["grids"]),
        patch_PX=torch.cat(patches) if patches else None,
    )


def padded(segments: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The same conversations as transformers takes them: one per row, padded on the right."""
    longest = max(len(s["token_T"]) for s in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(segments):
        n = len(s["token_T"])
        ids[row, :n], mask[row, :n] = s["token_T"], 1
        targets = s["token_T"][1:].clone()
        targets[s["weight_T"][:-1] == 0] = -100
        labels[row, 1:n] = targets
    batch = dict(input_ids=ids, labels=labels)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    patches = [s["patch_PX"] for s in segments if s["patch_PX"] is not None]
    if patches:
        batch |= dict(
            mm_token_type_ids=(ids == IMAGE).long(),
            moe_mm_token_type_ids=((ids == IMAGE) | (ids == IMAGE_START) | (ids == IMAGE_END)).long(),
            pixel_values=torch.cat(patches),
            image_grid_thw=torch.tensor([g for s in segments for g in s["grids"]]),
        )
    return batch
