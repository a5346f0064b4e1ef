"""Rollouts by real vLLM: what it samples has the trainer's log-probabilities, before and after weights are pushed.

`make test-vllm` runs this; see test_vllm.py.
"""

import asyncio
import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model.context import Packed
from ernie_model.inference.agent import Agent, Status
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Completion, MediaItem, Prompt, SamplingParams
from ernie_model.inference.sampling import Vocabulary, distribution_of
from ernie_model.inference.tools import Limits, ToolBox, zoom_tool
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.rope import position_ids
from ernie_model.tokenizer import load_tiny_tokenizer
from ernie_model.video import Frames
from tests.vllm.test_vllm import CONFIG, PYTHON, Serving, exported, random_model
from train.certificate import picture
from train.logprobs import token_logprobs
from train.reinforcement import vllm_engine
from train.reinforcement.vllm_engine import VLLMEngine
from train.reinforcement.vllm_requests import VLLMError
from train.reinforcement.vllm_servers import NONE
from train.rl_config import VLLMConfig
from train.weights import AllWeights
from vllm_plugin.fixes import FIXES
from vllm_plugin.transfer import look

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM; `make test-vllm` sets it"),
]
OPTIONS = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
OPTIONS += ["--weight-transfer-config", '{"backend": "ernie"}', "--max-model-len", "2048"]
SAME = 1e-4
"""Of log-probabilities near -8, in float32; measured differences are below 5e-6."""
PARAMS = SamplingParams(max_new_tokens=40, temperature=0.8, seed=3, ignore_end=True)


