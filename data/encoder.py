"""The examples of a mixture by key: measured when they are drawn, decoded when they are trained on.

    size(key)      text and headers only      every rank, every record: rows must be the same everywhere
    example(key)   with its pixels            the rank whose row it is in

An example is a function of its record and the processor alone. Memory, disk cache and threads only change *when* it is
computed, so no batch depends on them.

A record that cannot be used is quarantined. Found while measuring, all ranks leave it out of the rows. Found while
decoding, it already has its place in a row that all ranks agree on, so its owner alone trains the row without it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache import PixelCache
from data.dataset import Dataset, StreamDataset
from data.encode import Example
from data.errors import DataError, Refusal, RefusedError, Stage
from data.fit import Fitted, Rules
from data.mixture import Mixture
from data.order import Key
from data.prepare import check_possible, decode, measure
from data.quarantine import Quarantine
from data.workers import StuckError, Workers
from ernie_model.processor import Processor

STREAM_SIZES_KEPT = 65536
"""Records of a stream whose sizes are remembered: more than wait for a place in a row."""


class Size(NamedTuple):
    tokens: int
    patches: int


class Encoder:
    """Encodes the records of a mixture (or of one dataset) for rows that `rules` describe.

    `workers` threads work on what `measure_ahead` and `decode_ahead` name; with 0, one thread does what is asked for,
    when it is. All methods are for one thread.
    """

    def __init__(
        self,
        dataset: Mixture | Dataset | StreamDataset,
        processor: Processor,
        rules: Rules,
        *,
        quarantine: Quarantine | None = None,
        cache_bytes: int = 512 * 2**20,
        cache_folder: Path | None = None,
        workers: int = 0,
        slow_s: float = 30.0,
        dead_s: float = 300.0,
    ):
        self.dataset = Mixture.of(dataset)
        if self.dataset.num_records == 0:
            raise DataError(f"{self.dataset.name} holds no record.")
        check_possible(self.dataset, rules)
        self.rules = rules
        if quarantine is None:
            quarantine = Quarantine(num_records=self.dataset.num_records or 0)
        self.quarantine = quarantine
        self.processor = processor
        self.workers = workers
        self._workers = Workers(workers or 1, slow_s=slow_s, dead_s=dead_s)
        self._disk = None if cache_folder is None else PixelCache(cache_folder, processor, rules.corruption)
        self._sizes = [_Sizes(one.dataset) for one in self.dataset.sets]
        self._refused: list[set[int]] = [set() for _ in self.dataset.sets]
        """Numbers of the records that cannot be used; of a stream, since the last that can."""
        self._fitted: dict[Key, Fitted] = {}
        """What decoding needs and could not be had again cheaply: of streams, and of what had to be made to fit."""
        self._undecodable: set[Key] = set()
        self._measuring: dict[Key, Future[Fitted]] = {}
        self._decoding: dict[Key, Future[Example]] = {}
        self._kept: OrderedDict[Key, Example] = OrderedDict()
        self._cache_bytes, self._kept_bytes = cache_bytes, 0

    @property
    def max_tokens(self) -> int:
        return self.rules.max_tokens

    @property
    def max_patches(self) -> int | None:
        return self.rules.max_patches

    def __len__(self) -> int:
        return len(self.dataset)

    def keys(self) -> Iterator[Key]:
        return self.dataset.keys()

    def size(self, key: Key) -> Size | None:
        """What a record costs; None if it cannot be used, which is then in the quarantine.

        Raises DataError when a whole dataset cannot be used, TooManyBadError when too much of it cannot.
        """
        known = self._sizes[key.set].get(key.number)
        if known is None:
            known = self._measure(key)
        if known.tokens:
            return known
        return None

    def example(self, key: Key) -> Example | None:
        """None for a record whose pixels turn out to be unusable, which is then in the quarantine."""
        if key in self._kept:
            self._kept.move_to_end(key)
            self._fitted.pop(key, None)
            return self._kept[key]
        if key in self._undecodable:
            return None
        future = self._decoding.pop(key, None) or self._submit_decode(key)
        try:
            example = self._workers.result(future, lambda: self._name(key))
        except RefusedError as error:
            return self._leave_out(key, error.refusal)
        except StuckError as error:
            return self._leave_out(key, self._refusal(key, Stage.MEDIA, str(error)))
        self._fitted.pop(key, None)
        self._keep(key, example)
        return example

    def forget(self, keys: Iterable[Key]) -> None:
        """These belong to other ranks."""
        for key in keys:
            self._fitted.pop(key, None)

    def is_measured(self, key: Key) -> bool:
        return self._sizes[key.set].get(key.number) is not None

    def measure_ahead(self, keys: Iterable[Key]) -> None:
        """Start measuring in the background what will be drawn soon."""
        for key in keys if self.workers else ():
            if key not in self._measuring and not self.is_measured(key):
                self._measuring[key] = self._submit_measure(key)

    def decode_ahead(self, keys: Iterable[Key]) -> None:
        """Start decoding in the background what will be asked for soon."""
        for key in keys if self.workers else ():
            if key not in self._kept and key not in self._decoding and key not in self._undecodable:
                self._decoding[key] = self._submit_decode(key)

    def close(self) -> None:
        self._workers.close()

    def _measure(self, key: Key) -> Size:
        future = self._measuring.pop(key, None) or self._submit_measure(key)
        one = self.dataset.sets[key.set]
        if isinstance(one.dataset, StreamDataset):
            self.quarantine.num_records += 1
        try:
            fitted = self._workers.result(future, lambda: self._name(key))
        except RefusedError as error:
            self._refuse(key, error.refusal)
            size = Size(0, 0)
        else:
            if isinstance(one.dataset, StreamDataset):
                self._refused[key.set].clear()
            size = Size(fitted.example.num_tokens, fitted.example.num_patches)
            if fitted.is_whole:
                self._keep(key, fitted.example)
            if isinstance(one.dataset, StreamDataset) or fitted.is_changed:
                self._fitted[key] = fitted
        self._sizes[key.set].set(key.number, size)
        return size

    def _submit_measure(self, key: Key) -> "Future[Fitted]":
        return self._workers.submit(lambda: measure(self.dataset, key, self.processor, self.rules))

    def _submit_decode(self, key: Key) -> "Future[Example]":
        fitted = self._fitted.get(key)
        return self._workers.submit(lambda: self._decode(key, fitted))

    def _decode(self, key: Key, fitted: Fitted | None) -> Example:
        """In a worker."""
        fitted = fitted or measure(self.dataset, key, self.processor, self.rules)
        if fitted.is_whole:
            return fitted.example

        def make() -> Example:
            return decode(self.dataset, key, fitted, self.processor, self.rules)

        if self._disk is None:
            return make()
        return self._disk.get(fitted, self.dataset.media(key), make)

    def _leave_out(self, key: Key, refusal: Refusal) -> None:
        self._undecodable.add(key)
        self._fitted.pop(key, None)
        self._refuse(key, refusal)

    def _refuse(self, key: Key, refusal: Refusal) -> None:
        """Raises DataError when nothing of its dataset is left: rows would go on without it, unsaid."""
        self.quarantine.add(refusal)
        one = self.dataset.sets[key.set]
        self._refused[key.set].add(key.number)
        most = TRIED_OF_A_STREAM if isinstance(one.dataset, StreamDataset) else len(one.dataset)
        if len(self._refused[key.set]) >= most:
            raise DataError(f"none of {most} records of {one.name} can be used. The last of them: {refusal.reason}")

    def _refusal(self, key: Key, stage: Stage, reason: str) -> Refusal:
        record = self.dataset[key]
        source = record.source
        place = (None, None) if source is None else (source.file, source.line)
        return Refusal(record.id, self.dataset.sets[key.set].name, *place, stage, reason)

    def _name(self, key: Key) -> str:
        try:
            return self.dataset[key].name
        except DataError as error:
            return str(error)

    def _keep(self, key: Key, example: Example) -> None:
        if (replaced := self._kept.pop(key, None)) is not None:  # of a stream, whose size was forgotten meanwhile
            self._kept_bytes -= replaced.num_bytes
        self._kept[key] = example
        self._kept_bytes += example.num_bytes
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.num_bytes


TRIED_OF_A_STREAM = 1000
"""Records of a stream refused one after another before it counts as unusable."""


class _Sizes:
    """8 bytes for each record, so that a million of them are no burden; of a stream, only the newest are kept.

    (0, 0) stands for a record that cannot be used.
    """

    def __init__(self, dataset: Dataset | StreamDataset):
        streaming = isinstance(dataset, StreamDataset)
        self._table = None if streaming else np.full((len(dataset), 2), -1, dtype=np.int32)
        self._newest: OrderedDict[int, Size] = OrderedDict()

    def get(self, number: int) -> Size | None:
        if self._table is None:
            return self._newest.get(number)
        tokens, patches = self._table[number].tolist()
        return None if tokens < 0 else Size(tokens, patches)

    def set(self, number: int, size: Size) -> None:
        if self._table is not None:
            self._table[number] = size
            return
        self._newest[number] = size
        if len(self._newest) > STREAM_SIZES_KEPT:
            self._newest.popitem(last=False)
