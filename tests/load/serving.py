"""Two hundred clients at once, many of them rude: what the server gives each, and what is left afterwards.

    python -m tests.load.serving                    200 requests, printed as one table
    python -m tests.load.serving --requests 1000

Well-behaved clients (whole answers, streams, several answers, images) must get exactly the tokens that the same request
gets from an engine that does nothing else: with its own seed, so nobody's tokens fit anybody else. The others leave in
the middle, send what is no request, or read so slowly that they are cut off. Afterwards nothing may be running, waiting
or held: no place of the gate, no page of the cache. The model is tiny and random; what is measured is the server.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import resource
import socket
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import torch
from PIL import Image

from ernie_model.config import ErnieConfig, VisionConfig
from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.prompts import prepare
from ernie_model.inference.server.protocol import ChatRequest
from ernie_model.inference.server.settings import Limits, ServerSettings
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from tests.ernie_model.inference.server.running import running
from train.serving.media import MediaDoor

KINDS = {
    "whole": 5,
    "stream": 5,
    "several": 2,
    "image": 3,
    "leaves a stream": 3,
    "leaves early": 3,
    "no request": 4,
    "cut off body": 1,
    "reads slowly": 1,
}
"""What clients do, and how many of them do it."""

OPENING = "Everybody is told this at first, so that there is something in the cache that all of them share."

SETTINGS = ServerSettings(name="tiny", limits=Limits(lag_s=1.0, body_mib=0.2, concurrency=64, queue=1000))


def tiny_model() -> tuple[ErnieModel, Processor]:
    """In float64, so that what a token is does not hang on how its step was put together."""
    config = ErnieConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        initializer_range=0.1,
        num_experts=4,
        experts_per_token=2,
        text_expert_width=16,
        vision_expert_width=8,
        sparse_layers=(1,),
        mrope_section=(3, 3, 2),
        vision=VisionConfig(depth=1, hidden_size=16, num_heads=1, intermediate_size=16),
        **tiny_tokenizer_ids(),
    )
    torch.manual_seed(0)
    model = ErnieModel(config).set_dtype(torch.float64).eval().requires_grad_(False)
    return model, Processor(load_tiny_tokenizer(), config)


# -------------------------------------------------------------------------------------------------------------- clients


@dataclass
class Client:
    kind: str
    body: dict[str, Any]
    expected: tuple[str, ...] = ()
    """The text of each answer, for those that wait for it."""


@dataclass
class Report:
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slow: int = 0
    """So many clients who read nothing will have been cut off, those of earlier rounds among them."""


def clients_of(count: int, seed: int, tokens: int) -> list[Client]:
    draw = random.Random(seed)
    kinds = [kind for kind, weight in KINDS.items() for _ in range(weight)]
    return [_client(draw, kinds[number % len(kinds)], number, tokens) for number in range(count)]


def _client(draw: random.Random, kind: str, number: int, tokens: int) -> Client:
    text = f"Client {number} counts: " + " ".join(str(draw.randrange(1000)) for _ in range(draw.randrange(5, 60)))
    content: Any = text
    if kind == "image":
        file = io.BytesIO()
        shade = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (draw.randrange(28, 120), draw.randrange(28, 120)), shade).save(file, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    body = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Everybody is told this at first."},
            {"role": "user", "content": content},
        ],
        "temperature": 1.0,
        "seed": draw.randrange(2**40),
        "max_tokens": draw.randrange(2, tokens),
        "n": 2 if kind == "several" else 1,
        "stream": kind in ("stream", "several", "leaves a stream", "reads slowly"),
    }
    if kind == "reads slowly":
        body |= {"n": 4, "max_tokens": 300, "logprobs": True, "top_logprobs": 20}
    return Client(kind, body)


def alone(engine: Engine, processor: Processor, client: Client) -> tuple[str, ...]:
    """What an engine says that does nothing else."""
    request = ChatRequest.model_validate_json(json.dumps(client.body | {"stream": False}))
    job = prepare(request, processor, SETTINGS, MediaDoor())
    return tuple(engine.generate([job.prompt], [params])[0].text for params in job.attempts)


_RUDE = ThreadPoolExecutor(64)


async def visit(url: str, client: Client, draw: random.Random, report: Report) -> None:
    path = f"{url}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=120) as http:
        if client.kind in ("whole", "image"):
            began = time.perf_counter()
            answer = await http.post(path, json=client.body)
            _note(report, client, answer.status_code, time.perf_counter() - began)
            texts = tuple(choice["message"]["content"] for choice in answer.json()["choices"])
            _compare(report, client, texts)
            report.tokens += answer.json()["usage"]["completion_tokens"]
        elif client.kind in ("stream", "several"):
            await _stream(http, path, client, report)
        elif client.kind == "leaves a stream":
            async with http.stream("POST", path, json=client.body) as answer:
                left = draw.randrange(1, 4)
                async for _ in answer.aiter_lines():
                    left -= 1
                    if not left:
                        break
            report.ended["left"] += 1
        elif client.kind == "leaves early":
            try:
                await asyncio.wait_for(http.post(path, json=client.body), draw.uniform(0.001, 0.3))
                report.ended["answered before leaving"] += 1
            except TimeoutError:
                report.ended["left"] += 1
        elif client.kind == "no request":
            content = draw.choice(
                [
                    b"{",
                    b"\x00\xff" * 50,
                    b"x" * 300_000,
                    json.dumps(client.body | {"temperature": "hot"}).encode(),
                    json.dumps(client.body | {"surprise": 1}).encode(),
                    json.dumps(client.body | {"messages": _broken_image()}).encode(),
                ]
            )
            answer = await http.post(path, content=content, headers={"content-type": "application/json"})
            report.ended[f"refused {answer.status_code}"] += 1
            if answer.status_code not in (400, 413) or not answer.json()["error"]["message"]:
                report.wrong.append(f"a bad body got {answer.status_code}: {answer.text[:200]}")
        else:
            await asyncio.get_running_loop().run_in_executor(_RUDE, _rude, url, client, report)


def _broken_image() -> list[dict[str, Any]]:
    url = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


async def _stream(http: httpx.AsyncClient, path: str, client: Client, report: Report) -> None:
    began = time.perf_counter()
    texts, first, done = [""] * client.body["n"], None, False
    options = {"stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=client.body | options) as answer:
        status = answer.status_code
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            first = first or time.perf_counter() - began
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                report.wrong.append(f"an error within a stream: {chunk}")
                return
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
            if chunk.get("usage"):
                report.tokens += chunk["usage"]["completion_tokens"]
    _note(report, client, status, time.perf_counter() - began)
    if not done:
        report.wrong.append("a stream ended without [DONE]")
    report.first_seconds.append(first or 0.0)
    _compare(report, client, tuple(texts))


def _rude(url: str, client: Client, report: Report) -> None:
    """Says that more will come and leaves; or asks for much and reads nothing until it is cut off."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(client.body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(120)
        connection.connect((host, int(port)))
        cut = client.kind == "cut off body"
        length = len(content) + (1000 if cut else 0)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        if cut:
            time.sleep(0.05)
        else:
            deadline = time.monotonic() + 60
            while _outcomes(httpx.get(f"{url}/metrics").text)["lagging"] < report.slow and time.monotonic() < deadline:
                time.sleep(0.3)
            if b"[DONE]" in _rest(connection):
                report.wrong.append("who reads nothing got everything all the same")
    report.ended[client.kind] += 1


