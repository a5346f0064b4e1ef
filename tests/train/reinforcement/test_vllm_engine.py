"""Rollouts by vLLM servers, against one that speaks its endpoints and computes with our model (fake_vllm.py).

What real vLLM computes is tested in tests/vllm.
"""

import asyncio
import dataclasses
import json
import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ernie_model.images import ImageSettings
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Completion, Finish, MediaItem, Prompt, Regex, RequestError, SamplingParams
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer
from tests.tiny import DENSE, SPARSE, tiny_processor
from tests.train.reinforcement.fake_vllm import Crash, FakeVLLM
from train.certificate import picture
from train.config import PeftConfig, PeftKind, UserError
from train.loop import Interrupted
from train.lora.adapt import adapt
from train.reinforcement import vllm_engine
from train.reinforcement.stopping import never
from train.reinforcement.vllm_engine import VLLMEngine
from train.reinforcement.vllm_requests import VLLMError, data_url
from train.reinforcement.vllm_servers import NONE, ranges
from train.rl_config import RolloutBackend, RolloutConfig, VLLMConfig
from train.weights import AllWeights

PROCESSOR = tiny_processor(SPARSE)
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.9, seed=5)


def random_model(seed: int) -> ErnieModel:
    torch.manual_seed(seed)
    model = ErnieModel(SPARSE.replace(initializer_range=0.2)).requires_grad_(False).eval()
    for name, tensor in model.state_dict().items():
        if "correction_bias" in name:
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    return model


def prompt_of(text: str, *images) -> Prompt:
    content = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": text}]
    return Prompt.of(PROCESSOR.encode([{"role": "user", "content": content}], add_generation_prompt=True))


TEXT = prompt_of("What is 1 + 2?")
IMAGES = prompt_of("Which one?", picture(112, 84, 1), picture(300, 200, 2))


def ours(model: ErnieModel, prompt: Prompt, params: SamplingParams = PARAMS) -> Completion:
    engine = Engine(model, PROCESSOR.tokenizer, EngineSettings(cache_gib=0.02))
    return engine.generate([prompt], params)[0]


def same(one: Completion, two: Completion) -> bool:
    return (one.token_ids, one.text, one.finish, one.stop) == (two.token_ids, two.text, two.finish, two.stop) and (
        torch.tensor(one.logprobs) - torch.tensor(two.logprobs)
    ).abs().max().item() < 1e-5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waiting is for people."""
    monkeypatch.setattr(vllm_engine, "POLL_S", 0.01)
    push = vllm_engine.Server.push

    async def at_once(self, one, *, retries, wait_s=0.01):
        await push(self, one, retries=retries, wait_s=wait_s)

    monkeypatch.setattr(vllm_engine.Server, "push", at_once)


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    return random_model(0)


@pytest.fixture
def fakes():
    """Makes servers that start with weights other than the trainer's."""
    with ExitStack() as at_end:
        yield lambda **settings: at_end.enter_context(FakeVLLM(random_model(9), PROCESSOR, **settings))


def engine_of(model: ErnieModel, folder: Path, *servers: FakeVLLM, compared: bool = True, **settings) -> VLLMEngine:
    """`compared`: leave the parity check out."""
    config = VLLMConfig(urls=[one.url for one in servers], **{"patience_s": 5.0, "timeout_s": 20.0, **settings})
    engine = VLLMEngine(config, model, PROCESSOR, AllWeights(model), folder=folder, max_tokens=256)
    engine._compared = compared
    return engine


def ask(engine: VLLMEngine, *prompts: Prompt, params: SamplingParams = PARAMS, **more) -> list[Completion]:
    async def all_at_once():
        return await engine.together([engine.generate(prompt, params, **more) for prompt in prompts])

    return asyncio.run(all_at_once())


