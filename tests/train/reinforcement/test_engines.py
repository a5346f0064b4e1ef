"""The engine of a rollout: what shares a step does not depend on the clock, and tools do not stop it."""

import asyncio
import random
import time

import pytest
import torch

from ernie_model.inference.engine import EngineSettings
from ernie_model.inference.request import Prompt, RequestError, SamplingParams
from ernie_model.model import ErnieModel
from tests.tiny import SPARSE, tiny_processor
from train.loop import Interrupted
from train.reinforcement.engines import LocalEngine

SETTINGS = EngineSettings(cache_gib=0.02, step_tokens=64, max_running=8)


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    torch.manual_seed(1)
    model = ErnieModel(SPARSE)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def rollout(engine: LocalEngine, shake: random.Random | None = None, attempts: int = 12):
    """Two turns each, with something between them that takes its time."""

    async def pause():
        if shake is not None:
            await asyncio.sleep(shake.random() * 0.02)

    async def attempt(number: int):
        await pause()
        prompt = Prompt(tuple(range(10, 20 + number % 3)))
        first = await engine.generates.generate(prompt, SamplingParams(max_new_tokens=3 + number % 4, seed=number))
        await pause()
        follow = prompt.extended(first.token_ids + (11, 12))
        second = await engine.generates.generate(follow, SamplingParams(max_new_tokens=4, seed=100 + number))
        return first, second

    engine.begin(5)
    seen = shared_steps(engine)
    try:
        return asyncio.run(engine.together([attempt(number) for number in range(attempts)])), seen
    finally:
        engine.end()


def shared_steps(engine: LocalEngine) -> list[list[int]]:
    """Filled in as it runs: of each step, the seeds of the requests that it is for."""
    turns, seen = engine.generates, []
    stock = turns.engine.step

    def step():
        seen.append(sorted(ask.request.params.seed or 0 for ask in turns._waiting.values()))
        return stock()

    turns.engine.step = step
    return seen


def told(rolled):
    found, seen = rolled
    return [[(one.token_ids, one.logprobs, one.versions) for one in pair] for pair in found], seen


@pytest.mark.parametrize("away", [0, 1, 4])
def test_the_same_to_the_last_bit_however_long_anything_takes(model, away):
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS, away=away)
    quick = told(rollout(engine))
    assert quick == told(rollout(engine, random.Random(1))) == told(rollout(engine, random.Random(2)))
    assert all(version == 5 for pair in quick[0] for one in pair for version in one[2])


@pytest.mark.parametrize("away", [0, 3])
def test_others_go_on_while_an_attempt_is_in_a_tool(model, away):
    """It comes back when they have stood still for a while, which they do after `away` steps and no sooner."""
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS, away=away)

    async def calls_a_tool():
        await engine.generates.generate(Prompt((10, 11)), SamplingParams(max_new_tokens=2, seed=0, ignore_end=True))
        steps = -1
        while steps != len(seen):
            steps = len(seen)
            await asyncio.sleep(0.2)
        await engine.generates.generate(Prompt((10, 12)), SamplingParams(max_new_tokens=2, seed=2, ignore_end=True))
        return steps

    async def goes_on():
        await engine.generates.generate(Prompt((11, 12)), SamplingParams(max_new_tokens=12, seed=1, ignore_end=True))

    engine.begin(0)
    seen = shared_steps(engine)
    steps, _ = asyncio.run(engine.together([calls_a_tool(), goes_on()]))
    assert steps == 2 + away
    assert seen == [[0, 1]] * 2 + [[1]] * away + [[1, 2]] * 2 + [[1]] * (12 - 4 - away)


def test_steps_without_anybody_are_left_out(model):
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS, away=50)
    found, seen = rollout(engine, attempts=2)
    assert [len(one.token_ids) for pair in found for one in pair] == [3, 4, 4, 4]
    assert seen == [[0, 1]] * 3 + [[1]] + [[100]] + [[100, 101]] * 3 + [[101]]


def test_what_fails_ends_the_rollout_and_leaves_nothing_behind(model):
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS)

    async def fails():
        await engine.generates.generate(Prompt((10, 11)), SamplingParams(max_new_tokens=2, seed=0))
        raise RequestError("broken")

    async def waits():
        return await engine.generates.generate(Prompt((10, 11)), SamplingParams(max_new_tokens=50, seed=1))

    engine.begin(0)
    with pytest.raises(RequestError, match="broken"):
        asyncio.run(engine.together([fails(), waits()]))
    engine.end()
    assert len(rollout(engine)[0]) == 12


def test_attempts_are_given_up_when_the_process_is_to_end(model):
    """While one of them is in a tool that takes long, and while all of them sample."""
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS)
    begin = time.monotonic()

    async def samples(seed: int):
        return await engine.generates.generate(Prompt((10, 11)), SamplingParams(max_new_tokens=100, seed=seed))

    async def in_a_tool():
        await asyncio.sleep(60)

    for attempts in ([samples(0), in_a_tool()], [samples(0), samples(1)]):
        calls = iter(range(1000))
        engine.begin(0)
        with pytest.raises(Interrupted):
            asyncio.run(engine.together(attempts, lambda calls=calls: next(calls) >= 3))
        engine.end()
    assert time.monotonic() - begin < 30


def test_modes_are_as_before_and_nothing_records_a_gradient(model):
    model.train()
    model.layers[0].eval()
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS)
    rollout(engine, attempts=2)
    assert model.training and not model.layers[0].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.layers[0].train()


def test_the_weights_that_train_are_those_that_answer(model):
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS)
    before = told(rollout(engine))
    saved = model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1.5)
    assert told(rollout(engine)) != before
    with torch.no_grad():
        model.embed_tokens.weight.copy_(saved)
    assert told(rollout(engine)) == before


def test_noise_disturbs_the_copy_alone(model):
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    plain = told(rollout(LocalEngine(model, tiny_processor().tokenizer, SETTINGS)))
    noisy = LocalEngine(model, tiny_processor().tokenizer, SETTINGS, noise=0.3)
    assert told(rollout(noisy)) != plain
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
