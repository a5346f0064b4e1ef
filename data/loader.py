"""The stream of packed batches that training reads, the same on any number of ranks and after any interruption.

    records      order.py           encoder.py     pack.py            dealt to ranks by cost
    0..n-1  ──►  7 2 9 4 0 ...  ──►  sizes     ──►  row 0, row 1, ...  ──►  rank 0: rows 0, 3 | 5, 6 | ...  ──►  pixels
                                                                          rank 1: rows 1, 2 | 4, 7 | ...

Every rank computes the same endless sequence of rows and keeps its share. One optimizer step takes accumulation x ranks
rows, so each rank has the same number of micro-batches in every step and none ever waits alone; they are dealt so that
no rank has much more to compute than another. Two ranks with accumulation 2 see, step by step, the rows of one rank
with accumulation 4. The stream has no end: rows run across the borders of epochs, and no row is left half empty.

The state (order, packer's buffer, refused records) is small and does not know about ranks, so a run may continue on
another number of them.
"""

import atexit
import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data.batch import PackedBatch
from data.encoder import Encoder
from data.errors import DataError
from data.mixture import Mixture
from data.order import Key
from data.pack import Packer, Sized, collate, deal, filler

AHEAD_PER_WORKER = 4
"""Records handed to each worker ahead of their use; enough to ride over a large image among small ones."""
PATCH_COST = 0.14
"""What a patch costs to train on, in text tokens: of the released 28B model (train/sources.py counts any other's)."""


class StreamReport(NamedTuple):
    """How far a stream has come, over all ranks."""

    epoch: float
    """How often the data has been gone through: packed or refused records per record."""
    fill: float
    """Tokens per place for a token, over all rows so far."""
    num_rows: int
    num_refused: int
    """Draws left out because the record is in the quarantine."""
    imbalance: float
    """Cost of the dearest rank over the mean of all, over all steps so far; 1 is even."""

    def metrics(self) -> dict[str, float]:
        """How far and how well the data was packed, since the beginning of the run."""
        return {
            "data_epoch": self.epoch,
            "data_fill": self.fill,
            "data_imbalance": self.imbalance,
            "data_refused": float(self.num_refused),
        }

    def line(self) -> str:
        return f"{self.num_rows} packed, {self.fill:.1%} full, {self.epoch:.2f} times through the data"


