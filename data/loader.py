"""The stream of packed batches that training reads, the same on any number of ranks and after any interruption.

    records      order.py           encoder.py     pack.py            dealt to ranks
    0..n-1  ──►  7 2 9 4 0 ...  ──►  examples  ──►  row 0, row 1, ...  ──►  rank 0: rows 0, 2 | 4, 6 | ...
                                                                          rank 1: rows 1, 3 | 5, 7 | ...

Every rank computes the same endless sequence of rows and keeps its share. One optimizer step takes accumulation x ranks
rows, so each rank has the same number of micro-batches in every step and none ever waits alone; and two ranks with
accumulation 2 see, step by step, the rows of one rank with accumulation 4. The stream has no end: rows run across
the borders of epochs, and no row is left half empty.

The state (order, packer's buffer) is a few hundred integers and does not know about ranks, so a run may continue on
another number of them.
"""

import atexit
import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from data.batch import PackedBatch
from data.encoder import Encoder
from data.errors import DataError
from data.order import ShuffledOrder
from data.pack import Packer, Sized, collate

PREFETCH_PER_WORKER = 4
"""Records handed to each worker ahead of their use; enough to ride over a large image among small ones."""


class StreamReport(NamedTuple):
    """How far a stream has come, over all ranks."""

    epoch: float
    """How often the data has been gone through: packed or skipped records per record."""
    fill: float
    """Tokens per place for a token, over all rows so far."""
    num_rows: int
    num_skipped: int
    """Draws left out because the record was too long."""


class PackedStream:
    """This rank's micro-batches, step after step."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        lookahead: int = 64,
        shuffle: bool = True,
    ):
        if accumulation < 1:
            raise DataError(f"accumulation is {accumulation}; it must be at least 1.")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}; with {world} ranks it must be between 0 and {world - 1}.")
        self.encoder = encoder
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self._order = ShuffledOrder(len(encoder), seed=seed, shuffle=shuffle)
        self._ahead = self._order.copy()  # the same order, walked earlier by the prefetch
        self._packer: Packer[int] = Packer(
            self._draw, max_tokens=encoder.max_tokens, max_patches=encoder.max_patches, lookahead=lookahead
        )
        self._num_rows = self._num_tokens = self._num_skipped = 0
        # What must be the same for a saved state to mean the same stream.
        self._identity = {
            "data.seed": seed,
            "data.shuffle": shuffle,
            "data.max_tokens": encoder.max_tokens,
            "data.max_patches": encoder.max_patches,
            "data.lookahead": lookahead,
            "data.too_long": encoder.too_long.value,
            "data (content of the records)": encoder.dataset.fingerprint,
        }

    def next_step(self) -> list[PackedBatch]:
        """The `accumulation` micro-batches of this rank for the next optimizer step. Raises what encoding raises."""
        rows = [self._packer.next_row() for _ in range(self.accumulation * self.world)]
        self._num_rows += len(rows)
        self._num_tokens += sum(sized.tokens for row in rows for sized in row)
        mine = [[sized.item for sized in row] for row in rows[self.rank :: self.world]]
        self.encoder.prefetch(index for row in mine for index in row)
        return [collate([self.encoder.example(index) for index in row]) for row in mine]

    def _draw(self) -> Sized[int]:
        for _ in range(len(self.encoder)):
            index = self._order.draw()
            self._prefetch()
            size = self.encoder.size(index)
            if size is not None:
                return Sized(index, size.tokens, size.patches)
            self._num_skipped += 1
        raise DataError(
            f"every record of {self.encoder.dataset.name} is longer than a row of data.max_tokens="
            f"{self.encoder.max_tokens}, data.max_patches={self.encoder.max_patches}. Raise the limit."
        )

    def _prefetch(self) -> None:
        until = self._order.num_drawn + PREFETCH_PER_WORKER * self.encoder.workers
        while self._ahead.num_drawn < until:
            index = self._ahead.draw()
            # Once measured, a record is encoded only by the rank that gets it, which is known when its row is.
            if not self.encoder.is_measured(index):
                self.encoder.prefetch([index])

    @property
    def report(self) -> "StreamReport":
        drawn = self._order.num_drawn - len(self._packer.buffer)
        return StreamReport(
            epoch=drawn / len(self.encoder),
            fill=self._num_tokens / max(1, self._num_rows * self.encoder.max_tokens),
            num_rows=self._num_rows,
            num_skipped=self._num_skipped,
        )

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps, from the start of the stream, after which `epochs` times all records have been packed.

        Measures every record, which encodes those not seen yet. Call it before the first step.
        """
        order = ShuffledOrder(len(self.encoder), seed=self._order.seed, shuffle=self._order.shuffle)
        drawn = (order.draw() for _ in range(math.ceil(epochs * len(self.encoder))))
        sized = measured(self.encoder, drawn)
        packer = self._packer
        counter: Packer[int] = Packer(
            lambda: next(sized, None),
            max_tokens=packer.max_tokens,
            max_patches=packer.max_patches,
            lookahead=packer.lookahead,
        )
        rows = 0
        while counter.next_row():
            rows += 1
        return math.ceil(rows / (self.accumulation * self.world))

    # -- saving --

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. The stream that loads it continues with exactly the batches this one would give."""
        return {
            "identity": dict(self._identity),
            "order": self._order.state_dict(),
            "buffer": self._packer.state_dict(),
            "rows": self._num_rows,
            "tokens": self._num_tokens,
            "skipped": self._num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the saved stream read other data, or packed them otherwise."""
        for key, saved in state["identity"].items():
            if key in self._identity and self._identity[key] != saved:
                raise DataError(
                    f"cannot resume: {key} was {saved} in the interrupted run and is {self._identity[key]} now, so "
                    "this run would train on other batches. Restore it, or start a new run in another folder."
                )
        self._order.load_state_dict(state["order"])
        self._ahead = self._order.copy()
        self._packer.load_state_dict(state["buffer"])
        self._num_rows, self._num_tokens, self._num_skipped = state["rows"], state["tokens"], state["skipped"]

    def close(self) -> None:
        self.encoder.close()


