"""The engine in its thread: whoever waits gets an answer or an error, whatever happens meanwhile."""

import asyncio
import contextlib
import dataclasses
import random
import subprocess
import sys
import threading

import pytest

from ernie_model.inference.async_engine import AsyncEngine, EngineClosed
from ernie_model.inference.request import EngineFull, Finish, RequestError, SamplingParams
from tests.ernie_model.inference.fake_runner import make_engine
from tests.ernie_model.inference.test_engine import GREEDY, Check, text, with_pictures

LONG = dataclasses.replace(GREEDY, max_new_tokens=200)


def run(main, timeout_s: float = 60.0):
    return asyncio.run(asyncio.wait_for(main, timeout_s))


def make(config, tokenizer, **settings):
    engine, runner = make_engine(config, tokenizer, num_pages=settings.pop("num_pages", 400), **settings)
    return AsyncEngine(engine), engine, runner


def slowly(runner) -> threading.Event:
    """Until the event is set a step takes 10 ms: an answer is still being written when a test gets round to it."""
    fast, run_rows = threading.Event(), runner.run
    runner.run = lambda rows: (fast.wait(0.01), run_rows(rows))[1]
    return fast


def test_many_at_once_each_gets_its_own(vl_config, tokenizer):
    check = Check(vl_config, tokenizer)

    async def main():
        engine, inner, _ = make(vl_config, tokenizer, max_running=8)
        prompts = [text(seed, 5 + seed) for seed in range(20)] + [with_pictures(vl_config, 1)] * 3
        done = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in prompts))
        for prompt, completion in zip(prompts, done, strict=True):
            check(prompt, completion)
        deltas = [delta async for delta in engine.stream(prompts[0], GREEDY)]
        assert deltas[-1].completion is not None
        assert sum((delta.token_ids for delta in deltas), ()) == done[0].token_ids
        await engine.close()
        inner.check()
        assert inner.stats().pages_used == 0

    run(main())


def test_a_cancelled_task_cancels_its_request(vl_config, tokenizer):
    async def main():
        engine, inner, runner = make(vl_config, tokenizer)
        slowly(runner)
        task = asyncio.create_task(engine.generate(text(1, 5), LONG))
        stream = engine.stream(text(2, 5), LONG)
        async for _ in stream:
            break
        await stream.aclose()
        while not inner.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.close()
        assert inner.stats().finished == {Finish.CANCELLED: 2}

    run(main())


def test_refusals_reach_the_caller_and_nobody_else(vl_config, tokenizer):
    async def main():
        engine, inner, _ = make(vl_config, tokenizer, max_running=2, max_waiting=1)
        with pytest.raises(RequestError, match="more than"):
            await engine.generate(text(1, 5), SamplingParams(max_new_tokens=10**6))
        tasks = [asyncio.create_task(engine.generate(text(seed, 5), LONG)) for seed in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(EngineFull, match="3 requests"):
            await engine.generate(text(4, 5), LONG)
        assert all(completion.finish is Finish.LENGTH for completion in await asyncio.gather(*tasks))
        assert (await engine.generate(text(4, 5), GREEDY)).finish is Finish.LENGTH  # there is room again
        assert (await engine.generate(text(4, 5), GREEDY, timeout_s=0)).finish is Finish.TIMEOUT
        await engine.close()

    run(main())


def test_an_exception_in_the_loop_reaches_all_who_wait(vl_config, tokenizer):
    async def main():
        engine, inner, runner = make(vl_config, tokenizer, max_running=2)
        slowly(runner)

        def broken(rows):
            raise MemoryError("no room")

        tasks = [asyncio.create_task(engine.generate(text(seed, 5), LONG)) for seed in range(4)]
        while not inner.stats().sampled_tokens:
            await asyncio.sleep(0.001)
        runner.run = broken
        for task in tasks:
            with pytest.raises(EngineClosed, match="no room") as caught:
                await task
            assert isinstance(caught.value.__cause__, MemoryError)
        with pytest.raises(EngineClosed, match="no room"):
            await engine.generate(text(1, 5), GREEDY)
        with pytest.raises(EngineClosed, match="no room"):
            await engine.update_weights(lambda: None)
        await engine.close()
        assert inner.stats().pages_used == 0

    run(main())


@pytest.mark.parametrize("where", ["step", "new weights"])
def test_an_exception_reaches_who_was_on_the_way(vl_config, tokenizer, where):
    """Requests and other wishes that lie in the inbox while the last step, or the first of them, fails."""

    async def main():
        engine, _, runner = make(vl_config, tokenizer)
        inside, gate, run_rows = threading.Event(), threading.Event(), runner.run

        def slow(rows):
            inside.set()
            gate.wait()
            return broken() if where == "step" else run_rows(rows)

        def broken():
            raise MemoryError("no room")

        runner.run, runner.weights_changed = slow, broken
        tasks = [asyncio.create_task(engine.generate(text(1, 5), LONG))]
        await asyncio.to_thread(inside.wait)
        tasks.append(asyncio.create_task(engine.update_weights(lambda: None)))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(engine.generate(text(2, 5), LONG)))
        while len(engine._inbox) < 2:
            await asyncio.sleep(0.001)
        gate.set()
        for task in tasks:
            with pytest.raises(EngineClosed, match="no room"):
                await task
        await engine.close()

    run(main())


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_or_cancels(vl_config, tokenizer, drain):
    async def main():
        engine, inner, runner = make(vl_config, tokenizer, max_running=2)
        fast = slowly(runner)
        tasks = [asyncio.create_task(engine.generate(text(seed, 5), LONG)) for seed in range(5)]
        while inner.stats().waiting < 3 or not inner.stats().running:
            await asyncio.sleep(0.001)
        if drain:
            fast.set()
        await engine.close(drain=drain)
        finishes = [completion.finish for completion in await asyncio.gather(*tasks)]
        assert set(finishes) == {Finish.LENGTH if drain else Finish.CANCELLED}
        with pytest.raises(EngineClosed, match="was closed"):
            await engine.generate(text(1, 5), GREEDY)
        assert not engine._thread.is_alive()

    run(main())


