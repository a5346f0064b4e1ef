"""In which order records are drawn: every epoch all of them once, in an order of its own.

    seed 0, 4 records        epoch 0: 2 0 1 3     epoch 1: 3 1 0 2     ...     for ever

The order of epoch e is a function of (seed, e, number of records) alone: not of workers, ranks, or what was drawn
before. So the whole state is two integers.
"""

from typing import Any

import numpy as np


class ShuffledOrder:
    """An endless stream of record numbers. `epoch` and `position` are those of the next draw."""

    def __init__(self, num_records: int, *, seed: int, shuffle: bool = True):
        self.num_records = num_records
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._permutation: tuple[int, np.ndarray] | None = None  # of which epoch, and the order itself

    def draw(self) -> int:
        if self._permutation is None or self._permutation[0] != self.epoch:
            self._permutation = (self.epoch, permutation(self.num_records, self.seed, self.epoch, self.shuffle))
        index = int(self._permutation[1][self.position])
        self.position += 1
        if self.position == self.num_records:
            self.epoch, self.position = self.epoch + 1, 0
        return index

    @property
    def num_drawn(self) -> int:
        return self.epoch * self.num_records + self.position

    def copy(self) -> "ShuffledOrder":
        other = ShuffledOrder(self.num_records, seed=self.seed, shuffle=self.shuffle)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def permutation(num_records: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """int64 (num_records,): the order of one epoch."""
    if not shuffle:
        return np.arange(num_records)
    return np.random.default_rng([seed, epoch]).permutation(num_records)
