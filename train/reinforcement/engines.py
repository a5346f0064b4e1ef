"""Who samples attempts. Agents ask a `Generates`; this is what a rollout needs beside it.

The suite's own engine runs on the very weights that train (`LocalEngine`). An attempt that leaves it, for a tool, is
expected back a fixed number of steps later, and waited for then:

    step         17   18   19   20   21   22   23
    attempt 0    run  run  ── in a tool ────  run     four steps, however fast the tool was
    attempt 1    run  run  run  run  run  run run     goes on; at step 23 it would wait for attempt 0

So which requests share a step does not depend on how fast anything was, and the same rollout gives the same numbers to
the last bit, however often it is repeated. When nobody is left to sample for, the steps up to the next one who is
expected are left out.
"""

import asyncio
import copy
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.entry import Request
from ernie_model.inference.request import Completion, Delta, Generates, Prompt, SamplingParams
from ernie_model.inference.runner import Runner
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import Tokenizer
from train.loop import Interrupted
from train.reinforcement.joint import JointRunner, Want
from train.reinforcement.stopping import POLL_S, never

T = TypeVar("T")


class RolloutEngine(Protocol):
    """All ranks call `begin`, `together`, `end` and `close` in this order, at the same places."""

    @property
    def generates(self) -> Generates:
        """What agents ask, between `begin` and `end`."""
        ...

    def begin(self, version: int) -> None:
        """A rollout begins: what is sampled from here on comes from the policy as it is now.

        Args:
            version: updates done so far. Completions carry it, token by token.
        """
        ...

    async def together(self, attempts: Sequence[Coroutine[Any, Any, T]], stop: Callable[[], bool] = never) -> list[T]:
        """Run attempts, which may ask `generates`; what each returns, in order.

        Raises:
            Interrupted: `stop` said so, here or, where a forward pass takes all ranks, on any of them: then on all.
        """
        ...

    def end(self) -> None:
        """The rollout is over: memory that only sampling needs is given back."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last rollout: tokens, seconds of pushing weights."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class Ask(NamedTuple):
    attempt: int
    """Number of the attempt that asks."""
    request: Request
    future: asyncio.Future[Completion]


ATTEMPT: ContextVar[int] = ContextVar("attempt")
HOPS = 4
"""Times that the event loop turns between two steps: an attempt whose tool is done asks after about so many."""


class Turns:
    """An engine whose steps do not depend on the clock (above). It is a `Generates`, for one event loop.

    Args:
        away: steps that the engine takes while an attempt is away. 0 waits for everybody before every step.
        meet: told whether this rank has attempts left, and whether it is to stop; whether any rank has, and is. Where a
            forward pass takes all ranks, one that has none left goes on taking part in it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        away: int = 0,
        meet: Callable[[bool, bool], tuple[bool, bool]] = lambda alive, stops: (alive, stops),
    ):
        self.engine, self.away, self.meet = engine, away, meet
        self._now = 0
        """Steps so far, those that were left out included."""
        self._due: dict[int, int] = {}
        """Of each attempt that is away, or asks and is not let in yet: the step that it is expected at."""
        self._asks: Counter[int] = Counter()
        """Of each attempt, its requests that are not answered."""
        self._arrived: list[Ask] = []
        self._waiting: dict[int, Ask] = {}
        self._changed = asyncio.Event()
        self.busy_s = 0.0
        """Seconds that steps of the engine took."""

    @property
    def max_context(self) -> int:
        return self.engine.max_context

    async def generate(self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None) -> Completion:
        request = await asyncio.to_thread(self.engine.prepare, prompt, params, timeout_s=timeout_s)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._arrived.append(Ask(ATTEMPT.get(), request, future))
        self._asks[ATTEMPT.get()] += 1
        self._changed.set()
        return await future

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, timeout_s: float | None = None
    ) -> AsyncIterator[Delta]:
        completion = await self.generate(prompt, params, timeout_s=timeout_s)
        yield Delta(completion.text, completion.token_ids, completion.logprobs, (), completion)

    async def run(self, attempts: Sequence[Coroutine[Any, Any, T]], stop: Callable[[], bool] = never) -> list[T]:
        """See `RolloutEngine.together`."""

        async def numbered(number: int, attempt: Coroutine[Any, Any, T]) -> T:
            ATTEMPT.set(number)
            return await attempt

        tasks = [asyncio.ensure_future(numbered(*one)) for one in enumerate(attempts)]
        self._due = dict.fromkeys(range(len(tasks)), self._now)
        for task in tasks:
            task.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                left, stops = self.meet(any(not task.done() for task in tasks), stop())
                if not left:
                    return [task.result() for task in tasks]
                if stops:
                    raise Interrupted
                if await self._until_due(tasks, stop):
                    self._step()
                for _ in range(HOPS):  # whoever was answered, or comes back from a tool, goes on
                    await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_due(self, tasks: Sequence[asyncio.Future[Any]], stop: Callable[[], bool]) -> bool:
        """Waits until whoever is expected at this step asks, or is over. False: this rank is to stop before."""
        while True:
            failed = next((task for task in tasks if task.done() and task.exception() is not None), None)
            if failed is not None:
                failed.result()
            expected = {number: due for number, due in self._due.items() if not tasks[number].done()}
            if all(due > self._now or self._asks[number] for number, due in expected.items()):
                if self._waiting or not expected or min(expected.values()) <= self._now:
                    return True
                self._now = min(expected.values())
                continue
            if stop():
                return False
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), POLL_S)

    def _step(self) -> None:
        due = [ask for ask in self._arrived if self._due.get(ask.attempt, 0) <= self._now]
        self._arrived = [ask for ask in self._arrived if self._due.get(ask.attempt, 0) > self._now]
        # In an order that does not depend on who asked first; every attempt has a seed of its own.
        for ask in sorted(due, key=lambda one: one.request.params.seed or 0):
            self._waiting[self.engine.enqueue(ask.request)] = ask
            self._due.pop(ask.attempt, None)
        if not self._waiting:
            return
        begin = time.perf_counter()
        deltas = self.engine.step()
        self.busy_s += time.perf_counter() - begin
        self._now += 1
        for request_id, delta in deltas:
            if delta.completion is not None:
                ask = self._waiting.pop(request_id)
                ask.future.set_result(delta.completion)
                self._asks[ask.attempt] -= 1
                if not self._asks[ask.attempt]:
                    self._due[ask.attempt] = self._now + self.away


