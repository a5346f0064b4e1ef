"""The settings against each other and against what lies in the run folder already.

Rules within one group are checked where the group is defined (train/config.py); here are those that need more: the
model's limits, the device, an earlier run.
"""

from pathlib import Path

import torch

from data.errors import DataError
from ernie_model.config import ErnieConfig
from train import checkpoint
from train.checks.findings import Finding, ok, problem, warning
from train.compose import plain
from train.config import (
    Precision,
    TrainingConfig,
    UserError,
)
from train.run import check_same_maths

FINE_TUNING_LR = 1e-4
"""A peak learning rate up to this is one for trained weights; random ones hardly move."""


def check_settings(config: TrainingConfig, architecture: ErnieConfig, device: torch.device) -> list[Finding]:
    found = []
    limit = architecture.max_position_embeddings
    if config.data.max_tokens > limit:
        found.append(
            warning(
                f"data.max_tokens={config.data.max_tokens} is more than the {limit} positions that the model knows. A "
                f"conversation longer than that would be trained where the model never was; lower data.max_tokens."
            )
        )
    if config.model.checkpoint is None and config.optim.lr <= FINE_TUNING_LR:
        found.append(
            warning(
                f"optim.lr={config.optim.lr:g} is a learning rate for fine-tuning, and the model starts from random "
                "weights. Set model.checkpoint, or a rate such as optim.lr=1e-3."
            )
        )
    if config.model.precision is Precision.bf16 and device.type == "cpu":
        found.append(
            warning("model.precision=bf16 is slower than fp32 on most CPUs. Set model.precision=fp32 to train here.")
        )
    return [*(found or [ok("no setting contradicts another")]), *check_resume(config)]


def check_resume(config: TrainingConfig) -> list[Finding]:
    """What `ernie sft` would do with this folder."""
    folder = Path(config.run.folder)
    own = checkpoint.complete(folder / "checkpoints")
    if config.run.resume == "never" and own:
        return [
            problem(
                f"run.folder={folder} holds the checkpoint {own[-1].name}, and run.resume is never. Choose another "
                "run.folder, or run.resume=auto."
            )
        ]
    if config.run.resume != "auto" or not own:
        return [ok(f"a new run in {folder}" if config.run.resume in ("auto", "never") else f"from {config.run.resume}")]
    saved = checkpoint.read_state(own[-1])["settings"]
    # How many processes there will be is not known here: the number the run had stands for it.
    now = plain(config) | {"rows_per_update": saved.get("rows_per_update")}
    try:
        check_same_maths(own[-1], saved, now)
    except (UserError, DataError) as error:
        return [problem(str(error))]
    return [ok(f"goes on from {own[-1]}")]