def serving(folder: Path, log: Path, *options: str, **variables: str) -> Serving:
    return Serving(folder, log, *OPTIONS, *options, VLLM_SERVER_DEV_MODE="1", **variables)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """What servers start with: neither of the models that are pushed."""
    return exported(random_model(9), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def server(start, tmp_path_factory) -> Iterator[Serving]:
    with serving(start, tmp_path_factory.mktemp("server") / "log") as one:
        yield one


PROCESSOR = Processor(load_tiny_tokenizer(), CONFIG)


def engine_of(server: Serving, model: ErnieModel, folder: Path, *, compared: bool = True, **settings) -> VLLMEngine:
    config = VLLMConfig(urls=[server.url], **{"timeout_s": 120.0, "patience_s": 120.0, **settings})
    processor = Processor(load_tiny_tokenizer(), model.config)
    engine = VLLMEngine(config, model, processor, AllWeights(model), folder=folder, max_tokens=500)
    engine._compared = compared
    return engine


def prompt_of(*parts) -> Prompt:
    content = [one if isinstance(one, dict) else {"type": "image", "image": one} for one in parts]
    content += [{"type": "text", "text": "What do you see? 12"}]
    return Prompt.of(PROCESSOR.encode([{"role": "user", "content": content}], add_generation_prompt=True))


CLIP = Frames([picture(112, 84, seed) for seed in range(3, 7)], seconds=[0.0, 0.5, 1.0, 1.5])
PROMPTS = {
    "text": prompt_of(),
    "image": prompt_of(picture(300, 200, 1)),
    "images": prompt_of(picture(112, 84, 1), picture(30, 400, 2), picture(56, 56, 3)),
    "video": prompt_of({"type": "video", "video": CLIP}),
    "both": prompt_of({"type": "video", "video": CLIP}, picture(112, 84, 1)),
}


@torch.no_grad()
def ours(
    model: ErnieModel, ids: Sequence[int], media: Sequence[MediaItem], start: int, params: SamplingParams
) -> Tensor:
    """Of each token from `start` on, as the trainer computes it."""
    token_T, grids = torch.tensor(ids), [item.grid for item in media]
    patch_PX = torch.cat([item.patch_PX for item in media]) if media else None
    positions = position_ids(token_T, grids, model.config)
    out = model(token_T, positions, Packed([len(ids)]), patch_PX=patch_PX, grids=grids)
    vocabulary = Vocabulary(PROCESSOR.tokenizer, model.config.vocab_size, never=model.config.vision_pool_token_ids)
    drawn_from = distribution_of(params, vocabulary)
    drawn_from = replace(drawn_from, banned_ids=tuple(sorted({*drawn_from.banned_ids, *params.banned_ids})))
    hidden_TD = out.hidden_TD[start - 1 : -1]
    return token_logprobs(hidden_TD, model.head_VD, token_T[start:], distribution=drawn_from).logprob_T


def differences(model: ErnieModel, prompt: Prompt, found: Completion, params: SamplingParams) -> Tensor:
    start = len(prompt.token_ids)
    mine = ours(model, [*prompt.token_ids, *found.token_ids], prompt.media, start, params)
    return (mine - torch.tensor(found.logprobs)).abs()


def test_attempts_have_our_logprobs_before_and_after_a_push(server, tmp_path):
    """Sampled and greedy, with the parity check in between, on weights that no file of the server holds."""
    model = random_model(0)
    engine = engine_of(server, model, tmp_path, compared=False)
    for version, seed in ((0, 0), (1, 1)):
        model.load_state_dict(random_model(seed).state_dict())
        engine.begin(version)
        greedy = SamplingParams(max_new_tokens=12, temperature=0, ignore_end=True)

        async def attempts(greedy=greedy) -> list[Completion]:
            asked = [engine.generate(prompt, PARAMS) for prompt in PROMPTS.values()]
            asked += [engine.generate(prompt, greedy) for prompt in PROMPTS.values()]
            return await engine.together(asked)

        found = asyncio.run(attempts())
        own = Engine(model, PROCESSOR.tokenizer, EngineSettings(cache_gib=0.1))
        expected = own.generate(list(PROMPTS.values()), greedy)
        for prompt, sampled, best, mine in zip(
            PROMPTS.values(), found[: len(PROMPTS)], found[len(PROMPTS) :], expected, strict=True
        ):
            assert len(sampled.token_ids) == 40 and set(sampled.versions) == {version}
            assert differences(model, prompt, sampled, PARAMS).max() < SAME
            assert best.token_ids == mine.token_ids
            assert (torch.tensor(best.logprobs) - torch.tensor(mine.logprobs)).abs().max() < SAME
    assert engine.metrics()["vllm_servers"] == 1
    other = differences(random_model(0), PROMPTS["image"], found[1], PARAMS)
    assert other.max() > 0.1  # the weights of the first push are another model


@pytest.mark.parametrize(
    "params",
    [
        replace(PARAMS, top_p=0.6),
        replace(PARAMS, top_k=5),
        replace(PARAMS, min_p=0.3),
        replace(PARAMS, top_k=50, top_p=0.8),
        replace(PARAMS, banned_ids=tuple(range(400, 2000))),
    ],
    ids=["top_p", "top_k", "min_p", "both", "banned"],
)
def test_truncated_sampling(server, tmp_path, params):
    model = random_model(0)
    engine = engine_of(server, model, tmp_path)
    engine.begin(0)
    found = asyncio.run(engine.generate(PROMPTS["image"], params))
    assert differences(model, PROMPTS["image"], found, params).max() < SAME
    assert differences(model, PROMPTS["image"], found, PARAMS).max() > 0.1


def written(server: Serving) -> float:
    """Tokens that it has sampled."""
    said = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    return float(re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", said, re.M)[0])


@pytest.mark.parametrize("name", ["text", "image"])
def test_a_push_in_the_middle_of_an_answer(server, tmp_path, name):
    """Each token has the version and the log-probability of the weights that it was sampled with; keys and values of
    the old ones are computed again."""
    model = random_model(0)
    engine = engine_of(server, model, tmp_path)
    engine.begin(3)
    prompt = PROMPTS[name]
    several = [SamplingParams(max_new_tokens=1800, temperature=1.0, seed=seed, ignore_end=True) for seed in range(4)]
    model.load_state_dict(random_model(1).state_dict())

    async def answers() -> list[Completion]:
        """As many at once as the server takes, so that none is over before the weights are written."""
        before = written(server)
        writing = asyncio.gather(*(engine.generate(prompt, params) for params in several))
        while written(server) < before + 20 * len(several):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.begin, 4)
        return await writing

    found = asyncio.run(answers())
    for one in found:
        cut = one.versions.index(4)
        assert set(one.versions[:cut]) == {3} and set(one.versions[cut:]) == {4} and 10 < cut < 1790
    first, cut = found[0], found[0].versions.index(4)
    assert differences(random_model(0), prompt, first, several[0])[:cut].max() < SAME
    assert differences(random_model(1), prompt, first, several[0])[cut:].max() < SAME
    assert engine.metrics()["vllm_stale_answers"] == 0


def test_an_episode_with_a_zoomed_picture(server, tmp_path, monkeypatch):
    """The first turn is made to call the tool; the crop, as the agent's processor cuts it, is the server's too."""
    model = random_model(0)
    engine = engine_of(server, model, tmp_path)
    engine.begin(5)
    call = (
        '\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 200, 700, 800]}}\n</tool_call>\n'
    )
    stock, turns = vllm_engine.to_body, []

    def to_body(*arguments):
        body = stock(*arguments)
        if not turns:
            body["sampling_params"] |= {"structured_outputs": {"choice": [call]}, "detokenize": True}
        turns.append(body)
        return body

    monkeypatch.setattr(vllm_engine, "to_body", to_body)
    agent = Agent(
        engine,
        PROCESSOR,
        ToolBox([zoom_tool()]),
        Limits(max_turns=2, max_tokens=1000),
        SamplingParams(max_new_tokens=100, temperature=1.0, seed=2),
    )
    content = [{"type": "image", "image": picture(200, 140, 8)}, {"type": "text", "text": "?"}]
    episode = asyncio.run(agent.run([{"role": "user", "content": content}]))
    assert [len(one["content_parts"]) for one in turns] == [1, 2], episode.turns[0]
    assert episode.turns[0].results and not episode.turns[0].results[0].error and len(episode.images) == 2
    assert episode.status in (Status.ANSWERED, Status.TRUNCATED, Status.TURN_LIMIT, Status.PARSE_ERROR)
    last = episode.turns[1].completion
    written = slice(len(episode.token_ids) - len(last.token_ids), None)
    mine = ours(model, episode.token_ids, episode.media, written.start, agent.params)
    assert (mine - torch.tensor(last.logprobs)).abs().max() < SAME
    assert set(episode.versions[written]) == {5}


def test_what_a_killed_run_left_and_a_wrong_model_do_no_harm(server, tmp_path, monkeypatch):
    """A server in the middle of an update; a push of another model, which breaks off in the middle of loading."""
    model = random_model(0)
    engine = engine_of(server, model, tmp_path, compared=False)
    for path in ("/pause?mode=keep", "/start_weight_update"):
        assert asyncio.run(engine.servers[0].ask("POST", path)).ok
    engine = engine_of(server, model, tmp_path, compared=False)
    engine.begin(0)
    other = random_model(0, CONFIG.replace(intermediate_size=192))
    with pytest.raises(VLLMError, match="intermediate_size is 192 in the weights and 128 in the model"):
        engine_of(server, other, tmp_path / "other", retries=0).begin(0)
    shallow = random_model(0, CONFIG.replace(num_hidden_layers=2, sparse_layers=(1,)))
    with pytest.raises(VLLMError, match="num_hidden_layers is 2 in the weights and 3"):
        engine_of(server, shallow, tmp_path / "shallow", retries=0).begin(0)
    bad = engine_of(server, random_model(1), tmp_path / "bad", retries=0)
    write = bad._write

    def damaged(version: int):
        push = write(version)
        (file,) = push.folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "layers.2.self_attn.o_proj" in name)
        save_file(tensors | {name: tensors[name].flatten()}, file)
        return push

    monkeypatch.setattr(bad, "_write", damaged)
    with pytest.raises(VLLMError, match="not, by name and shape, those that were written"):
        bad.begin(0)
    monkeypatch.setattr(bad, "_write", lambda version: replace(push := damaged(version), digest=look(push.folder)[1]))
    with pytest.raises(VLLMError, match="/update_weights says 500"):  # while it loads: half of them are there
        bad.begin(0)
    assert asyncio.run(bad.servers[0].label()) == NONE
    again = engine_of(server, model, tmp_path / "again", compared=False)
    again.begin(1)  # with its parity check
    found = asyncio.run(again.generate(PROMPTS["images"], PARAMS))
    assert differences(model, PROMPTS["images"], found, PARAMS).max() < SAME


