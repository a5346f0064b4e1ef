"""A server in a thread, as clients meet it: over a socket."""

import contextlib
import threading
import time
from collections.abc import Iterator

import openai
import uvicorn
from fastapi import FastAPI

from ernie_model.inference.server.lifetime import address, bind


@contextlib.contextmanager
def running(app: FastAPI, *, lag_s: float = 30.0) -> Iterator[str]:
    """The address of `app`, which answers until the end of the block."""
    listener = bind("127.0.0.1", 0, lag_s=lag_s)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def client(url: str, key: str = "none") -> Iterator[openai.OpenAI]:
    """Closed at the end of the block: one left to the collector would warn of its sockets in another test."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as one:
        yield one
