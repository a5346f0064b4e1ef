"""Who samples attempts. Agents ask a `Generates`; this is what a rollout needs beside it."""

from typing import Protocol

from ernie_model.inference.request import Generates


class RolloutEngine(Protocol):
    """All ranks call `begin`, `end` and `close` together, in this order; between them, `generates` answers."""

    generates: Generates

    def begin(self, version: int) -> None:
        """A rollout begins: what is sampled from here on comes from the policy as it is now.

        Args:
            version: updates done so far. Completions carry it, token by token.
        """
        ...

    def end(self) -> None:
        """The rollout is over: memory that only sampling needs is given back."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...