def test_a_server_that_is_killed_and_comes_back(start, tmp_path):
    model = random_model(0)
    with serving(start, tmp_path / "log") as server:
        engine = engine_of(server, model, tmp_path)
        engine.begin(2)
        params = SamplingParams(max_new_tokens=350, temperature=1.0, seed=1, ignore_end=True)

        def die() -> None:
            time.sleep(0.4)
            server.stop(9)
            server.start()

        killer = threading.Thread(target=die)
        killer.start()
        found = asyncio.run(engine.generate(PROMPTS["image"], params))
        killer.join()
        assert set(found.versions) == {2} and len(found.token_ids) == 350
        assert differences(model, PROMPTS["image"], found, params).max() < SAME
        metrics = engine.metrics()
        assert metrics["vllm_retries"] >= 1 and metrics["vllm_renewals"] == 1


def test_a_server_without_a_fix_is_refused_before_the_first_step(start, tmp_path):
    """Norms of the vision tower with another epsilon: the smallest of the defects."""
    fixes = ",".join(name for name in FIXES if name != "vision_eps")
    with serving(start, tmp_path / "log", ERNIE_VLLM_FIXES=fixes) as server:
        engine = engine_of(server, random_model(0), tmp_path, compared=False)
        with pytest.raises(VLLMError, match="computes other log-probabilities than the trainer.*'image'"):
            engine.begin(0)


@pytest.mark.parametrize("sparse_layers", [(), (1, 2)], ids=["dense", "experts"])
def test_text_models(tmp_path, sparse_layers):
    config = CONFIG.replace(vision=None, sparse_layers=sparse_layers, vision_expert_width=0)
    config = config.replace(**{name: None for name in vars(CONFIG) if name.startswith(("image_", "video_"))})
    model = random_model(0, config)
    with serving(exported(random_model(9, config), tmp_path), tmp_path / "log") as server:
        engine = engine_of(server, model, tmp_path, compared=False)
        engine.begin(1)
        prompt = Prompt(tuple(range(300, 340)))
        found = asyncio.run(engine.generate(prompt, PARAMS))
        assert differences(model, prompt, found, PARAMS).max() < SAME
