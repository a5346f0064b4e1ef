"""Who is served now, who waits, and who is sent away."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Busy(Exception):
    """Nobody more may wait. `retry_after`: seconds after which a place may be free."""

    def __init__(self, retry_after: int):
        super().__init__(f"all places are taken; ask again in {retry_after} s")
        self.retry_after = retry_after


class Gate:
    """Lets `concurrency` in and `queue` wait, first come first served. For one event loop."""

    def __init__(self, concurrency: int, queue: int):
        self.concurrency = concurrency
        self.queue = queue
        self.inside = 0
        self.waiting = 0
        self._free = asyncio.Semaphore(concurrency)
        self._empty = asyncio.Event()
        self._empty.set()
        self._mean_s = 1.0  # of a stay inside, the latest ones counting most

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Raises Busy."""
        if self._free.locked() and self.waiting >= self.queue:
            raise Busy(self.retry_after())
        self.waiting += 1
        self._empty.clear()
        try:
            await self._free.acquire()
        except BaseException:
            self.waiting -= 1
            self._note_empty()
            raise
        self.waiting -= 1
        self.inside += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)
            self.inside -= 1
            self._free.release()
            self._note_empty()

    def retry_after(self) -> int:
        """Whole seconds until those who wait now are likely to be inside."""
        return min(60, max(1, math.ceil(self._mean_s * (self.waiting + 1) / self.concurrency)))

    async def empty(self) -> None:
        """Returns when nobody is inside and nobody waits."""
        await self._empty.wait()

    def _note_empty(self) -> None:
        if not self.inside and not self.waiting:
            self._empty.set()
