"""In which order records are drawn: every epoch all of them once, in an order of its own.

    seed 0, 4 records        epoch 0: 2 0 1 3     epoch 1: 3 1 0 2     ...     for ever

The order of epoch e is a function of (seed, e, number of records) alone: not of workers, ranks, or what was drawn
before. So the whole state is two integers.

A stream has no length and cannot be entered anywhere, so it is shuffled within blocks, each by (seed, e, block):

    blocks of 4              epoch 0: 2 0 1 3 | 6 7 4 5 | 9 8     epoch 1: 0 3 1 2 | ...

Several datasets are drawn from in turn, the n-th time from the one that (seed, n) names (data/mixture.py):

    sets A and B, 3 to 1     draw 0 1 2 3 4 ...    from A A B A A ...    records A7 A2 B0 A4 A9 ...
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from data.errors import DataError

CHOICES_AT_ONCE = 4096
"""Draws whose sets are chosen by one generator; part of what a seed means, so it must not change."""


class Key(NamedTuple):
    """A record of a mixture."""

    set: int
    """Which dataset, counted from 0 in the order that the settings name them."""
    number: int
    """Which of its records, counted from 0."""


class Order(Protocol):
    """An endless stream of the record numbers of one dataset."""

    def draw(self) -> int: ...

    def epochs(self, waiting: int = 0) -> float:
        """How often the dataset has been gone through, when the last `waiting` draws do not count yet."""
        ...

    def copy(self) -> "Order": ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ShuffledOrder:
    """`epoch` and `position` are those of the next draw; `salt` tells the datasets of a mixture apart."""

    def __init__(self, num_records: int, *, seed: int, shuffle: bool = True, salt: int = 0):
        self.num_records = num_records
        self.seed, self.shuffle, self.salt = seed, shuffle, salt
        self.epoch = 0
        self.position = 0
        self._permutation: tuple[int, np.ndarray] | None = None  # of which epoch, and the order itself

    def draw(self) -> int:
        if self._permutation is None or self._permutation[0] != self.epoch:
            order = permutation(self.num_records, (self.seed, self.salt, self.epoch), self.shuffle)
            self._permutation = (self.epoch, order)
        index = int(self._permutation[1][self.position])
        self.position += 1
        if self.position == self.num_records:
            self.epoch, self.position = self.epoch + 1, 0
        return index

    def epochs(self, waiting: int = 0) -> float:
        return (self.num_drawn - waiting) / self.num_records

    @property
    def num_drawn(self) -> int:
        return self.epoch * self.num_records + self.position

    def copy(self) -> "ShuffledOrder":
        other = ShuffledOrder(self.num_records, seed=self.seed, shuffle=self.shuffle, salt=self.salt)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class BlockOrder:
    """Of a stream. `block_length(b)` reads block b and says how many records it has: `size`, fewer in the last one."""

    def __init__(
        self, block_length: Callable[[int], int], *, size: int, seed: int, shuffle: bool = True, salt: int = 0
    ):
        self.size = size
        self.seed, self.shuffle, self.salt = seed, shuffle, salt
        self.epoch = 0
        self.position = 0
        self.num_records: int | None = None
        """Known once the stream has been read to its end."""
        self._block_length = block_length
        self._permutation: tuple[tuple[int, int], np.ndarray] | None = None  # of which epoch and block

    def draw(self) -> int:
        block, offset = divmod(self.position, self.size)
        if self._permutation is None or self._permutation[0] != (self.epoch, block):
            order = permutation(self._block_length(block), (self.seed, self.salt, self.epoch, block), self.shuffle)
            self._permutation = ((self.epoch, block), order)
        order = self._permutation[1]
        if offset < len(order):
            self.position += 1
            return block * self.size + int(order[offset])
        if self.position == 0:
            raise DataError("the stream holds no record. Check data.path and data.split.")
        self.num_records = self.position
        self.epoch, self.position = self.epoch + 1, 0
        return self.draw()

    def epochs(self, waiting: int = 0) -> float:
        if self.num_records is None:  # it may be nearly over or hardly begun
            return 0.0
        return self.epoch + (self.position - waiting) / self.num_records

    def copy(self) -> "BlockOrder":
        other = BlockOrder(self._block_length, size=self.size, seed=self.seed, shuffle=self.shuffle, salt=self.salt)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "records": self.num_records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.num_records = state["epoch"], state["position"], state["records"]


class SampledOrder:
    """Draws from several datasets by weight; each goes on with its own order whenever it is chosen."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int, until_all: bool):
        """`until_all`: an epoch ends when the last dataset has been gone through, not the first."""
        self.orders = list(orders)
        self.seed, self.until_all = seed, until_all
        self.weights = np.asarray(weights, dtype=np.float64)
        self._bounds = np.cumsum(self.weights / self.weights.sum())
        self.num_drawn = 0
        self._choices: tuple[int, np.ndarray] | None = None  # of which stretch of draws

    def draw(self) -> Key:
        stretch, offset = divmod(self.num_drawn, CHOICES_AT_ONCE)
        if self._choices is None or self._choices[0] != stretch:
            at_01 = np.random.default_rng([self.seed, stretch]).random(CHOICES_AT_ONCE)
            chosen = np.searchsorted(self._bounds, at_01, side="right")
            self._choices = (stretch, np.minimum(chosen, np.flatnonzero(self.weights)[-1]))  # rounding of the last sum
        self.num_drawn += 1
        index = int(self._choices[1][offset])
        return Key(index, self.orders[index].draw())

    def epochs(self, waiting: Sequence[Key] = ()) -> float:
        per_set = [sum(key.set == index for key in waiting) for index in range(len(self.orders))]
        done = [
            order.epochs(behind)
            for order, behind, weight in zip(self.orders, per_set, self.weights, strict=True)
            if weight > 0
        ]
        return min(done) if self.until_all else max(done)

    def copy(self) -> "SampledOrder":
        orders = [order.copy() for order in self.orders]
        other = SampledOrder(orders, self.weights.tolist(), seed=self.seed, until_all=self.until_all)
        other.num_drawn = self.num_drawn
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.num_drawn, "sets": [order.state_dict() for order in self.orders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_drawn = state["drawn"]
        for order, saved in zip(self.orders, state["sets"], strict=True):
            order.load_state_dict(saved)


class ConcatOrder:
    """Draws all records of several datasets, shuffled together: each once per epoch."""

    def __init__(self, lengths: Sequence[int], *, seed: int, shuffle: bool = True):
        self.lengths = list(lengths)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._order = ShuffledOrder(sum(self.lengths), seed=seed, shuffle=shuffle)

    def draw(self) -> Key:
        place = self._order.draw()
        index = int(np.searchsorted(self._starts, place, side="right")) - 1
        return Key(index, place - int(self._starts[index]))

    @property
    def num_drawn(self) -> int:
        return self._order.num_drawn

    def epochs(self, waiting: Sequence[Key] = ()) -> float:
        return self._order.epochs(len(waiting))

    def copy(self) -> "ConcatOrder":
        other = ConcatOrder(self.lengths, seed=self._order.seed, shuffle=self._order.shuffle)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state)


MixedOrder = SampledOrder | ConcatOrder


def permutation(num_records: int, seed: Sequence[int], shuffle: bool = True) -> np.ndarray:
    """int64 (num_records,): the order of one epoch, or of one block of it."""
    if not shuffle:
        return np.arange(num_records)
    return np.random.default_rng(list(seed)).permutation(num_records)
