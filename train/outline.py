"""The model of a run without its values: on the meta device, frozen and adapted as it would train."""

import dataclasses
from pathlib import Path

import torch
from rich.table import Table

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from train.build import compute_dtype, read_architecture, read_config
from train.config import HeldIn, ModelConfig, PeftKind, TrainingConfig
from train.trained import freeze
from train.weights import trained_weights


def architecture_of(config: ModelConfig) -> ErnieConfig:
    """Of the checkpoint where it lies on this machine, else of model.config where given: nothing is downloaded."""
    here = config.checkpoint is not None and Path(config.checkpoint).is_dir()
    return read_config(config) if here or config.config is None else read_architecture(config, None)


def outline(config: TrainingConfig, architecture: ErnieConfig) -> tuple[ErnieModel, list[str], Table | None]:
    """(the model, notes about what is frozen, what is adapted)."""
    with torch.device("meta"):  # shapes and names, no values
        model = ErnieModel(architecture)
        model.compute_dtype = compute_dtype(config.model)
        # Adapters that would be loaded have the shapes of new ones.
        fresh = dataclasses.replace(config.peft, init_from=None, frozen={})
        adapted = trained_weights(model, fresh, seed=config.run.seed, base=config.model.checkpoint)
    if config.parallel.held_in is HeldIn.bfloat16 and config.peft.kind is PeftKind.none:
        model.set_dtype(torch.bfloat16)
    notes = freeze(model, config.optim, random=config.model.checkpoint is None)
    return model, notes, adapted.table()
