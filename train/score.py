"""What a measurement of held-out data tells, whatever it is of: to the record, the terminal, the closing table."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Score:
    """The fields of a subclass are numbers, which the training state keeps (`TrainState.evaluations`)."""

    HEADER: ClassVar[tuple[str, ...]]
    """Of the closing table; the first column is when it was measured, and its title what."""

    @property
    def accuracy(self) -> float:
        """What the best weights are chosen by."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        raise NotImplementedError

    def line(self) -> str:
        """For the terminal, on the way."""
        raise NotImplementedError

    def cells(self) -> tuple[str, ...]:
        """Under HEADER, from its second column on."""
        raise NotImplementedError