# -------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("prompt", [TEXT, IMAGES], ids=["text", "images"])
def test_answers_are_those_of_the_pushed_weights(model, fakes, tmp_path, prompt):
    engine = engine_of(model, tmp_path, server := fakes(), compared=False)
    engine.begin(7)
    (found,) = ask(engine, prompt)
    assert same(found, ours(model, prompt))
    assert found.versions == (7,) * len(found.token_ids) and found.num_prompt_tokens == len(prompt.token_ids)
    assert not same(found, ours(random_model(9), prompt))
    # The bans that our engine has, said with the weights.
    banned = [token for start, stop in server.state.never for token in range(start, stop)]
    assert banned == list(Engine(model, PROCESSOR.tokenizer)._entry.vocabulary.banned_ids)
    assert set(SPARSE.vision_pool_token_ids) <= set(banned)
    metrics = engine.metrics()
    assert metrics["vllm_servers"] == 1 and metrics["vllm_write_s"] > 0 and metrics["vllm_load_s"] > 0
    assert metrics["vllm_parity_max"] < 1e-4


@pytest.mark.parametrize(
    "params",
    [
        dataclasses.replace(PARAMS, temperature=0),
        dataclasses.replace(PARAMS, top_k=20, top_p=0.7),
        dataclasses.replace(PARAMS, logit_bias={400: 30.0}, max_new_tokens=3),
        dataclasses.replace(PARAMS, banned_ids=tuple(range(300, 900))),
        dataclasses.replace(PARAMS, stop=("e",), max_new_tokens=60),
        dataclasses.replace(PARAMS, stop_ids=tuple(range(500, 800)), max_new_tokens=60),
    ],
    ids=["greedy", "truncated", "bias", "banned", "stop", "stop_ids"],
)
def test_parameters_arrive(model, fakes, tmp_path, params):
    engine = engine_of(model, tmp_path, fakes())
    engine.begin(0)
    (found,) = ask(engine, TEXT, params=params)
    assert same(found, ours(model, TEXT, params))
    assert (found.finish is Finish.STOP) == bool(params.stop or params.stop_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"constraint": Regex(pattern="a")},
        {"routed_experts": True},
        {"prompt_logprobs": True},
        {"top_logprobs": 3},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"temperature": 0.001},
        {"min_p": 0.1, "top_p": 0.9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_vllm_does_otherwise_is_refused(model, fakes, tmp_path, change):
    params = dataclasses.replace(PARAMS, **change)
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    with pytest.raises(RequestError, match=f"{next(iter(change))} is .*rollout.backend=vllm"):
        ask(engine, TEXT, params=params)
    assert server.count("/inference/v1/generate") == 1  # the look at the start
    with pytest.raises(VLLMError, match=f"sampling.{next(iter(change))} is "):
        VLLMEngine(
            VLLMConfig(urls=[server.url]),
            model,
            PROCESSOR,
            AllWeights(model),
            folder=tmp_path,
            max_tokens=64,
            params=params,
        )


def test_a_request_that_outgrows_the_context_is_refused(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, fakes(max_model_len=300), fakes(max_model_len=260))
    engine.begin(0)
    assert engine.max_context == 260
    with pytest.raises(RequestError, match="max_new_tokens=250 is more than the 260"):
        ask(engine, TEXT, params=dataclasses.replace(PARAMS, max_new_tokens=250))


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (301, 77), (30, 400), (1000, 700)])
def test_a_picture_made_of_patches_is_cut_into_the_same(size):
    import base64
    import io

    from PIL import Image

    from ernie_model.images import image_patches

    patches, grid = image_patches(picture(size[0], size[1], 3), PROCESSOR.image)
    url = data_url(MediaItem(grid, torch.from_numpy(patches)), PROCESSOR)
    again = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    found, found_grid = image_patches(again, PROCESSOR.image)
    assert found_grid == grid and (found == patches).all()