def test_close_gives_up_draining(vl_config, tokenizer):
    async def main():
        engine, inner, runner = make(vl_config, tokenizer)
        slowly(runner)
        task = asyncio.create_task(engine.generate(text(1, 5), LONG))
        while not inner.stats().running:
            await asyncio.sleep(0.001)
        await engine.close(timeout_s=0.2)
        assert (await task).finish is Finish.CANCELLED

    run(main())


def test_a_request_that_arrives_while_the_engine_ends_does_not_hang(vl_config, tokenizer):
    async def main():
        draw, endless = random.Random(0), dataclasses.replace(GREEDY, max_new_tokens=1500)
        for _ in range(30):
            engine, _, _ = make(vl_config, tokenizer)
            tasks = [asyncio.create_task(engine.generate(text(seed, 5), endless)) for seed in range(3)]
            await asyncio.sleep(draw.random() * 0.003)
            await engine.close(drain=False)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineClosed) or result.finish is Finish.CANCELLED

    run(main())


def test_a_loop_that_is_gone_harms_nobody(vl_config, tokenizer):
    engine, inner, _ = make(vl_config, tokenizer)
    lost = asyncio.new_event_loop()
    waiting = engine.generate(text(1, 5), dataclasses.replace(GREEDY, max_new_tokens=1500))
    task = lost.create_task(waiting)
    while not inner.stats().running:
        lost.run_until_complete(asyncio.sleep(0.001))
    lost.run_until_complete(lost.shutdown_default_executor())
    lost.close()

    async def main():
        assert (await engine.generate(text(2, 5), LONG)).finish is Finish.LENGTH
        await engine.close()

    run(main())
    inner.check()
    assert inner.stats().finished == {Finish.LENGTH: 1, Finish.CANCELLED: 1}
    task._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue] - that is what is tried here
    with contextlib.suppress(RuntimeError):  # its loop is closed
        waiting.close()


def test_several_loops_at_once(vl_config, tokenizer):
    engine, inner, _ = make(vl_config, tokenizer)
    check, errors = Check(vl_config, tokenizer), []

    def loop(number: int) -> None:
        async def main():
            prompts = [text(10 * number + seed, 7) for seed in range(5)]
            done = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in prompts))
            for prompt, completion in zip(prompts, done, strict=True):
                check(prompt, completion)

        try:
            run(main())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and inner.stats().finished == {Finish.LENGTH: 20}
    run(engine.close())


def test_weights_change_between_two_steps(vl_config, tokenizer):
    check = Check(vl_config, tokenizer)

    async def main():
        engine, inner, runner = make(vl_config, tokenizer)
        fast, threads = slowly(runner), []
        task = asyncio.create_task(engine.generate(text(1, 5), LONG))
        while not inner.stats().sampled_tokens:
            await asyncio.sleep(0.001)
        assert await engine.update_weights(lambda: threads.append(threading.current_thread())) == 1
        with pytest.raises(ZeroDivisionError):
            await engine.update_weights(lambda: 1 / 0)
        fast.set()
        completion = await task
        check(text(1, 5), completion)
        assert {0, 2} <= set(completion.versions) and threads == [engine._thread]
        await engine.close()

    run(main())


def test_random_cancels_among_many_lose_nothing(vl_config, tokenizer):
    check, draw = Check(vl_config, tokenizer), random.Random(1)

    async def main():
        engine, inner, _ = make(vl_config, tokenizer, num_pages=60, max_running=8)

        async def one(number: int):
            prompt = text(number % 5, 6 + number % 3) if number % 4 else with_pictures(vl_config, number % 3)
            params = dataclasses.replace(GREEDY, max_new_tokens=draw.randint(1, 30))
            try:
                wait = draw.choice([None, 0.001, 0.02])
                completion = await asyncio.wait_for(engine.generate(prompt, params), wait)
            except TimeoutError:
                return 0
            check(prompt, completion)
            assert len(completion.token_ids) == params.max_new_tokens
            return 1

        results = await asyncio.gather(*(one(number) for number in range(120)))
        await engine.close()
        inner.check()
        assert 0 < sum(results) < 120 and inner.stats().pages_used == 0 and engine._num_requests == 0

    run(main())


def test_a_process_that_ends_without_closing_ends_well():
    """In the middle of a step, with a request that nobody will ever be told of."""
    script = """
import threading
from ernie_model.inference.async_engine import AsyncEngine, _Command
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Prompt, SamplingParams
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import load_tiny_tokenizer
config = ErnieConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=16, intermediate_size=128)
engine = Engine(ErnieModel(config).eval(), load_tiny_tokenizer(), EngineSettings(cache_gib=0.1))
begun, run = threading.Event(), engine.runner.run
engine.runner.run = lambda rows: (begun.set(), run(rows))[1]
server = AsyncEngine(engine)
endless = SamplingParams(max_new_tokens=50000, ignore_end=True)
server._post(_Command(lambda: [engine.add(Prompt((5, 6, 7)), endless) for _ in range(4)]))
begun.wait()
print("bye")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr
