"""What one client may take from the others: nothing that was not meant for it."""

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from ernie_model.inference.request import EngineFull, RequestError
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.gate import Busy, Gate
from ernie_model.inference.server.settings import Limits, ServerSettings
from tests.ernie_model.inference.scripted import ScriptedEngine
from tests.ernie_model.inference.server.running import client, running

HELLO = [{"role": "user", "content": "Hello?"}]
BODY = {"model": "tiny", "messages": HELLO}
LONG = "word " * 300


@contextlib.contextmanager
def served(processor, engine=None, *, keys=(), **limits):
    engine = engine or ScriptedEngine(processor.tokenizer, lambda prompt: "Good morning.")
    settings = ServerSettings(name="tiny", keys=keys, limits=Limits(**limits))
    app = make_app(engine, processor, settings)
    with running(app) as url:
        yield url, engine, app.state.service


def post(url, body=BODY, **options):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20, **options)


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def counted(service, outcome):
    return service.metrics.requests.labels(outcome)._value.get()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("concurrency", 0, "0; it must be 1 or more"),
        ("queue", -1, "-1; it must be 0 or more"),
        ("time_s", 0.0, "0.0; it must be more than 0, and finite"),
        ("body_mib", math.nan, "nan; it must be more than 0, and finite"),
        ("megapixels", math.inf, "inf; it must be more than 0, and finite"),
    ],
)
def test_limits_that_cannot_be(name, value, rule):
    with pytest.raises(ValueError, match=f"limits.{name} is {rule}."):
        Limits(**{name: value})


# ---------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_asked_for(processor):
    with served(processor, keys=("first-key", "second-key")) as (url, engine, _):
        for key in ("first-key", "second-key"):
            with client(url, key) as one:
                assert one.chat.completions.create(**BODY).choices[0].message.content == "Good morning."
        for wrong in ("first", "FIRST-KEY", "first-key,second-key"):
            with client(url, wrong) as one, pytest.raises(openai.AuthenticationError) as error:
                one.chat.completions.create(**BODY)
            assert error.value.code == "invalid_api_key" and "Authorization: Bearer" in str(error.value)
        for headers in ({}, {"authorization": "first-key"}, {"authorization": "Basic first-key"}):
            for path in ("models", "models/tiny"):
                assert httpx.get(f"{url}/v1/{path}", headers=headers).status_code == 401
            answer = post(url, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert len(engine.prompts) == 2


# -------------------------------------------------------------------------------------------------------------- bodies


def test_a_body_that_is_too_large_is_not_read_to_its_end(processor):
    with served(processor, body_mib=1000 / 2**20) as (url, engine, _):
        for content in (b"x" * 1001, iter([b"x" * 600] * 2)):  # with its length said, and without
            headers = {"content-type": "application/json"}
            answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
            assert answer.status_code == 413 and "more than 1,000 bytes" in answer.json()["error"]["message"]

        with raw(url) as connection:  # says that it will send much, and sends nothing
            connection.sendall(head(10**12))
            assert b" 413 " in connection.recv(1000)
        assert engine.prompts == [] and post(url).status_code == 200


def test_a_body_that_does_not_come_is_given_up(processor):
    with served(processor, time_s=0.3) as (url, _, service):
        with raw(url) as connection:
            connection.sendall(head(100) + b"{")
            assert b" 408 " in connection.recv(1000)
        until(lambda: service.gate.inside == 0)
        assert counted(service, "timeout") == 1


@contextlib.contextmanager
def raw(url, receive_buffer=None):
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        yield connection


def head(length):
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


# --------------------------------------------------------------------------------------------------------------- places


def test_places_are_limited_and_who_waits_is_served_in_turn(processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "Good morning.", pause_s=0.1)
    with served(processor, engine, concurrency=1, queue=1) as (url, _, service), ThreadPoolExecutor(3) as threads:
        first = threads.submit(post, url)
        until(lambda: service.gate.inside == 1)
        second = threads.submit(post, url)
        until(lambda: service.gate.waiting == 1)
        with client(url) as refused, pytest.raises(openai.RateLimitError) as error:
            refused.chat.completions.create(**BODY)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert error.value.code == "rate_limit_exceeded"
        assert httpx.get(f"{url}/health").status_code == 200, "who only asks how it is needs no place"
        assert not second.done()
        assert first.result().status_code == second.result().status_code == 200
        until(lambda: counted(service, "busy") == 1 and counted(service, "done") == 2)


def test_an_engine_that_is_full_is_told_like_a_server_that_is(processor):
    class Full(ScriptedEngine):
        async def stream(self, prompt, params, *, timeout_s=None):
            raise EngineFull("no")
            yield

    with served(processor, Full(processor.tokenizer, [])) as (url, _, service):
        answer = post(url)
        assert answer.status_code == 429 and answer.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RequestError("The prompt has 9 tokens; at most 8 fit."), 400, "at most 8 fit"),
        (RuntimeError("a secret of the machine"), 500, "its log says why"),
    ],
)
def test_what_the_engine_refuses_or_breaks_is_told_before_anything_is_sent(
    processor, stream, error, status, message, caplog
):
    class Refusing(ScriptedEngine):
        async def stream(self, prompt, params, *, timeout_s=None):
            raise error
            yield

    with served(processor, Refusing(processor.tokenizer, [])) as (url, _, service):
        answer = post(url, BODY | {"stream": stream})
        assert answer.status_code == status and message in answer.json()["error"]["message"]
        assert ("a secret of the machine" in caplog.text) == (status == 500)
        assert service.gate.inside == 0


