"""What a run trains, keeps in its checkpoints and publishes: all weights, or adapters beside a frozen model.

trained_weights(model, peft)  ──  peft=none   AllWeights        checkpoints: the model      best/, export/
                              └─  peft=lora   lora.Adapters     checkpoints: the adapter    adapter/ (+ merged export/)
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table
from torch import Tensor

from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.config import PeftConfig, PeftKind
from train.run import export
from train.values import Values, values_of


class Weights(Protocol):
    def tensors(self) -> dict[str, Tensor]:
        """What must be saved to go on: the model's own tensors."""
        ...

    def rests_on(self) -> str | None:
        """A fingerprint of the frozen weights that they need beside them and that are not saved."""
        ...

    def publish(self, run_folder: Path, name: str, processor: Processor, optimizer: Any = None) -> list[Path]:
        """Write what others load, as `export` (the end) or `best`; the folders that were written. All ranks call it.

        Args:
            optimizer: PyTorch's, or the one of DeepSpeed's engine: it may hold the exact weights.
        """
        ...

    def whole(self, folder: Path, name: str, optimizer: Any = None) -> AbstractContextManager[Values]:
        """Inside, all values of the model as others compute with it, adapters merged. All ranks; see `values_of`."""
        ...

    def table(self) -> Table | None:
        """What is adapted, for the terminal."""
        ...


class AllWeights:
    """The model itself."""

    def __init__(self, model: ErnieModel):
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)  # the parameters themselves, with their marks

    def rests_on(self) -> None:
        return None

    def whole(self, folder: Path, name: str, optimizer: Any = None) -> AbstractContextManager[Values]:
        return values_of(self.tensors(), optimizer, folder, name)

    def publish(self, run_folder: Path, name: str, processor: Processor, optimizer: Any = None) -> list[Path]:
        with self.whole(run_folder, name, optimizer) as values:
            export(run_folder / name, self.model.config, values, processor)
        return [run_folder / name]

    def table(self) -> Table | None:
        return None


def trained_weights(model: ErnieModel, config: PeftConfig, *, seed: int, base: str | None) -> Weights:
    """Freeze and adapt `model` if the settings say so.

    Args:
        seed: of a new adapter's values.
        base: the frozen weights' name: model.checkpoint.
    """
    if config.kind is PeftKind.none:
        return AllWeights(model)
    from train.lora.adapt import adapt  # peft takes seconds to import

    return adapt(model, config, seed=seed, base=base)
