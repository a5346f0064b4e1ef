"""Settings to a model that works: weights, processor, engine."""

from pathlib import Path
from typing import NamedTuple

import torch

from ernie_model.checkpoint import load_model
from ernie_model.config import PositionAfterVideo
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.config import Precision, UserError
from train.inference_config import Weights


class Served(NamedTuple):
    model: ErnieModel
    processor: Processor


def open_model(config: Weights) -> Served:
    """The model, in evaluation mode, on the GPU where there is one.

    Raises:
        UserError, ConfigError, CheckpointError, TokenizerError: with what is wrong and where.
    """
    source = weights_folder(config.checkpoint)
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    rule = None if config.position_after_video is None else PositionAfterVideo(config.position_after_video.value)
    model = load_model(source, dtype=dtype, revision=config.revision, position_after_video=rule)
    model.requires_grad_(False).eval()
    return Served(model.to(device_of(config)), Processor.from_pretrained(source, config.revision))


def device_of(config: Weights) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")


def weights_folder(checkpoint: str) -> str:
    """`checkpoint`, or the folder of weights in it when it is the folder of a run.

    Raises:
        UserError: a run folder without any.
    """
    folder = Path(checkpoint)
    if not (folder / "run.json").exists():
        return checkpoint
    for name in ("export", "best"):
        if (folder / name / "config.json").exists():
            return str(folder / name)
    raise UserError(
        f"checkpoint={checkpoint} is the folder of a run that has written no weights yet. "
        f"`ernie export checkpoint={checkpoint} output=FOLDER` writes those of its newest checkpoint."
    )
