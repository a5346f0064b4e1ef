"""A server from its first request to its last.

    listen ─► ready ─► SIGTERM: /health says 503, new requests get 503 ─► what runs is finished, within grace_s ─► end

The port goes on being listened to while the rest is finished, so that whoever asks /health learns why. A second
signal ends at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator

import uvicorn
from fastapi import FastAPI

from ernie_model.inference.server.service import Service

logger = logging.getLogger(__name__)


SEND_BUFFER = 256 * 1024
"""Bytes that the kernel may hold of an answer that is not taken. Left to itself it would hold megabytes for each
client, and who reads nothing would be noticed late."""


def bind(host: str, port: int, *, lag_s: float) -> socket.socket:
    """A socket of its own before anything slow is begun: a port that is taken is known at once.

    Args:
        port: 0 chooses a free one.
        lag_s: what is left of a client who was cut off for taking nothing so long, the kernel drops after as long again
            (where it can).

    Raises:
        OSError: it is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2 * lag_s * 1000))
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, str(host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class EngineFailed(Exception):
    """The engine has stopped by itself; the log says why."""


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would stop listening at once, and raise them again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: FastAPI, listener: socket.socket, *, grace_s: float, ready: Callable[[], None]) -> None:
    """Returns when all is over. `ready` is called when requests are taken.

    Raises:
        EngineFailed: when what could be answered is.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False, lifespan="on"
    )
    logging.getLogger("uvicorn.error").addFilter(_explained_by_us)
    server = _Server(config)
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (now if service.draining else stop).set()
        service.draining = True

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if not running.done():
            ready()
        await _first(None, running, stop.wait(), service.failed.wait())
        if not running.done():
            service.draining = True
            await _first(grace_s, running, service.gate.empty(), now.wait())
            if cut := service.end():
                logger.warning("%d requests are cut off", cut)
            server.should_exit = True
        await running
        if service.failed.is_set():
            raise EngineFailed
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _explained_by_us(record: logging.LogRecord) -> bool:
    """A client who was cut off for taking nothing: app.py says so, uvicorn would suspect a mistake in the program."""
    return "without completing response" not in record.getMessage()


async def _first(timeout: float | None, task: asyncio.Task, *others: Coroutine) -> None:
    """Returns when `task` or one of the others is done, or the time is over. The others are cancelled."""
    waiting = [asyncio.create_task(other) for other in others]
    await asyncio.wait([task, *waiting], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for other in waiting:
        other.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
