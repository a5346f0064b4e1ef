"""Threads that work ahead, and a watch over them: who takes too long is named, and not waited for for ever.

    waiting for a record      30 s     "still working on record 'clip-7' (clips.jsonl:7) after 30 s"     once
                             300 s     StuckError; the thread is given up, and another takes its place

A thread inside a decoder cannot be stopped from outside. One that is given up keeps its memory and perhaps a core until
the decoder returns or the process ends; all threads are daemons, so it cannot hold up the end of the run.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from data.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StuckError(DataError):
    """A piece of work took longer than it may."""


class Workers:
    """`count` threads. `slow_s` and `dead_s` are counted from when a piece of work begins."""

    def __init__(self, count: int, *, slow_s: float = 30.0, dead_s: float = 300.0):
        self.slow_s, self.dead_s = slow_s, dead_s
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._began: dict[Future[Any], float] = {}
        self._given_up: set[threading.Thread] = set()
        self._at_work: dict[Future[Any], threading.Thread] = {}
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._hire()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._tasks.put((future, work))
        return future

    def result(self, future: "Future[T]", name: Callable[[], str]) -> T:
        """Wait for a piece of work; `name` says what it is about. Raises what the work raised, or StuckError."""
        warned = False
        while True:
            wait([future], timeout=self.slow_s / 4)
            if future.done():
                return future.result()
            began = self._began.get(future)
            lasted = 0.0 if began is None else time.monotonic() - began
            if lasted >= self.dead_s:
                self._give_up(future)
                raise StuckError(
                    f"{name()}: not finished after {lasted:.0f} s (data.dead_s={self.dead_s:g}); its thread was given "
                    "up. Look at the record's media, or raise data.dead_s."
                )
            if lasted >= self.slow_s and not warned:
                logger.warning("still working on %s after %.0f s", name(), lasted)
                warned = True

    def close(self) -> None:
        """Let the threads finish what they are at, and end."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread not in self._given_up:
                thread.join()

    def _hire(self) -> None:
        thread = threading.Thread(target=self._work, name="encode", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _give_up(self, future: "Future[Any]") -> None:
        thread = self._at_work.get(future)
        if thread is not None and thread not in self._given_up:
            self._given_up.add(thread)
            self._hire()

    def _work(self) -> None:
        thread = threading.current_thread()
        while thread not in self._given_up and (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            self._at_work[future], self._began[future] = thread, time.monotonic()
            try:
                value, error = work(), None
            except BaseException as caught:  # raised again where the result is asked for
                value, error = None, caught
            del self._at_work[future], self._began[future]
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)
