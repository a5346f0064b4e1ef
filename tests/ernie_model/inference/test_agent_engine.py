"""The loop on the real engine: what was sampled turn by turn, pictures put in between, is what one forward computes."""

import asyncio
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ernie_model.context import Packed
from ernie_model.inference.agent import Agent, Episode, Limits, Status
from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Completion, Finish, SamplingParams
from ernie_model.inference.sampling import Vocabulary
from ernie_model.inference.tools import ToolBox, zoom_tool
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids
from tests.ernie_model.inference.scripted import ScriptedEngine

ZOOM = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%d, 0, 500, 500]}}\n</tool_call>\n'


@pytest.fixture(scope="module")
def model(vl_config) -> ErnieModel:
    torch.manual_seed(1)
    model = ErnieModel(vl_config).double()
    for parameter in model.parameters():  # large enough that every part matters
        parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


class TwoLooks:
    """The real engine; but the first two turns, which a random model would not write, are written beforehand."""

    def __init__(self, engine: AsyncEngine, tokenizer):
        self.engine, self.max_context = engine, engine.max_context
        self.written = ScriptedEngine(tokenizer, [ZOOM % 0, ZOOM % 100])
        self.turn = 0

    async def generate(self, prompt, params, *, timeout_s=None):
        self.turn += 1
        # The engine sees every prompt, so that later turns go on from what it has computed.
        answer = await self.engine.generate(prompt, params, timeout_s=timeout_s)
        if self.turn == 3:
            return answer
        written = await self.written.generate(prompt, SamplingParams())
        if not params.routed_experts:
            return written
        whole = await self.engine.generate(prompt.extended(written.token_ids), replace(params, max_new_tokens=1))
        assert whole.experts is not None
        experts = whole.experts[:-1].clone()
        experts[-1] = -1  # nothing would have been computed of the last token
        return replace(written, experts=experts)

    def stream(self, prompt, params, *, timeout_s=None):
        raise NotImplementedError


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_logprobs_of_the_last_turn_are_those_of_the_whole_sequence(model, processor, share_prefixes):
    picture = Image.effect_noise((170, 90), 80).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, ignore_end=True)
    settings = EngineSettings(cache_gib=0.05, share_prefixes=share_prefixes, step_tokens=64)

    async def ask():
        engine = AsyncEngine(Engine(model, processor.tokenizer, settings))
        try:
            agent = Agent(TwoLooks(engine, processor.tokenizer), processor, ToolBox([zoom_tool()]), Limits(), params)
            return await agent.run(messages), engine.stats()
        finally:
            await engine.close()

    episode, stats = asyncio.run(ask())
    assert len(episode.turns) == 3 and [len(turn.results) for turn in episode.turns] == [1, 1, 0]
    assert episode.status is Status.TRUNCATED and len(episode.media) == 3
    assert (stats.cached_tokens > episode.num_prompt_tokens) == share_prefixes, "turns go on from what was computed"

    token_T = torch.tensor(episode.token_ids)
    grids = [item.grid for item in episode.media]
    patch_PX = torch.cat([item.patch_PX for item in episode.media])
    hidden_TD = model(
        token_T, position_ids(token_T, grids, processor.config), Packed([len(token_T)]), patch_PX=patch_PX, grids=grids
    ).hidden_TD
    logit_TV = model.logits(hidden_TD)
    sampled = len(episode.turns[2].completion.token_ids)
    logit_TV[:, list(Vocabulary(processor.tokenizer, len(logit_TV[0])).banned_ids)] = -torch.inf
    target_T = token_T[-sampled:]
    logprob_T = logit_TV[-sampled - 1 : -1].log_softmax(-1).gather(1, target_T[:, None])[:, 0]
    ours_T = torch.tensor(episode.logprobs[-sampled:], dtype=torch.float64)
    assert (logprob_T - ours_T).abs().max() < 1e-9
    # It is the crops that were looked at: other pixels, other probabilities.
    changed = model(
        token_T,
        position_ids(token_T, grids, processor.config),
        Packed([len(token_T)]),
        patch_PX=torch.cat([*(item.patch_PX for item in episode.media[:-1]), -episode.media[-1].patch_PX]),
        grids=grids,
    ).hidden_TD
    assert (model.logits(changed)[-1] - model.logits(hidden_TD)[-1]).abs().max() > 1e-3


def test_an_episode_tells_the_experts_of_all_its_turns(model, processor):
    picture = Image.effect_noise((170, 90), 80).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, ignore_end=True, routed_experts=True)

    async def ask():
        engine = AsyncEngine(Engine(model, processor.tokenizer, EngineSettings(cache_gib=0.05)))
        try:
            engines = TwoLooks(engine, processor.tokenizer)
            return await Agent(engines, processor, ToolBox([zoom_tool()]), Limits(), params).run(messages)
        finally:
            await engine.close()

    episode = asyncio.run(ask())
    assert len(episode.turns) == 3 and len(episode.experts) == 3
    assert all(turn.completion.experts is None for turn in episode.turns), "kept once, not once a turn"
    token_T, grids = torch.tensor(episode.token_ids), [item.grid for item in episode.media]
    expert_LTK = model(
        token_T,
        position_ids(token_T, grids, processor.config),
        Packed([len(token_T)]),
        patch_PX=torch.cat([item.patch_PX for item in episode.media]),
        grids=grids,
        experts=True,
    ).expert_LTK
    found = episode.expert_TLK
    assert found is not None and found.dtype == torch.int16 and len(found) == len(token_T) == len(episode.sampled)
    assert (found[-1] == -1).all()
    wanted = expert_LTK.transpose(0, 1).to(torch.int16)
    assert torch.equal(found[:-1].sort(-1).values, wanted[:-1].sort(-1).values)


def test_experts_stay_what_they_were_when_tokens_were_first_computed():
    def completion(token_ids: list[int], experts: list[int]) -> Completion:
        count = len(token_ids)
        return Completion(
            tuple(token_ids), "", Finish.STOP, (0.0,) * count, (0,) * count,
            experts=torch.tensor(experts, dtype=torch.int16).view(-1, 1, 1),
        )  # fmt: skip

    episode = Episode([], [], [])
    assert episode.expert_TLK is None
    episode.append([5, 6])
    episode.append([7, 8], completion=completion([7, 8], [0, 1, 2, -1]))
    episode.append([9])
    # computed once more with other weights, say: the first three are known already
    episode.append([10], completion=completion([10], [3, 3, 3, 0, 1, -1]))
    episode.append([11])
    assert episode.expert_TLK is not None
    assert episode.expert_TLK.flatten().tolist() == [0, 1, 2, 0, 1, -1, -1]
    with pytest.raises(RuntimeError, match="experts of 3 tokens; there are 8"):
        episode.append([12], completion=completion([12], [0, 0, -1]))
