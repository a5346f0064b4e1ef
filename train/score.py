"""What a measurement of held-out data tells, whatever it is of: to the record, the terminal, the closing table."""

import math
from typing import ClassVar


class Score:
    """A subclass is a frozen dataclass of numbers, which the training state keeps (`TrainState.evaluations`)."""

    HEADER: ClassVar[tuple[str, ...]]
    """Of the closing table; the first column is when it was measured, and its title what."""

    total: int
    """How many were looked at."""

    @property
    def right(self) -> int:
        """How many of them are done right."""
        raise NotImplementedError

    @property
    def accuracy(self) -> float:
        """What the best weights are chosen by."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the accuracy."""
        return wilson(self.right, self.total)

    @property
    def interval_text(self) -> str:
        low, high = self.interval
        return f"{low:.1%} to {high:.1%}"

    def accuracy_metrics(self) -> dict[str, float]:
        low, high = self.interval
        return {
            "eval_accuracy": self.accuracy,
            "eval_accuracy_low": low,
            "eval_accuracy_high": high,
            "eval_total": float(self.total),
        }

    def metrics(self) -> dict[str, float]:
        raise NotImplementedError

    def line(self) -> str:
        """For the terminal, on the way."""
        raise NotImplementedError

    def cells(self) -> tuple[str, ...]:
        """Under HEADER, from its second column on."""
        raise NotImplementedError


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927): sensible near 0 and 1, where p ± z·σ leaves [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half if correct else 0.0, middle + half if correct < total else 1.0