def _rest(connection: socket.socket) -> bytes:
    """What has come so far; the server is no longer there."""
    content = bytearray()
    try:
        while received := connection.recv(1 << 20):
            content += received
    except ConnectionResetError:
        pass
    return bytes(content)


def _note(report: Report, client: Client, status: int, seconds: float) -> None:
    report.ended[f"{client.kind} {status}"] += 1
    report.seconds.append(seconds)
    if status != 200:
        report.wrong.append(f"{client.kind}: status {status}")


def _compare(report: Report, client: Client, texts: tuple[str, ...]) -> None:
    if texts != client.expected:
        report.wrong.append(f"{client.kind}: {client.body['messages'][1]} got {texts}, and alone {client.expected}")


# --------------------------------------------------------------------------------------------------------------- storms


async def _storm(url: str, clients: list[Client], seed: int, report: Report) -> float:
    draw = random.Random(seed)
    began = time.perf_counter()
    await asyncio.gather(*(visit(url, client, random.Random(draw.random()), report) for client in clients))
    return time.perf_counter() - began


def storm(count: int, *, seed: int = 0, tokens: int = 40, rounds: int = 1) -> dict[str, Any]:
    """Send `count` clients at once, `rounds` times.

    Returns:
        Figures of the last round; `left` lists what was not given back, `wrong` what somebody should not have got.
    """
    model, processor = tiny_model()
    settings = EngineSettings(cache_gib=0.02, max_running=32)
    clients = clients_of(count, seed, tokens)
    by_itself = Engine(model, processor.tokenizer, replace(settings, share_prefixes=False))
    for client in clients:
        if client.kind in ("whole", "image", "stream", "several"):
            client.expected = alone(by_itself, processor, client)
    engine = AsyncEngine(Engine(model, processor.tokenizer, settings))
    app = make_app(engine, processor, SETTINGS, opener=MediaDoor(), engine_stats=engine.stats)
    service = app.state.service
    wrong, kilobytes = [], []
    with running(app) as url:  # the kernel is patient here, so it is the server that notices who reads nothing
        for number in range(rounds):
            report = Report(slow=(number + 1) * sum(client.kind == "reads slowly" for client in clients))
            before = engine.stats()
            seconds = asyncio.run(_storm(url, clients, seed, report))
            deadline = time.monotonic() + 30
            while (left := _left(engine, service)) and time.monotonic() < deadline:
                time.sleep(0.05)
            wrong += report.wrong
            kilobytes.append(resident_kb())
        metrics = httpx.get(f"{url}/metrics").text
    asyncio.run(engine.close())
    stats = engine.stats()
    order = sorted(report.seconds)
    return {
        "requests": len(clients),
        "wrong": wrong,
        "left": left,
        "ended": dict(report.ended),
        "outcomes": _outcomes(metrics),
        "distinct answers": len({client.expected for client in clients if client.expected}),
        "seconds": seconds,
        "requests/s": len(clients) / seconds,
        "answered": len(order),
        "p50 s": statistics.median(order),
        "p95 s": order[int(0.95 * (len(order) - 1))],
        "first token p50 s": statistics.median(report.first_seconds),
        "tokens to clients/s": report.tokens / seconds,
        "tokens sampled/s": (stats.sampled_tokens - before.sampled_tokens) / seconds,
        "preemptions": stats.preemptions,
        "growth of memory, last round, kB": kilobytes[-1] - kilobytes[-2] if rounds > 1 else None,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _left(engine: AsyncEngine, service: Any) -> dict[str, int]:
    stats = engine.stats()
    held = {
        "running": stats.running,
        "waiting": stats.waiting,
        "pages": stats.pages_used,
        "places": service.gate.inside,
        "queue": service.gate.waiting,
    }
    return {name: number for name, number in held.items() if number}


def _outcomes(metrics: str) -> dict[str, int]:
    lines = [line for line in metrics.splitlines() if line.startswith("ernie_requests_total{")]
    return {line.split('"')[1]: int(float(line.rsplit(" ", 1)[1])) for line in lines}


def resident_kb() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40, help="longest answer of a well-behaved client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in storm(options.requests, rounds=options.rounds, tokens=options.tokens).items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(f"{name:34} {shown}")


if __name__ == "__main__":
    main()