def test_a_picture_that_vllm_would_resize_raises():
    """Limits so narrow that the size of a long picture, once found, is resized again."""
    from ernie_model.images import image_patches

    narrow = Processor(
        load_tiny_tokenizer(), DENSE, image=ImageSettings(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    )
    patches, grid = image_patches(picture(28 * 150, 28, 3), narrow.image)
    with pytest.raises(VLLMError, match="would be resized again"):
        data_url(MediaItem(grid, torch.from_numpy(patches)), narrow)


def test_patches_of_no_picture_raise():
    with pytest.raises(VLLMError, match="not those that this processor cuts"):
        data_url(MediaItem((1, 4, 4), torch.full((16, 588), 0.123)), PROCESSOR)


# ------------------------------------------------------------------------------------------------ a server that will do


@pytest.mark.parametrize(
    ("settings", "absent", "problem"),
    [
        ({"logprobs_mode": "raw_logprobs"}, None, "has --logprobs-mode raw_logprobs"),
        ({"backend": "nccl"}, None, "takes weights by nccl"),
        ({"backend": None}, None, "takes weights by nothing"),
        ({"max_model_len": 200}, None, r"takes 200 tokens .*agent.max_tokens is 256"),
        ({}, "/server_info", "VLLM_SERVER_DEV_MODE=1"),
        ({}, "/inference/v1/generate", "--enable-scale-out"),
        ({}, "/v1/models", "it is no vLLM server"),
    ],
)
def test_a_server_that_will_not_do(model, fakes, tmp_path, settings, absent, problem):
    right, wrong = fakes(), fakes(**settings)
    wrong.absent = {absent}
    with pytest.raises(VLLMError, match=f"rollout.vllm.urls names {wrong.url}.*{problem}"):
        engine_of(model, tmp_path, right, wrong)


def test_another_tokenizer_is_refused(model, fakes, tmp_path):
    server = fakes()
    server.faults["/tokenize"].append(lambda answer: {"tokens": answer["tokens"][:-1]})
    with pytest.raises(VLLMError, match="another tokenizer"):
        engine_of(model, tmp_path, server)
    server.faults["/tokenize"] += [lambda answer: answer, lambda answer: {"tokens": [5, 6, 7]}]
    with pytest.raises(VLLMError, match="no token '<|image@placeholder|>'.*layout=vllm".replace("|", r"\|")):
        engine_of(model, tmp_path, server)


def test_a_server_that_is_not_there(model, fakes, tmp_path):
    server = fakes()
    server.stop()
    with pytest.raises(VLLMError, match=f"{server.url}, which cannot be reached"):
        engine_of(model, tmp_path, server)


def test_another_dtype_is_told(model, fakes, tmp_path):
    (note,) = engine_of(model, tmp_path, fakes(dtype="bfloat16")).notes
    assert "computes in bfloat16, the trainer in float32" in note


@pytest.mark.parametrize("part", ["correction_bias", "vision.", "norm.weight"])
def test_a_server_that_computes_something_else_is_found_before_the_first_step(model, fakes, tmp_path, part):
    """As vLLM would without one of the plugin's fixes."""
    server = fakes()

    def change(answer):
        for name, tensor in server.state.model.state_dict().items():
            if part in name:
                tensor.mul_(0.9) if tensor.abs().max() else tensor.add_(0.1)
        return answer

    server.faults["/update_weights"].append(change)
    engine = engine_of(model, tmp_path, server, compared=False)
    with pytest.raises(VLLMError, match=r"computes other log-probabilities than the trainer.*rounding explains"):
        engine.begin(0)


def test_bans_that_are_not_applied_are_found(model, fakes, tmp_path):
    server = fakes()
    server.faults["/update_weights"].append(lambda answer: server.state.never.clear() or answer)
    engine = engine_of(model, tmp_path, server, compared=False)
    with pytest.raises(VLLMError, match="computes other log-probabilities"):
        engine.begin(0)


# ---------------------------------------------------------------------------------------------------------- mismatches


def of_choice(**change):
    def changed(answer):
        answer["choices"][0] |= change
        return answer

    return changed


def first_logprob(**change):
    def changed(answer):
        answer["choices"][0]["logprobs"]["content"][0] |= change
        return answer

    return changed


def ids(change):
    """Other ids, with their log-probabilities and versions to match."""

    def changed(answer):
        choice = answer["choices"][0]
        choice["token_ids"] = change(choice["token_ids"])
        choice["logprobs"] = {"content": [{"token_id": t, "logprob": -1.0} for t in choice["token_ids"]]}
        choice["weight_versions"][0]["end"] = len(choice["token_ids"])
        return answer

    return changed


END = PROCESSOR.end_id


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (lambda answer: answer | {"prompt_token_ids": answer["prompt_token_ids"][:-1]}, "another prompt .* at place"),
        (lambda answer: answer | {"prompt_token_ids": None}, "return_token_ids"),
        (of_choice(logprobs=None), "are not those of the tokens"),
        (first_logprob(token_id=3), "are not those of the tokens"),
        (first_logprob(logprob=-9999.0), "its probability is 0"),
        (first_logprob(logprob=float("nan")), "its probability is 0"),
        (of_choice(weight_versions=None), "version of its weights for 0 of 12"),
        (ids(lambda all: [SPARSE.image_token_id, *all[1:]]), r"token \d+ \('.*'\), which is banned"),
        (ids(lambda all: all[:-1]), r"after 11 of 12 tokens \(length"),
        (ids(lambda all: [END, *all[1:]]), f"went on after {END}"),
        (of_choice(finish_reason="stop"), r"\(stop, None\), and nothing that was asked for"),
    ],
)
def test_a_mismatch_raises(model, fakes, tmp_path, fault, problem):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.faults["/inference/v1/generate"].append(fault)
    with pytest.raises(VLLMError, match=problem):
        ask(engine, TEXT)


def test_pictures_that_became_another_number_of_tokens_raise(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.faults["/inference/v1/generate"].append(
        lambda answer: (
            answer | {"prompt_token_ids": [t for t in answer["prompt_token_ids"] if t != SPARSE.image_token_id]}
        )
    )
    with pytest.raises(VLLMError, match="cuts pictures otherwise"):
        ask(engine, IMAGES)


def test_a_refused_request_raises(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.faults["/inference/v1/generate"].append(400)
    with pytest.raises(VLLMError, match="refuses a request of .*made to fail"):
        ask(engine, TEXT)


# -------------------------------------------------------------------------------------------------------------- pushes


def test_a_push_is_one_step_after_the_other(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    server.said.clear()
    labels = []
    server.on_request = lambda path: labels.append((path, server.state.label))
    engine.begin(3)
    label = server.state.label
    assert label.endswith(".3")
    assert labels.pop(0) == ("/weight_info", "default")
    assert [path for path, _ in labels] == [
        "/pause",
        "/update_weight_version",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/resume",
    ]
    # From before the first weight changes until all are there, no answer could be taken for one of some weights.
    assert [label for _, label in labels[2:5]] == [NONE] * 3
    assert server.said[6][0] == "POST /reset_prefix_cache?reset_running_requests=true"


def test_files_of_earlier_pushes_go(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, fakes())
    (tmp_path / "vllm/weights-of-a-killed-run").mkdir(parents=True)
    (tmp_path / "vllm/.weights-x.partial").mkdir()
    for version in range(3):
        engine.begin(version)
        engine.end()
        kept = sorted(path.name.rpartition(".")[2] for path in (tmp_path / "vllm").iterdir())
        assert kept == [str(number) for number in range(max(0, version - 1), version + 1)]
    engine.close()
    assert not list((tmp_path / "vllm").iterdir())


def test_weights_that_servers_have_are_not_pushed_again(model, fakes, tmp_path):
    """An evaluation between two updates begins, too."""
    engine = engine_of(model, tmp_path, server := fakes())
    for _ in range(3):
        engine.begin(5)
        engine.end()
    assert server.count("/update_weights") == 1
    server.state.label = "other"
    engine.begin(5)
    assert server.count("/update_weights") == 2


def test_new_weights_are_sampled_from(model, fakes, tmp_path):
    mine = random_model(0)
    engine = engine_of(mine, tmp_path, fakes())
    engine.begin(0)
    (before,) = ask(engine, IMAGES)
    mine.load_state_dict(random_model(1).state_dict())
    engine.begin(1)
    (after,) = ask(engine, IMAGES)
    assert same(before, ours(model, IMAGES)) and same(after, ours(random_model(1), IMAGES))
    assert (set(before.versions), set(after.versions)) == ({0}, {1})


def test_versions_of_an_answer_that_outlived_a_push(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(4)
    first = server.state.label
    engine.begin(5)
    spans = [{"version": first, "start": 0, "end": 8}, {"version": server.state.label, "start": 8, "end": 12}]
    server.faults["/inference/v1/generate"].append(of_choice(weight_versions=spans))
    (found,) = ask(engine, TEXT)
    assert found.versions == (4,) * 8 + (5,) * 4


def test_an_update_that_a_killed_run_has_left_open(model, fakes, tmp_path):
    server = fakes()
    server.state.paused = server.state.updating = True
    server.state.label = NONE
    engine = engine_of(model, tmp_path, server)
    engine.begin(0)
    (found,) = ask(engine, TEXT)
    assert same(found, ours(model, TEXT)) and not server.state.paused


PUSHED = ["/pause", "/update_weight_version", "/start_weight_update", "/update_weights", "/finish_weight_update"]
PUSHED += ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/resume"]


@pytest.mark.parametrize("path", PUSHED)
@pytest.mark.parametrize("fault", [500, Crash])
def test_a_push_that_breaks_off_anywhere_is_made_again(model, fakes, tmp_path, path, fault):
    engine = engine_of(model, tmp_path, server := fakes())
    server.faults[path].append(fault)
    engine.begin(2)
    (found,) = ask(engine, TEXT)
    assert same(found, ours(model, TEXT)) and set(found.versions) == {2}


def test_a_prefix_cache_that_is_not_emptied_is_no_push(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes(), retries=0)
    server.faults["/reset_prefix_cache"].append(lambda answer: {"success": False})
    with pytest.raises(VLLMError, match="its prefix cache could not be emptied"):
        engine.begin(0)
    assert server.state.label == NONE


def test_a_push_that_never_ends_well(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes(), retries=2, compared=False)
    server.faults["/update_weights"] += [500] * 3
    with pytest.raises(
        VLLMError, match=f"no server of rollout.vllm.urls has taken.*{server.url}: /update_weights says 500"
    ):
        engine.begin(0)
    assert server.state.label == NONE and server.state.paused  # nothing can be sampled there


def test_a_folder_that_servers_do_not_see(model, fakes, tmp_path, monkeypatch):
    engine = engine_of(model, tmp_path, fakes(), retries=0, compared=False)
    write = engine._write
    monkeypatch.setattr(engine, "_write", lambda version: dataclasses.replace(write(version), folder=Path("/nowhere")))
    with pytest.raises(VLLMError, match=r"/nowhere is not there\..*rollout.vllm.folder"):
        engine.begin(0)


def test_adapters_are_merged_into_what_is_pushed(fakes, tmp_path):
    mine = random_model(0)
    weights = adapt(mine, PeftConfig(kind=PeftKind.lora, rank=4), seed=0)
    with torch.no_grad():
        for tensor in weights.tensors().values():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    config = VLLMConfig(urls=[(server := fakes()).url])
    engine = VLLMEngine(config, mine, PROCESSOR, weights, folder=tmp_path, max_tokens=64)
    engine.begin(0)  # with the parity check: the model with its adapters, and the server with merged weights
    assert engine.metrics()["vllm_parity_max"] < 1e-3
    pushed, start = server.state.model.state_dict(), random_model(0).state_dict()
    changed = {name.rpartition(".")[0] for name in start if not torch.equal(pushed[name], start[name])}
    assert changed == set(weights.layers)


# --------------------------------------------------------------------------------------------------- several, and death


def test_attempts_at_one_prompt_share_a_server_and_prompts_are_dealt_out(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, one := fakes(), two := fakes())
    engine.begin(0)
    one.said.clear()
    two.said.clear()
    prompts = [prompt_of(f"What is {number}?") for number in range(4)]
    found = ask(engine, *(prompt for prompt in prompts for _ in range(3)))
    assert [one.count("/inference/v1/generate"), two.count("/inference/v1/generate")] == [6, 6]
    for server in (one, two):
        asked = [json.dumps(body["token_ids"]) for path, body in server.said if path.endswith("generate")]
        assert len(set(asked)) == 2
    assert all(same(mine, ours(model, prompt)) for mine, prompt in zip(found[::3], prompts, strict=True))


def test_the_next_turn_goes_where_the_last_one_was(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, one := fakes(), two := fakes())
    engine.begin(0)
    one.said.clear()
    two.said.clear()

    async def episode(number: int) -> None:
        prompt = prompt_of(f"What is {number}?")
        for _ in range(3):
            answer = await engine.generate(prompt, dataclasses.replace(PARAMS, max_new_tokens=3))
            prompt = prompt.extended([*answer.token_ids, 301])

    asyncio.run(engine.together([episode(number) for number in range(6)]))
    for server in (one, two):
        asked = [tuple(body["token_ids"]) for path, body in server.said if path.endswith("generate")]
        assert len(asked) == 9
        longest = [ids for ids in asked if not any(other != ids and other[: len(ids)] == ids for other in asked)]
        assert len(longest) == 3  # three whole conversations


def test_a_server_that_dies_leaves_its_requests_to_the_others(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, one := fakes(), two := fakes())
    engine.begin(0)
    seen = []

    def die(path):
        if path.endswith("generate"):
            seen.append(path)
            if len(seen) == 2:
                threading.Thread(target=two.stop).start()
                two.alive = False

    two.on_request = die
    prompts = [prompt_of(f"What is {number}?") for number in range(6)]
    found = ask(engine, *prompts)
    assert all(same(mine, ours(model, prompt)) for mine, prompt in zip(found, prompts, strict=True))
    assert engine.metrics()["vllm_retries"] >= 1
    engine.begin(1)  # goes on with the one that is left
    assert engine.metrics()["vllm_servers"] == 1
    two.on_request = lambda path: None
    two.http.server_close()
    two.start()
    engine.begin(2)
    assert engine.metrics()["vllm_servers"] == 2 and two.state.label == one.state.label


def test_a_server_that_restarts_gets_the_weights_again(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(3)
    ask(engine, TEXT)
    server.stop()
    server.start()  # with the weights that it was started with
    assert server.state.label == "default"
    found = ask(engine, TEXT, IMAGES)
    assert same(found[0], ours(model, TEXT)) and same(found[1], ours(model, IMAGES))
    assert {v for one in found for v in one.versions} == {3}
    metrics = engine.metrics()
    assert metrics["vllm_stale_answers"] >= 1 and server.count("/update_weights") == 2


def test_a_run_waits_for_a_server_when_none_is_left(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.stop()
    threading.Timer(0.3, server.start).start()
    (found,) = ask(engine, TEXT)
    assert same(found, ours(model, TEXT))


def test_a_run_does_not_wait_for_ever(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes(), patience_s=0.2)
    engine.begin(0)
    server.stop()
    with pytest.raises(VLLMError, match=r"no server of rollout.vllm.urls answers, for 0.2 s.*Put the servers right"):
        ask(engine, TEXT)
    with pytest.raises(VLLMError, match="has taken the weights"):
        engine.begin(1)


def test_another_run_that_pushes_to_the_same_server_is_noticed(model, fakes, tmp_path):
    """Its weights are never taken for ours, whatever the version."""
    mine, other = random_model(0), random_model(1)
    server = fakes()
    engine = engine_of(mine, tmp_path / "a", server)
    engine.begin(0)
    engine_of(other, tmp_path / "b", server).begin(0)
    (found,) = ask(engine, TEXT)
    assert same(found, ours(model, TEXT)) and engine.metrics()["vllm_stale_answers"] == 1


def test_answers_of_other_weights_end_the_run_after_a_few_tries(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes(), retries=2)
    engine.begin(0)
    stale = of_choice(weight_versions=[{"version": "x", "start": 0, "end": 12}])
    server.faults["/inference/v1/generate"] += [stale] * 3
    with pytest.raises(VLLMError, match="asked 3 times .*labelled 'x'"):
        ask(engine, TEXT)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_broken_off_is_asked_again(model, fakes, tmp_path, reason):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.faults["/inference/v1/generate"] += [of_choice(finish_reason=reason), 500, Crash]
    (found,) = ask(engine, TEXT)
    assert same(found, ours(model, TEXT))


# ------------------------------------------------------------------------------------------------ time-outs, cancelling


def test_a_time_out_is_an_answer(model, fakes, tmp_path):
    engine = engine_of(model, tmp_path, server := fakes())
    engine.begin(0)
    server.on_request = lambda path: time.sleep(0.5 if path.endswith("generate") else 0)
    started = time.monotonic()
    (found,) = ask(engine, TEXT, timeout_s=0.1)
    assert found.finish is Finish.TIMEOUT and found.token_ids == () and time.monotonic() - started < 0.4


@pytest.mark.parametrize("ended", [asyncio.CancelledError, Interrupted])
def test_what_is_given_up_closes_its_connection(model, fakes, tmp_path, ended):
    """That is how vLLM knows that nobody waits. A task that is cancelled, a rollout that is to stop."""
    engine = engine_of(model, tmp_path, fakes())
    engine.begin(0)

    async def cancelled() -> None:
        gone = asyncio.Event()
        arrived = asyncio.Event()

        async def silent(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            arrived.set()
            while await reader.read(65536):
                pass
            gone.set()
            writer.close()

        listener = await asyncio.start_server(silent, "127.0.0.1", 0)
        engine.servers[0].url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        stop = arrived.is_set if ended is Interrupted else never
        task = asyncio.ensure_future(engine.together([engine.generate(TEXT, PARAMS)], stop))
        await arrived.wait()
        if ended is asyncio.CancelledError:
            task.cancel()
        with pytest.raises(ended):
            await task
        try:
            await asyncio.wait_for(gone.wait(), 5)
        except ConnectionError:
            pass
        listener.close()

    asyncio.run(cancelled())
    assert engine.servers[0].running == 0


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"urls": ["localhost:8000"]}, "rollout.vllm.urls has 'localhost:8000'"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "name each server once"),
        ({"timeout_s": 0}, "rollout.vllm.timeout_s is 0"),
        ({"patience_s": float("inf")}, "rollout.vllm.patience_s is inf"),
        ({"retries": -1}, "rollout.vllm.retries is -1"),
    ],
)
def test_settings_out_of_range(settings, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        VLLMConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({}, "names no server"), ({"exact": True}, "rollout.exact"), ({"replay_experts": True}, "rollout.replay_experts")],
)
def test_rollouts_that_vllm_cannot_make(settings, problem):
    urls = [] if not settings else ["http://localhost:8000"]
    with pytest.raises(UserError, match=problem):
        RolloutConfig(backend=RolloutBackend.vllm, vllm=VLLMConfig(urls=urls), **settings)


def test_ranges():
    assert ranges([3, 4, 5, 9, 11, 12]) == [(3, 6), (9, 10), (11, 13)] and ranges([]) == []