def measured(encoder: Encoder, indices: Iterable[int]) -> Iterator[Sized[int]]:
    """The records of `indices` with their sizes, in order, less those that are too long; encoded ahead by workers."""
    upcoming = iter(indices)
    window: deque[int] = deque()
    while True:
        for index in itertools.islice(upcoming, 1 + PREFETCH_PER_WORKER * encoder.workers - len(window)):
            window.append(index)
            if not encoder.is_measured(index):
                encoder.prefetch([index])
        if not window:
            return
        index = window.popleft()
        size = encoder.size(index)
        if size is not None:
            yield Sized(index, size.tokens, size.patches)


def eval_batches(
    encoder: Encoder, *, rank: int = 0, world: int = 1, lookahead: int = 64
) -> Iterator[PackedBatch | None]:
    """One pass over a dataset, packed: every record once, over all ranks together.

    Each rank gets the same number of items, so that collectives between them meet; where the last round has too few
    rows, the ranks left over get None.
    """
    sized = measured(encoder, range(len(encoder)))
    packer: Packer[int] = Packer(
        lambda: next(sized, None), max_tokens=encoder.max_tokens, max_patches=encoder.max_patches, lookahead=lookahead
    )
    while row := packer.next_row():
        round_ = [row, *(packer.next_row() for _ in range(world - 1))]
        mine = [sized.item for sized in round_[rank]]
        encoder.prefetch(mine)
        yield collate([encoder.example(index) for index in mine]) if mine else None


class _Step(NamedTuple):
    batches: list[PackedBatch]
    state: dict[str, Any]
    report: StreamReport


class BackgroundStream:
    """Another stream, computed by a thread up to `depth` steps before its batches are asked for.

    Each step travels with the state after it, so `state_dict()` (and `report`) is that of the last step taken from
    here, however far ahead the thread has run; an error is raised at the step it belongs to.
    """

    def __init__(self, stream: PackedStream, *, depth: int = 2):
        self.stream = stream
        self._depth = depth
        self._state, self.report = stream.state_dict(), stream.report
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._steps: queue.Queue[_Step | BaseException] = queue.Queue(depth)

    def next_step(self) -> list[PackedBatch]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pack", daemon=True)
            self._thread.start()
            atexit.register(self._halt)  # a thread inside torch while Python shuts down would crash the process
        step = self._steps.get()
        if isinstance(step, BaseException):
            self._thread.join()
            self._steps.put(step)  # the thread has ended: whoever asks again gets the same answer
            raise step
        self._state, self.report = step.state, step.report
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def count_steps(self, epochs: float) -> int:
        """See `PackedStream.count_steps`; before the first step only."""
        assert self._thread is None, "count_steps measures with the encoder that the thread is now using"
        return self.stream.count_steps(epochs)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._halt()
        self.stream.load_state_dict(state)
        self._state, self.report = self.stream.state_dict(), self.stream.report

    def close(self) -> None:
        self._halt()
        self.stream.close()

    def _run(self) -> None:
        step: _Step | BaseException
        while not self._stop.is_set():
            try:
                step = _Step(self.stream.next_step(), self.stream.state_dict(), self.stream.report)
            except BaseException as error:  # raised again where the step is asked for
                step = error
            while not self._stop.is_set():
                try:
                    self._steps.put(step, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(step, BaseException):
                return

    def _halt(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            atexit.unregister(self._halt)
        self._thread = None
        self._stop = threading.Event()
        self._steps = queue.Queue(self._depth)
