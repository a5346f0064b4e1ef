"""Rows of what the engine sampled, with what it says of it."""

import torch

from data.batch import PackedBatch
from data.encode import Example
from data.pack import collate
from ernie_model.config import ErnieConfig
from ernie_model.inference.engine import Engine
from ernie_model.inference.request import Completion, Prompt, SamplingParams
from ernie_model.rope import position_ids


def example(prompt: Prompt, completion: Completion, config: ErnieConfig) -> Example:
    """The answer is learned."""
    first, grids = len(prompt.token_ids) - 1, [item.grid for item in prompt.media]
    token_T = torch.tensor([*prompt.token_ids, *completion.token_ids])
    weight_T, engine_T = torch.zeros(2, len(token_T))
    weight_T[first:-1] = 1
    engine_T[first:-1] = torch.tensor(completion.logprobs)
    return Example(
        id="sampled",
        token_T=token_T,
        target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]),
        weight_T=weight_T,
        position_3T=position_ids(token_T, grids, config),
        grids=tuple(grids),
        patch_PX=torch.cat([item.patch_PX for item in prompt.media]) if grids else None,
        engine_logprob_T=engine_T,
        expert_TLK=completion.experts,
    )


def row(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> PackedBatch:
    """All answers, end to end."""
    answered = zip(prompts, engine.generate(prompts, params), strict=True)
    return collate([example(prompt, completion, engine.config) for prompt, completion in answered])
