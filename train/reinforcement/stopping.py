"""Giving up what takes long, when the process was asked to end (SIGTERM): a rollout, an evaluation.

    rank 0   asks ─── SIGTERM ── cancels what it asks ─┐
    rank 1   asks ───────────── hears of it, cancels ──┴─ agree ── Interrupted, on both

Where a forward pass takes all ranks they leave it together (train/reinforcement/joint.py).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from train.checkpoint import everyones
from train.loop import Interrupted

T = TypeVar("T")
POLL_S = 0.2
"""Between two looks whether to stop."""


def never() -> bool:
    return False


async def unless(stop: Callable[[], bool], attempts: Sequence[Awaitable[T]]) -> list[T]:
    """What each returns, in order. When one raises, or `stop` says so, the others are cancelled.

    Raises:
        Interrupted: `stop` said so before all were done.
    """
    tasks = [asyncio.ensure_future(attempt) for attempt in attempts]
    try:
        while left := [task for task in tasks if not task.done()]:
            if stop():
                raise Interrupted
            done, _ = await asyncio.wait(left, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def agreed(act: Callable[[], T]) -> T:
    """What `act` returns. All ranks call it together.

    Raises:
        Interrupted: it was raised on one of them.
    """
    done, result = False, None
    try:
        result, done = act(), True
    except Interrupted:
        pass
    if not all(everyones(done)):
        raise Interrupted
    return result  # pyright: ignore[reportReturnType]
