"""A model of a few thousand parameters and packed rows of made-up tokens, for tests of the loop."""

import dataclasses

import torch
from accelerate import Accelerator

from data.batch import PackedBatch
from data.encode import Example
from data.pack import collate
from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids
from train.config import OptimConfig
from train.optim import build_optimizer
from train.parallel.updates import Plain
from train.policy import Policy

CONFIG = ErnieConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    initializer_range=0.2,
    num_experts=4,
    experts_per_token=2,
    text_expert_width=8,
    vision_expert_width=4,
    num_shared_experts=1,
    sparse_layers=(1,),
    mrope_section=(1, 1, 2),
    vision=VisionConfig(depth=1, hidden_size=8, num_heads=1, intermediate_size=16),
    image_token_id=40,
    image_start_token_id=41,
    image_end_token_id=42,
    video_token_id=43,
    video_start_token_id=44,
    video_end_token_id=45,
)
IMAGE = (1, 2, 4)  # 8 patches, 2 tokens


def example(seed: int, length: int, *, image: bool = False, learned: int = 3) -> Example:
    """A segment of random text tokens whose last `learned` targets count; with an image, it opens with one."""
    generator = torch.Generator().manual_seed(seed)
    token_T = torch.randint(3, 40, (length,), generator=generator)
    if image:
        token_T[:4] = torch.tensor([41, 40, 40, 42])
    weight_T = torch.zeros(length)
    weight_T[-1 - learned : -1] = 1.0
    return Example(
        id=f"{seed}",
        token_T=token_T,
        target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]),
        weight_T=weight_T,
        position_3T=position_ids(token_T, [IMAGE] if image else [], CONFIG),
        grids=(IMAGE,) if image else (),
        patch_PX=torch.randn(8, 588, generator=generator) if image else None,
    )


def row(*segments: Example) -> PackedBatch:
    return collate(segments)


def some_experts(token_T: torch.Tensor, config: ErnieConfig, seed: int = 0, unknown: float = 0.0) -> torch.Tensor:
    """int16 (T, L, K): experts that tokens may visit, drawn; of a share of tokens and layers, -1 instead."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(token_T), len(config.sparse_layers))
    drawn = torch.rand(*shape, config.num_experts, generator=generator).argsort(-1)[..., : config.experts_per_token]
    vision_T = torch.isin(token_T, torch.tensor(config.vision_pool_token_ids, dtype=torch.int64))
    drawn += (vision_T * config.num_experts)[:, None, None]
    drawn[torch.rand(shape, generator=generator) < unknown] = -1
    return drawn.to(torch.int16)


def replaying(batch: PackedBatch, config: ErnieConfig, seed: int = 0, unknown: float = 0.0) -> PackedBatch:
    return dataclasses.replace(batch, expert_TLK=some_experts(batch.token_T, config, seed, unknown))


def in_double(batch: PackedBatch) -> PackedBatch:
    patches = None if batch.patch_PX is None else batch.patch_PX.double()
    return dataclasses.replace(batch, weight_T=batch.weight_T.double(), patch_PX=patches)


def policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(seed)
    return Policy(ErnieModel(CONFIG).set_dtype(dtype))


def optimizer(parts: Policy, **settings) -> torch.optim.AdamW:
    return build_optimizer(parts.model, OptimConfig(**settings))


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def updates(parts: Policy, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None = None) -> Plain:
    return Plain(parts, optimizer, accelerator or Accelerator(cpu=True))


def branches(*wholes: Example, prompt: int, items: int = 0) -> Example:
    """One record of conversations that begin alike: their first `prompt` tokens, with `items` images and videos, once,
    less the last of them; then what follows in each, with the last token of the prompt (data/batch.py)."""
    first, cut = wholes[0], prompt - 1
    patches = [grid[0] * grid[1] * grid[2] for grid in first.grids[:items]]
    parts = [(first, slice(0, cut), slice(0, items), slice(0, sum(patches)))]
    parts += [(whole, slice(cut, None), slice(items, None), slice(sum(patches), None)) for whole in wholes]
    for whole in wholes:
        assert torch.equal(whole.token_T[:prompt], first.token_T[:prompt]) and not whole.weight_T[:cut].any()
    pixels = [whole.patch_PX[patch] for whole, _, _, patch in parts if whole.patch_PX is not None]
    return Example(
        id=first.id,
        token_T=torch.cat([whole.token_T[token] for whole, token, _, _ in parts]),
        target_T=torch.cat([whole.target_T[token] for whole, token, _, _ in parts]),
        weight_T=torch.cat([whole.weight_T[token] for whole, token, _, _ in parts]),
        position_3T=torch.cat([whole.position_3T[:, token] for whole, token, _, _ in parts], dim=1),
        grids=tuple(grid for whole, _, item, _ in parts for grid in whole.grids[item]),
        patch_PX=torch.cat(pixels) if pixels else None,
        lengths=(cut, *(whole.num_tokens - cut for whole in wholes)),
        stems=(-1, *[0] * len(wholes)),
    )
