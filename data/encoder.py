"""The examples of a dataset by number: encoded when first asked for, kept while there is room, made ahead by threads.

An example is a function of its record and the processor alone. Cache and threads only change *when* it is computed, so
no batch depends on them.
"""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import NamedTuple

import numpy as np

from data.dataset import Dataset
from data.encode import Example, encode
from data.errors import DataError, TooLongError
from ernie_model.processor import Processor


class TooLong(Enum):
    """What becomes of a conversation that does not fit in one row."""

    ERROR = "error"
    SKIP = "skip"
    """Left out, and counted."""


class Size(NamedTuple):
    tokens: int
    patches: int


class Encoder:
    """Encodes the records of one dataset for rows of `max_tokens` tokens (and `max_patches` image patches).

    `workers` threads decode what `prefetch` names; 0 encodes in the calling thread, when asked. All methods are for one
    thread: the workers run nothing but `encode`.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        *,
        max_tokens: int,
        max_patches: int | None = None,
        thinking: bool | None = None,
        every_turn: bool = True,
        too_long: TooLong = TooLong.ERROR,
        cache_bytes: int = 512 * 2**20,
        workers: int = 0,
    ):
        if len(dataset) == 0:
            raise DataError(f"{dataset.name} holds no record.")
        self.dataset = dataset
        self.max_tokens = max_tokens
        self.max_patches = max_patches
        self.too_long = too_long
        self.skipped: dict[int, str] = {}
        """Why, for every record found too long so far."""
        self._processor = processor
        self._thinking, self._every_turn = thinking, every_turn
        # 8 bytes per record, so that a million of them are no burden; -1 stands for "not measured yet".
        self._sizes = np.full((len(dataset), 2), -1, dtype=np.int32)
        self._cache: OrderedDict[int, Example] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._pending: dict[int, Future[Example]] = {}
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode") if workers else None

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int) -> Example:
        """Raises what `data.encode.encode` raises."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        future = self._pending.pop(index, None)
        example = self._encode(index) if future is None else future.result()
        self._sizes[index] = example.num_tokens, example.num_patches
        self._keep(index, example)
        return example

    def size(self, index: int) -> Size | None:
        """What a record costs; None if it is too long and such records are skipped.

        The first question encodes the record. (A cheaper way, from file headers, would go here.)
        """
        if not self.is_measured(index):
            try:
                self.example(index)
            except TooLongError as error:
                if self.too_long is TooLong.ERROR:
                    raise
                self.skipped[index] = str(error)
        if index in self.skipped:
            return None
        tokens, patches = self._sizes[index].tolist()
        return Size(tokens, patches)

    def is_measured(self, index: int) -> bool:
        return bool(self._sizes[index, 0] >= 0) or index in self.skipped

    def prefetch(self, indices: Iterable[int]) -> None:
        """Start encoding in the background what will be asked for soon."""
        if self._pool is None:
            return
        for index in indices:
            if index not in self._cache and index not in self._pending and index not in self.skipped:
                self._pending[index] = self._pool.submit(self._encode, index)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, index: int) -> Example:
        return encode(
            self.dataset[index],
            self._processor,
            media=self.dataset.media,
            max_tokens=self.max_tokens,
            max_patches=self.max_patches,
            thinking=self._thinking,
            every_turn=self._every_turn,
        )

    def _keep(self, index: int, example: Example) -> None:
        self._cache[index] = example
        self._cached_bytes += example.num_bytes
        while self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.num_bytes
