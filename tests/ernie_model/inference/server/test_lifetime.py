"""From SIGTERM to the end: what runs is finished, what is new is refused."""

import asyncio
import contextlib
import os
import signal
import time

import httpx
import pytest

from ernie_model.inference.async_engine import EngineClosed
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.lifetime import EngineFailed, address, bind, serve
from ernie_model.inference.server.settings import ServerSettings
from tests.ernie_model.inference.scripted import ScriptedEngine

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}]}


@contextlib.asynccontextmanager
async def serving(processor, *, words, grace_s):
    """The engine, a client, and the task that ends when the server does."""
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "word " * words, pause_s=0.02)
    listener = bind("127.0.0.1", 0, lag_s=5)
    ready = asyncio.Event()
    app = make_app(engine, processor, ServerSettings(name="tiny"))
    task = asyncio.create_task(serve(app, listener, grace_s=grace_s, ready=ready.set))
    await asyncio.wait_for(ready.wait(), 10)
    async with httpx.AsyncClient(base_url=address(listener), timeout=20) as client:
        yield engine, client, task
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    listener.close()


async def begun(engine):
    while not engine.running:
        await asyncio.sleep(0.01)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(processor):
    async def scene():
        async with serving(processor, words=40, grace_s=20) as (engine, client, task):
            assert (await client.get("/health")).status_code == 200
            running = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await begun(engine)
            terminate()
            await asyncio.sleep(0.05)
            health = await client.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "draining"
            late = await client.post("/v1/chat/completions", json=BODY)
            assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
            assert late.headers["retry-after"]
            assert not task.done()
            answer = await running
            assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "stop"
            assert answer.json()["choices"][0]["message"]["content"].count("word") == 40
            await asyncio.wait_for(task, 5)

    handler = signal.getsignal(signal.SIGTERM)
    asyncio.run(scene())
    assert signal.getsignal(signal.SIGTERM) == handler


def test_an_idle_server_ends_at_once(processor):
    async def scene():
        async with serving(processor, words=1, grace_s=60) as (_, client, task):
            await client.get("/health")
            began = time.monotonic()
            terminate()
            await asyncio.wait_for(task, 5)
            assert time.monotonic() - began < 3

    asyncio.run(scene())


@pytest.mark.parametrize("signals", [1, 2])
def test_what_runs_is_cut_off_after_the_grace_or_by_a_second_signal(processor, signals):
    async def scene():
        async with serving(processor, words=1000, grace_s=0.3 if signals == 1 else 60) as (engine, client, task):
            running = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await begun(engine)
            began = time.monotonic()
            terminate()
            if signals == 2:
                await asyncio.sleep(0.1)
                terminate()
            await asyncio.wait_for(task, 6)
            assert time.monotonic() - began < 5 and engine.running == 0
            answer = await running
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"

    asyncio.run(scene())


def test_an_engine_that_stops_ends_the_server(processor):
    class Stopped(ScriptedEngine):
        async def stream(self, prompt, params, *, timeout_s=None):
            raise EngineClosed("The engine stopped: out of memory")
            yield

    async def scene():
        listener, ready = bind("127.0.0.1", 0, lag_s=5), asyncio.Event()
        app = make_app(Stopped(processor.tokenizer, []), processor, ServerSettings(name="tiny"))
        task = asyncio.create_task(serve(app, listener, grace_s=5, ready=ready.set))
        await asyncio.wait_for(ready.wait(), 10)
        async with httpx.AsyncClient(base_url=address(listener), timeout=20) as client:
            answer = await client.post("/v1/chat/completions", json=BODY)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_stopped"
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(task, 5)

    asyncio.run(scene())


def test_a_port_that_is_taken_is_known_before_anything_else():
    listener = bind("127.0.0.1", 0, lag_s=1)
    listener.listen()
    with pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", listener.getsockname()[1], lag_s=1)
    listener.close()
    assert address(listener := bind("::1", 0, lag_s=1)).startswith("http://[::1]:")
    listener.close()
