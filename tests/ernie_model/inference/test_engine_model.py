"""The engine with a real model against one full forward pass over prompt and answer: tokens, log-probs, experts."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ernie_model.config import PositionAfterVideo
from ernie_model.context import Packed
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.kernels import copied_bytes
from ernie_model.inference.request import Completion, Finish, Prompt, Regex, RequestError, SamplingParams
from ernie_model.inference.runner import Runner
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids
from tests.ernie_model.inference.test_engine import picture, text, with_pictures

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PARAMS = SamplingParams(temperature=0, max_new_tokens=6, ignore_end=True, routed_experts=True)


@pytest.fixture(scope="module")
def models(vl_config):
    """By dtype and rule; weights are larger than initial ones, so that everything shows in the logits."""

    def build(dtype: torch.dtype = torch.float64, rule=PositionAfterVideo.SPATIAL) -> ErnieModel:
        torch.manual_seed(0)
        model = ErnieModel(dataclasses.replace(vl_config, position_after_video=rule)).set_dtype(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.requires_grad_(False).eval()

    return build


def engine_of(model: ErnieModel, tokenizer, *, num_pages: int = 400, **settings) -> Engine:
    page_bytes = Runner.page_bytes(model.config, model.embed_tokens.weight.dtype, 4)
    settings = {"page_tokens": 4, "cache_gib": (num_pages + 0.5) * page_bytes / 2**30} | settings
    return Engine(model, tokenizer, EngineSettings(**settings))


def full_forward(model: ErnieModel, prompt: Prompt, answer=()):
    """Logits (T, V) and experts (T, L, K) of prompt and answer."""
    token_T = torch.tensor([*prompt.token_ids, *answer])
    grids = [item.grid for item in prompt.media]
    patch_PX = torch.cat([item.patch_PX for item in prompt.media]) if grids else None
    position_3T = position_ids(token_T, grids, model.config)
    with torch.no_grad():
        out = model(token_T, position_3T, Packed([len(token_T)]), patch_PX=patch_PX, grids=grids, experts=True)
        return F.linear(out.hidden_TD, model.head_VD), out.expert_LTK.transpose(0, 1)


def check(engine: Engine, model: ErnieModel, prompt: Prompt, completion: Completion) -> None:
    """Every token is the likeliest there, and its log-prob that of a full forward pass; and so are the experts."""
    tolerance = TOLERANCE[model.embed_tokens.weight.dtype]
    logit_TV, expert_TLK = full_forward(model, prompt, completion.token_ids)
    allowed_TV = logit_TV.clone()
    allowed_TV[:, list(engine._entry.vocabulary.banned_ids)] = -torch.inf
    logprob_TV = allowed_TV[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
    token_T1 = torch.tensor(completion.token_ids)[:, None]
    wanted_T = logprob_TV.gather(1, token_T1)[:, 0]
    assert (logprob_TV.amax(1) - wanted_T).max() <= tolerance, "not the likeliest token"
    found_T = torch.tensor(completion.logprobs, dtype=torch.float64)
    torch.testing.assert_close(found_T, wanted_T.double(), rtol=0, atol=tolerance)
    if completion.experts is not None:
        assert torch.equal(completion.experts[:-1].sort(-1).values, expert_TLK[:-1].to(torch.int16).sort(-1).values)
    if completion.prompt_logprobs:
        ids = torch.tensor(prompt.token_ids[1:])
        wanted = logit_TV[: len(ids)].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        found = torch.tensor(completion.prompt_logprobs[1:], dtype=torch.float64)
        torch.testing.assert_close(found, wanted.double(), rtol=0, atol=tolerance)


def kinds(config) -> dict[str, Prompt]:
    long_video = with_pictures(config, 3, grid=(12, 4, 4))  # 6 frame pairs of 2x2 tokens: the two rules differ
    ids, item = picture(config, 4, (1, 6, 8))
    return {
        "one token": text(1, 1),
        "text": text(2, 23),
        "image": with_pictures(config, 1),
        "two images": with_pictures(config, 1, 2),
        "video": with_pictures(config, 2, grid=(4, 6, 6)),
        "long video": long_video,
        "video, then image": long_video.extended((*ids, 402), [item]),
        "image again": with_pictures(config, 1),
        "text again": text(2, 23),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", PositionAfterVideo)
@pytest.mark.parametrize("step_tokens", [9, 2048])
@pytest.mark.parametrize("share", [True, False])
def test_equal_to_a_full_forward_for_all_kinds(models, tokenizer, dtype, rule, step_tokens, share):
    model = models(dtype, rule)
    engine = engine_of(model, tokenizer, step_tokens=step_tokens, share_prefixes=share)
    prompts = kinds(model.config)
    done = engine.generate(list(prompts.values()), PARAMS)
    for prompt, completion in zip(prompts.values(), done, strict=True):
        assert completion.finish is Finish.LENGTH
        check(engine, model, prompt, completion)
    assert (done[-1].num_cached_tokens > 0) == share


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_with_preemption_and_log_probs_of_prompts(models, tokenizer, dtype):
    model = models(dtype)
    engine = engine_of(model, tokenizer, num_pages=24, step_tokens=16)
    prompts = kinds(model.config)
    params = dataclasses.replace(PARAMS, max_new_tokens=45)
    each = [dataclasses.replace(params, prompt_logprobs=bool(number % 2)) for number in range(len(prompts))]
    for prompt, completion in zip(prompts.values(), engine.generate(list(prompts.values()), each), strict=True):
        check(engine, model, prompt, completion)
        assert completion.finish is Finish.LENGTH
    assert engine.stats().preemptions > 2
    engine.check()


@pytest.mark.parametrize("rule", PositionAfterVideo)
def test_images_and_videos_are_injected_in_later_turns(models, tokenizer, rule):
    """As an agent does: each prompt is the last one, its answer, and an observation with a picture."""
    model = models(rule=rule)
    engine = engine_of(model, tokenizer)
    prompts = [with_pictures(model.config, seed) for seed in range(2)]
    for turn, grid in enumerate([(1, 4, 6), (12, 4, 4), (1, 6, 4), (2, 4, 4)]):
        done = engine.generate(prompts, PARAMS)
        for place, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
            check(engine, model, prompt, completion)
            assert turn == 0 or completion.num_cached_tokens > 12 * turn
            ids, item = picture(model.config, 10 * turn + place, grid)
            prompts[place] = prompt.extended((*completion.token_ids, 500, *ids, 501), [item])


def test_equal_after_new_weights(models, tokenizer):
    """Tokens of the old version are those of the old model; all later ones those of the new, over old tokens."""
    model, old = models(), models()
    engine = engine_of(model, tokenizer)
    prompt = with_pictures(model.config, 1, 2)
    engine.add(prompt, dataclasses.replace(PARAMS, routed_experts=False))
    deltas = [engine.step(), engine.step()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.weights_changed()
    while engine.has_work:
        deltas.append(engine.step())
    completion = deltas[-1][0][1].completion
    assert completion is not None and completion.versions == (0, 0, 1, 1, 1, 1)
    first = dataclasses.replace(completion, token_ids=completion.token_ids[:2], logprobs=completion.logprobs[:2])
    check(engine, old, prompt, first)
    rest = prompt.extended(completion.token_ids[:2])
    last = dataclasses.replace(completion, token_ids=completion.token_ids[2:], logprobs=completion.logprobs[2:])
    check(engine, model, rest, last)


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(models, tokenizer):
    model = models()
    prompt = with_pictures(model.config, 1)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_new_tokens=12, ignore_end=True)
    alone = engine_of(model, tokenizer).generate([prompt], params)[0]
    engine = engine_of(model, tokenizer, num_pages=24, step_tokens=8)
    others = [dataclasses.replace(params, seed=seed) for seed in range(4)]
    beside = engine.generate([text(2, 9), prompt, prompt, prompt, text(3, 30)], [others[0], *[params] * 2, *others[2:]])
    assert beside[1].token_ids == beside[2].token_ids == alone.token_ids != beside[3].token_ids
    assert beside[1].text == alone.text


def test_a_constraint_holds_and_an_impossible_one_is_refused(models, tokenizer):
    """Among others, with little room, and where it makes no difference: greedy tokens elsewhere stay what they are."""
    model = models()
    engine = engine_of(model, tokenizer, num_pages=24, step_tokens=16)
    digits = SamplingParams(temperature=0, max_new_tokens=20, constraint=Regex(pattern="[0-9]{3}-[a-f]{2}"))
    prompts = [text(1, 30), with_pictures(model.config, 1), text(2, 20), text(3, 9)]
    first, second, *free = engine.generate(prompts, [digits, digits, PARAMS, PARAMS])
    for completion in (first, second):
        assert completion.finish is Finish.STOP and re.fullmatch("[0-9]{3}-[a-f]{2}", completion.text)
    for prompt, completion in zip(prompts[2:], free, strict=True):
        check(engine, model, prompt, completion)
    with pytest.raises(RequestError):
        engine.generate(prompts, dataclasses.replace(digits, constraint=Regex(pattern="[0-9")))
    assert not engine.has_work
    engine.check()


@pytest.mark.parametrize("cache_gib", [0.001, 0.01])
def test_memory_of_the_cache_is_what_the_setting_says(models, tokenizer, cache_gib):
    """Within 5 %, and as the formula has it: keys and values, layers, heads, width, bytes, tokens."""
    model = models(torch.float32)
    engine = engine_of(model, tokenizer, cache_gib=cache_gib)
    config, stats = model.config, engine.stats()
    runner = engine.runner
    assert isinstance(runner, Runner)
    formula = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 4 * stats.pages_total
    assert runner.cache.data.nbytes == pytest.approx(formula, rel=0.05)
    assert formula == pytest.approx(cache_gib * 2**30, rel=0.05)


def test_a_text_model_takes_no_pictures(vl_config, tokenizer):
    config = dataclasses.replace(vl_config, vision=None, mrope_section=None, vision_expert_width=0)
    model = ErnieModel(config).set_dtype(torch.float64).eval()
    engine = engine_of(model, tokenizer)
    check(engine, model, text(1, 9), engine.generate([text(1, 9)], PARAMS)[0])
    with pytest.raises(ValueError, match="text model"):
        engine.add(with_pictures(vl_config, 1), PARAMS)


@pytest.mark.parametrize(("name", "value"), [("page_tokens", 0), ("max_waiting", -1), ("max_context", 1)])
def test_a_setting_outside_its_range(name, value):
    with pytest.raises(ValueError, match=rf"engine\.{name} is {value}; it must be"):
        EngineSettings(**{name: value})


@pytest.mark.parametrize("setting", [{"cache_gib": 1e-9}, {"cache_gib": 1e6}, {"max_context": 10**6}])
def test_open_engine_names_the_setting(models, tokenizer, setting):
    from train.config import UserError
    from train.inference_config import ModelAtWork
    from train.served import Served, open_engine

    model = models()
    served = Served(model, SimpleNamespace(tokenizer=tokenizer))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=f"engine.{next(iter(setting))}"):
        open_engine(ModelAtWork(engine=EngineSettings(**setting)), served)
    config = ModelAtWork(cpu=True, engine=EngineSettings(cache_gib=0.01, page_tokens=8))
    assert len(open_engine(config, served).generate([text(1, 9)], PARAMS)[0].token_ids) == 6


def test_open_engine_counts_the_copies_of_weights(models, tokenizer, monkeypatch):
    from train import served
    from train.config import UserError
    from train.inference_config import ModelAtWork

    opened = served.Served(models(torch.float32), SimpleNamespace(tokenizer=tokenizer))  # pyright: ignore[reportArgumentType]
    config = ModelAtWork(cpu=True, engine=EngineSettings(cache_gib=2**-7))
    copies = copied_bytes(opened.model)
    for free, message in ((2**23 + copies - 1, "lower it"), (copies - 1, "precision=bf16"), (2**23 + copies, None)):
        monkeypatch.setattr(served, "available_memory", lambda device, free=free: free)
        if message is None:
            served.open_engine(config, opened)
        else:
            with pytest.raises(UserError, match=f"engine.cache_gib .* copies of dense weights .* {message}"):
                served.open_engine(config, opened)
