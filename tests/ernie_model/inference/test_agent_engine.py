"""The loop on the real engine: what was sampled turn by turn, pictures put in between, is what one forward computes."""

import asyncio

import pytest
import torch
from PIL import Image

from ernie_model.context import Packed
from ernie_model.inference.agent import Agent, Limits, Status
from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import SamplingParams
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
        return answer if self.turn == 3 else await self.written.generate(prompt, SamplingParams())

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