def test_an_error_within_a_stream_ends_it(processor):
    class Breaking(ScriptedEngine):
        async def stream(self, prompt, params, *, timeout_s=None):
            async for delta in super().stream(prompt, params):
                if len(self.prompts) == 1 and self.running and delta.completion is None:
                    yield delta
                    raise RuntimeError("broken")

    with served(processor, Breaking(processor.tokenizer, lambda prompt: "Good morning.")) as (url, engine, _):
        with client(url) as asking, pytest.raises(openai.APIError, match="The server failed"):
            for _ in asking.chat.completions.create(**BODY, stream=True):
                pass
        assert engine.running == 0


# ----------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_cancelled(processor, stream):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: LONG, pause_s=0.02)
    with served(processor, engine, time_s=0.5) as (url, _, service):
        answer = post(url, BODY | {"stream": stream})
        if stream:
            last = answer.text.strip().split("\n\n")[-1]
            assert answer.status_code == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
            assert answer.headers["x-should-retry"] == "false"
        assert engine.running == 0 and service.gate.inside == 0
        assert counted(service, "timeout") == 1


# -------------------------------------------------------------------------------------------------------------- clients


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered_further(processor, stream):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: LONG, pause_s=0.02)
    with served(processor, engine) as (url, _, service):
        with raw(url) as connection:
            body = json.dumps(BODY | {"stream": stream, "n": 2}).encode()
            connection.sendall(head(len(body)) + body)
            until(lambda: engine.running == 2)
            if stream:
                assert connection.recv(100)
        until(lambda: engine.running == 0)
        until(lambda: service.gate.inside == 0)
        assert counted(service, "gone") == 1 and counted(service, "done") == 0


def test_a_client_that_takes_nothing_is_cancelled_and_holds_nobody(processor):
    """Its answer is longer than all buffers between it and the engine."""
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "x " * 6000 if len(prompt.token_ids) < 20 else "Hi.")
    with served(processor, engine, lag_s=0.5, new_tokens=20_000, attempts=8) as (url, _, service):
        body = json.dumps(BODY | {"stream": True, "max_tokens": 20_000, "n": 8, "logprobs": True}).encode()
        with raw(url, receive_buffer=4096) as lagging:
            lagging.sendall(head(len(body)) + body)
            until(lambda: engine.running == 8)
            began = time.monotonic()
            other = post(
                url, {"model": "tiny", "messages": [{"role": "user", "content": "Somebody else is here, too."}]}
            )
            assert other.json()["choices"][0]["message"]["content"] == "Hi."
            assert time.monotonic() - began < 5
            until(lambda: counted(service, "lagging") == 1, 30)
            until(lambda: engine.running == 0 and service.gate.inside == 0)


def test_what_waits_for_a_slow_client_is_bounded(processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: LONG)

    async def ask():
        settings = ServerSettings(name="tiny", limits=Limits(lag_tokens=50))
        service = make_app(engine, processor, settings).state.service
        job = await service.prepare(await service.read(json.dumps(BODY).encode()))
        batches = service.attempts(job)
        await anext(batches)
        await asyncio.sleep(0.5)  # the engine goes on
        with pytest.raises(Exception) as error:  # noqa: PT011
            async for batch in batches:
                assert len(batch) <= 51
        await batches.aclose()
        return type(error.value).__name__

    assert asyncio.run(ask()) == "Lagging" and engine.running == 0


# ----------------------------------------------------------------------------------------------------------- the gate


def test_the_gate_counts_right_whatever_happens_inside():
    async def scene():
        gate = Gate(2, 2)
        opened = asyncio.Event()

        async def visit(fails):
            async with gate.enter():
                await opened.wait()
                if fails:
                    raise ValueError

        visits = [asyncio.create_task(visit(number % 2 == 1)) for number in range(4)]
        await asyncio.sleep(0)
        assert (gate.inside, gate.waiting) == (2, 2)
        with pytest.raises(Busy):
            async with gate.enter():
                raise AssertionError
        visits[3].cancel()  # waits
        visits[0].cancel()  # is inside
        await asyncio.sleep(0.01)
        assert (gate.inside, gate.waiting) == (2, 0)
        empty = asyncio.create_task(gate.empty())
        await asyncio.sleep(0)
        assert not empty.done()
        opened.set()
        await asyncio.gather(*visits, return_exceptions=True)
        await asyncio.wait_for(empty, 1)
        assert (gate.inside, gate.waiting) == (0, 0)
        async with gate.enter(), gate.enter():
            pass

    asyncio.run(scene())


def test_images_are_decoded_off_the_event_loop(processor):
    """While one request's image takes its time, others are answered."""

    class Slow:
        began = threading.Event()
        go_on = threading.Event()

        def image(self, url, max_pixels):
            from PIL import Image

            self.began.set()
            assert self.go_on.wait(10)
            return Image.new("RGB", (28, 28))

        def video(self, url):
            raise AssertionError

    opener = Slow()
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "Good morning.")
    app = make_app(engine, processor, ServerSettings(name="tiny", limits=Limits(workers=2)), opener=opener)
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    with running(app) as url, ThreadPoolExecutor(1) as threads:
        slow = threads.submit(post, url, {"model": "tiny", "messages": [{"role": "user", "content": [picture]}]})
        assert opener.began.wait(10)
        assert post(url).status_code == 200 and not slow.done()
        opener.go_on.set()
        assert slow.result().status_code == 200