class LocalEngine:
    """The suite's engine, on the weights that train.

    Args:
        model: what trains. Its mode is restored after a rollout.
        noise: standard deviation of noise on the engine's copy of each matrix, relative to the matrix's own: an engine
            that disagrees with the trainer, to try out what corrects for it. 0 samples from the weights themselves.
        joint: a forward pass takes all ranks (`Layout.joint`).
        apart: sample from a copy of the weights, because the model goes on learning meanwhile.
        away: see `Turns`.
    """

    def __init__(
        self,
        model: ErnieModel,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        noise: float = 0.0,
        seed: int = 0,
        joint: bool = False,
        apart: bool = False,
        away: int = 0,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.noise, self.seed, self.joint, self.apart, self.away = noise, seed, joint, apart, away
        self._turns: Turns | None = None
        self._metrics: dict[str, float] = {}

    @property
    def generates(self) -> Turns:
        assert self._turns is not None, "between begin and end"
        return self._turns

    def begin(self, version: int) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self._modes = [] if self.apart else modes
        with torch.no_grad():
            copied = self.noise or self.apart
            model = self.model if not copied else _copy(self.model, self.noise, self.seed + version)
            engine = Engine(model, self.tokenizer, self.settings, kind=JointRunner if self.joint else Runner)
        engine.version = version
        if self.apart:  # the model learns meanwhile
            _restore(modes)
        if self.joint:
            assert isinstance(engine.runner, JointRunner)
            meeting = engine.runner.meeting
            self._turns = Turns(engine, away=self.away, meet=lambda alive, stops: meeting.join(Want.OVER, alive, stops))
        else:
            self._turns = Turns(engine, away=self.away)

    async def together(self, attempts: Sequence[Coroutine[Any, Any, T]], stop: Callable[[], bool] = never) -> list[T]:
        return await self.generates.run(attempts, stop)

    def end(self) -> None:
        stats = self.generates.engine.stats()
        self._metrics = {
            "seconds_engine": self.generates.busy_s,
            "engine_sampled_tokens": float(stats.sampled_tokens),
            "engine_prompt_tokens": float(stats.prompt_tokens),
            "engine_cached_tokens": float(stats.cached_tokens),
            "engine_preemptions": float(stats.preemptions),
        }
        self._turns = None
        _restore(self._modes)
        gc.collect()  # the engine is made of circles; its cache must not stay beside the gradients

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def close(self) -> None:
        pass


def _restore(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _copy(model: ErnieModel, noise: float, seed: int) -> ErnieModel:
    other = copy.deepcopy(model)
    if not noise:
        return other.eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if parameter.ndim >= 2:
            shake = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data += noise * parameter.std() * shake
    return other.eval()