class PackedStream:
    """This rank's micro-batches, step after step. `patch_cost`: tokens that a patch is worth when rows are dealt."""

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
        patch_cost: float = PATCH_COST,
    ):
        if accumulation < 1:
            raise DataError(f"accumulation is {accumulation}; it must be at least 1.")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}; with {world} ranks it must be between 0 and {world - 1}.")
        self.encoder = encoder
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.patch_cost = patch_cost
        self._order = encoder.dataset.order(seed=seed, shuffle=shuffle)
        self._ahead = self._order.copy()  # the same order, walked earlier by the workers
        self._packer: Packer[Key] = Packer(
            self._draw, max_tokens=encoder.max_tokens, max_patches=encoder.max_patches, lookahead=lookahead
        )
        self._num_rows = self._num_tokens = self._num_refused = 0
        self._dearest = self._mean = 0.0  # cost of the dearest rank, and of all by their number, over all steps
        # What must be the same for a saved state to mean the same stream.
        self._identity = {
            "data.seed": seed,
            "data.shuffle": shuffle,
            "data.lookahead": lookahead,
            **encoder.rules.identity,
            "data (content of the records)": encoder.dataset.fingerprint,
        }

    def next_step(self) -> list[PackedBatch]:
        """The `accumulation` micro-batches of this rank for the next optimizer step.

        Raises TooManyBadError when more records are refused than data.max_bad allows.
        """
        rows = [self._packer.next_row() for _ in range(self.accumulation * self.world)]
        shares = self._deal(rows)
        mine = [[sized.item for sized in rows[place]] for place in shares[self.rank]]
        for share in (*shares[: self.rank], *shares[self.rank + 1 :]):
            self.encoder.forget(sized.item for place in share for sized in rows[place])
        self.encoder.decode_ahead(key for row in mine for key in row)
        return [self._batch(row) for row in mine]

    def _deal(self, rows: Sequence[Sequence[Sized[Key]]]) -> list[list[int]]:
        """The rows of each rank, by place."""
        costs = [sum(sized.tokens + self.patch_cost * sized.patches for sized in row) for row in rows]
        shares = deal(costs, self.world)
        self._num_rows += len(rows)
        self._num_tokens += sum(sized.tokens for row in rows for sized in row)
        self._dearest += max(sum(costs[place] for place in share) for share in shares)
        self._mean += sum(costs) / self.world
        return shares

    def _batch(self, row: Sequence[Key]) -> PackedBatch:
        examples = [example for key in row if (example := self.encoder.example(key)) is not None]
        return collate(examples) if examples else filler(self.encoder.processor.begin_id)

    def _draw(self) -> Sized[Key]:
        while True:
            key = self._order.draw()
            self._measure_ahead()
            size = self.encoder.size(key)
            if size is not None:
                return Sized(key, size.tokens, size.patches)
            self._num_refused += 1

    def _measure_ahead(self) -> None:
        until = self._order.num_drawn + AHEAD_PER_WORKER * self.encoder.workers
        while self._ahead.num_drawn < until:
            self.encoder.measure_ahead([self._ahead.draw()])

    @property
    def report(self) -> "StreamReport":
        waiting = [sized.item for sized in self._packer.buffer]
        return StreamReport(
            epoch=self._order.epochs(waiting),
            fill=self._num_tokens / max(1, self._num_rows * self.encoder.max_tokens),
            num_rows=self._num_rows,
            num_refused=self._num_refused,
            imbalance=self._dearest / self._mean if self._mean else 1.0,
        )

    def describe(self) -> str:
        """What it is a stream of, for people."""
        count = self.encoder.dataset.num_records
        return f"{'a stream' if count is None else f'{count} records'} of {self.encoder.dataset.name}"

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps, from the start of the stream, after which `epochs` times all records have been packed.

        Measures every record. Call it before the first step. Raises DataError for a stream, which has no length.
        """
        check_countable(self.encoder.dataset)
        dataset, seed, shuffle = self.encoder.dataset, self._identity["data.seed"], self._identity["data.shuffle"]
        order = dataset.order(seed=seed, shuffle=shuffle)

        def drawn() -> Iterator[Key]:
            while order.epochs() < epochs:
                yield order.draw()

        sized = measured(self.encoder, drawn())
        packer = self._packer
        counter: Packer[Key] = Packer(
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
            "refused": self._num_refused,
            "cost": [self._dearest, self._mean],
            "records": self.encoder.quarantine.num_records,
            "quarantine": self.encoder.quarantine.state_dict(),
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
        self._packer.load_state_dict([[Key(*item), *size] for item, *size in state["buffer"]])
        self._num_rows, self._num_tokens, self._num_refused = state["rows"], state["tokens"], state["refused"]
        self._dearest, self._mean = state["cost"]
        if self.encoder.dataset.streaming:  # as many more may be bad
            self.encoder.quarantine.num_records = state["records"]
        self.encoder.quarantine.load_state_dict(state["quarantine"])

    def close(self) -> None:
        self.encoder.close()


def check_countable(dataset: Mixture) -> None:
    """Raises DataError for a stream: how many updates its epochs make is not known before it ends."""
    if dataset.streaming:
        raise DataError(
            f"the length of {dataset.name} is not known, because it is streaming, so run.epochs cannot be counted in "
            "updates. Set run.steps."
        )


def measured(encoder: Encoder, keys: Iterable[Key]) -> Iterator[Sized[Key]]:
    """These records with their sizes, in order, less those that cannot be used; measured ahead by workers."""
    upcoming = iter(keys)
    window: deque[Key] = deque()
    while True:
        for key in itertools.islice(upcoming, 1 + AHEAD_PER_WORKER * encoder.workers - len(window)):
            window.append(key)
            encoder.measure_ahead([key])
        if not window:
            return
        key = window.popleft()
        size = encoder.size(key)
        if size is not None:
            yield Sized(key, size.tokens, size.patches)


def eval_batches(
    encoder: Encoder, *, rank: int = 0, world: int = 1, lookahead: int = 64
) -> Iterator[PackedBatch | None]:
    """One pass over a mixture, packed: every record once, over all ranks together.

    Each rank gets the same number of items, so that collectives between them meet; where the last round has too few
    rows, or nothing of a row can be decoded, a rank gets None.
    """
    sized = measured(encoder, encoder.keys())
    packer: Packer[Key] = Packer(
        lambda: next(sized, None), max_tokens=encoder.max_tokens, max_patches=encoder.max_patches, lookahead=lookahead
    )
    while row := packer.next_row():
        round_ = [row, *(packer.next_row() for _ in range(world - 1))]
        mine = [sized.item for sized in round_[rank]]
        encoder.forget(sized.item for row in (*round_[:rank], *round_[rank + 1 :]) for sized in row)
        encoder.decode_ahead(mine)
        examples = [example for key in mine if (example := encoder.example(key)) is not None]
        yield collate(examples) if examples else None


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
