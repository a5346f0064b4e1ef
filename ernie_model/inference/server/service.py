"""From an admitted request to the pieces of its answers.

    admit ─► read, prepare (threads) ─► attempts: n streams of the engine ─► batches of (attempt, Delta)
                                               or n episodes of the agent, where the server has tools

The engine never waits for a client: each stream is emptied as it is written, into a queue of the request. A client for
whom too much of it waits is cancelled (`Limits.lag_tokens`), as is one who takes nothing (`Limits.lag_s`, app.py).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Any, TypeVar

from ernie_model.chat import ChatError
from ernie_model.images import MediaError
from ernie_model.inference.agent import Agent, AgentEvent, Episode, Status
from ernie_model.inference.async_engine import EngineClosed
from ernie_model.inference.moderation import Moderation
from ernie_model.inference.request import (
    ConstraintError,
    ContextExceeded,
    Delta,
    EngineFull,
    Finish,
    Generates,
    RequestError,
    SamplingParams,
)
from ernie_model.inference.server.answers import Progress
from ernie_model.inference.server.calls import as_generator, forced_call
from ernie_model.inference.server.errors import ApiError, invalid
from ernie_model.inference.server.gate import Busy, Gate
from ernie_model.inference.server.metrics import Metrics
from ernie_model.inference.server.prompts import Job, MediaOpener, prepare
from ernie_model.inference.server.protocol import ChatRequest, read_request
from ernie_model.inference.server.settings import ServerSettings
from ernie_model.inference.server.steps import Told, tell
from ernie_model.processor import Processor

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

ENGINE_STOPPED = ApiError(
    503, "The engine has stopped; the server's log says why.", type="server_error", code="engine_stopped"
)
SHUTTING_DOWN = ApiError(503, "The server is shutting down.", type="server_error", code="draining", retry_after=5)


class Lagging(Exception):
    """The client takes its answer more slowly than this server waits for."""


class Service:
    """One model at work. For one event loop."""

    def __init__(
        self,
        engine: Generates,
        processor: Processor,
        settings: ServerSettings,
        opener: MediaOpener | None,
        engine_stats: Callable[[], Any] | None,
    ):
        self.engine = engine
        self.processor = processor
        self.settings = settings
        self.opener = opener
        # What is asked is looked at before, where the field at fault is known.
        moderation = Moderation(output=settings.moderation.output)
        self.agent = Agent(engine, processor, settings.toolbox, settings.agent, moderation=moderation)
        self.gate = Gate(settings.limits.concurrency, settings.limits.queue)
        self.metrics = Metrics(self.gate, engine_stats)
        self.draining = False
        self.ended = False
        self.failed = asyncio.Event()
        """The engine has stopped: nothing will be answered any more."""
        self._answering: set[asyncio.Task] = set()
        self._pool: ThreadPoolExecutor | None = None

    def admit(self) -> AbstractAsyncContextManager[None]:
        """Raises Busy; ApiError while draining."""
        if self.draining:
            raise SHUTTING_DOWN
        return self.gate.enter()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around the task of a request, which `end` may cut off: a CancelledError while `ended` is True."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            yield
        finally:
            self._answering.discard(task)

    def end(self) -> int:
        """Cut off what runs and waits; how many that were."""
        self.draining = self.ended = True
        for task in self._answering:
            task.cancel()
        return len(self._answering)

    async def read(self, body: bytes) -> ChatRequest:
        """Raises ApiError."""
        return await self._in_thread(read_request, body)

    async def prepare(self, request: ChatRequest) -> Job:
        """Raises ApiError."""
        return await self._in_thread(prepare, request, self.processor, self.settings, self.opener)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Whoever leaves before it is begun takes its place in the queue along."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.settings.limits.workers, thread_name_prefix="prepare")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def attempts(self, job: Job) -> AsyncGenerator[list[tuple[int, Progress]], None]:
        """What was written since the last batch, with the number of the attempt, until all are finished.

        Leaving the iterator cancels them. Raises ApiError, Busy, Lagging.
        """
        queue: asyncio.Queue[tuple[int, Progress | Exception]] = asyncio.Queue()
        pulls = [
            asyncio.create_task(self._pull(number, job, params, queue)) for number, params in enumerate(job.attempts)
        ]
        unfinished = len(pulls)
        try:
            while unfinished:
                batch = []
                item = await queue.get()
                while item is not None:
                    number, piece = item
                    if isinstance(piece, Exception):
                        raise piece
                    unfinished -= isinstance(piece, Episode) or (isinstance(piece, Delta) and bool(piece.completion))
                    batch.append((number, piece))
                    item = None if queue.empty() else queue.get_nowait()
                yield batch
        finally:
            for pull in pulls:
                pull.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    async def _pull(self, number: int, job: Job, params: SamplingParams, queue: asyncio.Queue) -> None:
        def put(piece: Progress) -> None:
            if queue.qsize() >= self.settings.limits.lag_tokens:
                raise Lagging
            queue.put_nowait((number, piece))

        try:
            if job.conversation is None:
                await self._write(job, params, put)
            else:
                await self._use_tools(job, job.conversation, params, put)
        except ContextExceeded as error:
            queue.put_nowait((number, invalid(str(error), "messages", "context_length_exceeded")))
        except ConstraintError as error:
            queue.put_nowait((number, invalid(str(error), "tools" if job.must_call else "response_format")))
        except (RequestError, ChatError, MediaError) as error:
            queue.put_nowait((number, invalid(str(error))))
        except EngineFull:
            queue.put_nowait((number, Busy(self.gate.retry_after())))
        except EngineClosed as error:
            logger.error("%s", error, exc_info=error.__cause__)
            self.failed.set()
            queue.put_nowait((number, ENGINE_STOPPED))
        except Exception as error:
            queue.put_nowait((number, error))

    async def _write(self, job: Job, params: SamplingParams, put: Callable[[Progress], None]) -> None:
        async with aclosing(self._stream(job, params)) as deltas:
            async for delta in deltas:
                completion = delta.completion
                if completion is not None and completion.finish not in (Finish.STOP, Finish.LENGTH):
                    what = completion.error or f"the answer ended as {completion.finish.value}"
                    raise ApiError(500, f"The engine could not answer: {what}", type="server_error")
                put(delta)
                if completion is not None:
                    return
        raise ApiError(500, "The engine could not answer: it stopped.", type="server_error")

    async def _use_tools(
        self,
        job: Job,
        conversation: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        put: Callable[[Progress], None],
    ) -> None:
        async def on_event(event: AgentEvent) -> None:
            put(Told(event) if event.result is None else await asyncio.to_thread(tell, event))

        episode = await self.agent.run(
            conversation, params=params, thinking=job.in_reasoning, prompt=job.prompt, on_event=on_event
        )
        if episode.status is Status.TIMEOUT:
            raise ApiError(504, f"No answer: {episode.error}", type="timeout_error", code="timeout")
        if episode.status is Status.FAILED:
            raise ApiError(500, f"The engine could not answer: {episode.error}", type="server_error")
        put(episode)

    def _stream(self, job: Job, params: SamplingParams) -> AsyncGenerator[Delta, None]:
        if job.must_call:
            tokenizer = self.processor.tokenizer
            return forced_call(self.engine, job.prompt, params, tokenizer, in_reasoning=job.in_reasoning)
        return as_generator(self.engine.stream(job.prompt, params))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
