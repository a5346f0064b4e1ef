"""The engine in a thread of its own, for any number of event loops: server, agents, evaluation.

    event loops                                             the thread
    generate, stream ─ prepare (in a worker) ──inbox──►  enqueue, cancel, ... ─► Engine.step
         ▲                                                                            │
         └────────────────── deltas, one call for each loop ◄─────────────────────────┘

Whoever waits is always told: an answer, a refusal, or what stopped the engine.
"""

import asyncio
import atexit
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from ernie_model.inference.engine import Engine, EngineStats, said
from ernie_model.inference.request import Completion, Delta, EngineFull, Prompt, SamplingParams


class EngineClosed(Exception):
    """The engine was closed, or an exception stopped it (its cause); it takes no request any more."""


class AsyncEngine:
    """An engine with a thread of its own, for any number of event loops. It is a `request.Generates`.

    An exception that stops the engine reaches everyone who waits, as the cause of an `EngineClosed`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._wake = threading.Condition()
        # Under `_wake`:
        self._inbox: deque[_Command] = deque()
        self._num_requests = 0  # from the check at the door to the last delta
        self._closing = False
        self._ended = False
        self._error: BaseException | None = None
        # Of the thread alone:
        self._readers: dict[int, _Reader] = {}
        self._aborted = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # a thread that is inside torch when Python goes away takes the process with it

    @property
    def max_context(self) -> int:
        return self.engine.max_context

    async def generate(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Completion:
        """Cancelling the task cancels the request.

        Raises:
            RequestError: it cannot be honoured.
            EngineFull: there are `max_running` + `max_waiting` requests already.
            EngineClosed: `close` was called, or an exception stopped the engine.
        """
        reader = await self._submit(prompt, params, timeout_s, whole=True)
        try:
            while (delta := await reader.next()).completion is None:
                pass
            return delta.completion
        finally:
            self._leave(reader)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None
    ) -> AsyncIterator[Delta]:
        """Leaving the iterator cancels the request. Raises as `generate` does, at the first delta."""
        reader = await self._submit(prompt, params, timeout_s, whole=False)
        try:
            while True:
                delta = await reader.next()
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._leave(reader)

    async def update_weights(self, change: Callable[[], None]) -> int:
        """Call `change`, which may write into the model's weights, between two steps; return the new version.

        Raises:
            Exception: what `change` raised; the version is a new one all the same.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()

        def settle(result: int | Exception) -> None:
            if not future.done():
                future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

        def run() -> None:
            error = None
            try:
                change()
            except Exception as raised:
                error = raised
            self.engine.weights_changed()
            _call_in(loop, settle, error or self.engine.version)

        self._post(_Command(run, lambda closed: _call_in(loop, settle, closed)))
        return await future

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, and end the thread: when all are answered, or after `timeout_s`; without `drain`, at
        once. Who is not answered by then gets `Finish.CANCELLED`, or `EngineClosed` if it was still on its way."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if drain:
            await asyncio.to_thread(self._thread.join, timeout_s)
        await asyncio.to_thread(self._end)
        atexit.unregister(self._end)

    def _end(self) -> None:
        """Now, and wait until the thread has."""
        with self._wake:
            self._inbox.append(_Command(self._abort))
            self._wake.notify()
        self._thread.join()

    # --------------------------------------------------------------------------------------------- in the event loops

    async def _submit(
        self, prompt: Prompt, params: SamplingParams, timeout_s: float | None, *, whole: bool
    ) -> "_Reader":
        with self._wake:
            if self._closing or self._ended:
                raise EngineClosed(self._why_closed()) from self._error
            if self._num_requests >= self.engine.settings.max_requests:
                raise EngineFull(self.engine.settings.full_message)
            self._num_requests += 1
        reader = _Reader(asyncio.get_running_loop(), whole)
        posted = False
        try:
            request = await asyncio.to_thread(self.engine.prepare, prompt, params, timeout_s=timeout_s)

            def enqueue() -> None:
                reader.id = self.engine.enqueue(request)
                self._readers[reader.id] = reader

            self._post(_Command(enqueue, lambda closed: _call_in(reader.loop, _hand_over, [(reader, closed)])))
            posted = True
        finally:
            if not posted:
                self._forget_one()
        return reader

    def _leave(self, reader: "_Reader") -> None:
        """Its task is done with it, or was cancelled."""
        if not reader.told_all:

            def cancel() -> None:
                if reader.id is not None:
                    self.engine.cancel(reader.id)

            with contextlib.suppress(EngineClosed):
                self._post(_Command(cancel))

    def _post(self, command: "_Command") -> None:
        """Have the engine's thread call it before its next step."""
        with self._wake:
            if self._ended:
                raise EngineClosed(self._why_closed()) from self._error
            self._inbox.append(command)
            self._wake.notify()

    def _forget_one(self) -> None:
        with self._wake:
            self._num_requests -= 1
            self._wake.notify()

    def _why_closed(self) -> str:
        return "The engine was closed." if self._error is None else f"The engine stopped: {said(self._error)}"

    # ------------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        command = None
        try:
            while self._wait():
                while (command := self._next_command()) is not None:
                    command.run()
                if self.engine.has_work:
                    self._tell(self.engine.step())
        except BaseException as error:
            self._stop(error, command)
        else:
            self._stop(None, None)

    def _next_command(self) -> "_Command | None":
        with self._wake:
            return self._inbox.popleft() if self._inbox else None

    def _wait(self) -> bool:
        """Until there is something to do; False when there will be nothing any more."""
        with self._wake:
            while not (self._aborted or self._inbox or self.engine.has_work):
                if self._closing and not self._num_requests:
                    return False
                self._wake.wait()
            return not self._aborted

    def _tell(self, written: Sequence[tuple[int, Delta]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Delta]]] = {}
        for request_id, delta in written:
            if (reader := self._readers.get(request_id)) is None:
                continue  # whoever added it past this class
            if delta.completion is not None:
                del self._readers[request_id]
                self._forget_one()
            if delta.completion is not None or not reader.whole or reader.loop.is_closed():
                by_loop.setdefault(reader.loop, []).append((reader, delta))
        for loop, deltas in by_loop.items():
            if not _call_in(loop, _hand_over, deltas):  # nobody waits there any more
                for reader, _ in deltas:
                    assert reader.id is not None
                    self.engine.cancel(reader.id)

    def _abort(self) -> None:
        self._aborted = True
        for request_id in list(self._readers):
            self.engine.cancel(request_id)

    def _stop(self, error: BaseException | None, failed: "_Command | None") -> None:
        """Nothing more is computed: tell everyone who waits, and give back what they hold."""
        with self._wake:
            self._ended, self._error = True, error
            late = [*([failed] if failed else []), *self._inbox]
            self._inbox.clear()
        closed = EngineClosed(self._why_closed())
        closed.__cause__ = error
        for reader in self._readers.values():
            _call_in(reader.loop, _hand_over, [(reader, closed)])
        for command in late:
            command.give_up(closed)
        for request_id in self._readers:
            self.engine.cancel(request_id)
        self._readers.clear()


class _Command(NamedTuple):
    run: Callable[[], None]
    """In the engine's thread, between two steps."""
    give_up: Callable[[EngineClosed], object] = lambda closed: None
    """Instead, if the thread has ended."""


class _Reader:
    """Where the deltas of one request arrive in an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, whole: bool):
        self.loop, self.whole = loop, whole
        self.id: int | None = None
        self.queue: asyncio.Queue[Delta | EngineClosed] = asyncio.Queue()
        self.told_all = False

    async def next(self) -> Delta:
        item = await self.queue.get()
        if isinstance(item, EngineClosed):
            raise item
        return item


def _hand_over(items: Sequence[tuple[_Reader, Delta | EngineClosed]]) -> None:
    for reader, item in items:
        reader.told_all = reader.told_all or isinstance(item, EngineClosed) or item.completion is not None
        reader.queue.put_nowait(item)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> bool:
    """False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        return False
    return True
