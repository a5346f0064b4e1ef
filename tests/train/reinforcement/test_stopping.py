"""What takes long is given up when the process is asked to end."""

import asyncio
import threading
import time

import pytest

from train.loop import Interrupted
from train.reinforcement import stopping
from train.reinforcement.joint import Meeting, Want
from train.reinforcement.stopping import agreed, never, unless

LONG_S = 60.0


def test_all_is_returned_in_order_and_what_raises_ends_the_others():
    async def number(value: int, wait_s: float) -> int:
        await asyncio.sleep(wait_s)
        return value

    async def fails() -> int:
        raise ValueError("broken")

    assert asyncio.run(unless(never, [number(1, 0.1), number(2, 0.0)])) == [1, 2]
    begin = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(unless(never, [number(1, LONG_S), fails()]))
    assert time.monotonic() - begin < LONG_S / 2


def test_whoever_waits_is_cancelled_and_what_is_done_counts():
    cancelled = []

    async def waits() -> None:
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    begin = time.monotonic()
    with pytest.raises(Interrupted):
        asyncio.run(unless(lambda: time.monotonic() > begin + 0.3, [waits(), waits()]))
    assert len(cancelled) == 2 and time.monotonic() - begin < LONG_S / 2

    async def is_done() -> list[int]:
        task = asyncio.ensure_future(asyncio.sleep(0, 7))
        await task
        return await unless(lambda: True, [task])

    assert asyncio.run(is_done()) == [7]


def test_one_rank_that_is_interrupted_interrupts_all(monkeypatch):
    def interrupted() -> int:
        raise Interrupted

    assert agreed(lambda: 7) == 7
    with pytest.raises(Interrupted):
        agreed(interrupted)
    monkeypatch.setattr(stopping, "everyones", lambda mine: [mine, False])
    with pytest.raises(Interrupted):
        agreed(lambda: 7)


def test_ranks_that_step_together_hear_that_one_stops():
    """One wants a step first, in which the one that stops takes part with nothing."""
    barrier, said = threading.Barrier(2), {}

    def exchange(rank: int):
        def of_rank(mine):
            said[rank] = mine
            barrier.wait(10)
            both = [said[0], said[1]]
            barrier.wait(10)
            return both

        return of_rank

    nothing: list[Want] = []
    found: dict[int, tuple[bool, bool]] = {}

    def steps() -> None:
        meeting = Meeting(lambda want: None, exchange(0))
        meeting.join(Want.RUN)
        found[0] = meeting.join(Want.OVER, True, False)

    def stops() -> None:
        found[1] = Meeting(nothing.append, exchange(1)).join(Want.OVER, False, True)

    threads = [threading.Thread(target=one) for one in (steps, stops)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert found == {0: (True, True), 1: (True, True)} and nothing == [Want.RUN]
