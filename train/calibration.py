"""Quantise a model for the inputs that it will meet: settings -> conversations -> mean squares -> codes.

quantize.calibration=digits | chats.jsonl ──► conversations ──► forward passes ──► Calibration.importance()
                                                                                          '──► quantise_model
"""

from pathlib import Path

import torch

from data.conversation import conversation_to_learn
from data.dataset import SetSpec, StreamDataset, open_set
from data.encode import Example, encode
from ernie_model.context import Packed
from ernie_model.inference.quantize import Calibration, Quantization, Scheme, quantise_model
from ernie_model.model import ErnieModel
from ernie_model.parts import Part
from ernie_model.processor import Processor
from train.config import UserError
from train.inference_config import QuantizeConfig


def quantization(config: QuantizeConfig) -> Quantization | None:
    """What is to be quantised; None where nothing is."""
    parts = {Part(name): Scheme(bits) for name, bits in config.parts().items()}
    return Quantization(parts, config.group) if parts else None


def quantise(model: ErnieModel, processor: Processor, config: QuantizeConfig) -> Quantization | None:
    """Quantise in place what the settings name.

    Raises:
        UserError: a part that the model does not have; weights that are not finite.
        DataError, MediaError: conversations that cannot be read.
    """
    settings = quantization(config)
    if settings is None:
        return None
    importance = None
    if config.calibration is not None:
        with Calibration(model, settings) as calibration:
            for example in calibration_examples(config, processor):
                run(model, example)
        importance = calibration.importance()
    try:
        quantise_model(model, settings, importance)
    except ValueError as error:
        raise UserError(f"quantize: {error}") from error
    return settings


def calibration_examples(config: QuantizeConfig, processor: Processor) -> list[Example]:
    """Evenly over the training part of the set."""
    assert config.calibration is not None
    keys = {"path": "quantize.calibration", "task": "quantize.calibration"}
    is_file = Path(config.calibration).exists() or Path(config.calibration).suffix != ""
    spec = SetSpec(path=config.calibration, keys=keys) if is_file else SetSpec(task=config.calibration, keys=keys)
    conversations = open_set("calibration", spec).train
    assert not isinstance(conversations, StreamDataset)  # spec does not ask for one
    total = len(conversations)
    chosen = [place * total // min(config.examples, total) for place in range(min(config.examples, total))]
    media = conversations.media
    return [encode(conversation_to_learn(conversations[index]), processor, media=media) for index in chosen]


@torch.no_grad()
def run(model: ErnieModel, example: Example) -> None:
    device = model.norm.weight.device
    model(
        example.token_T.to(device),
        example.position_3T.to(device),
        Packed([example.num_tokens]),
        patch_PX=None if example.patch_PX is None else example.patch_PX.to(device),
        grids=example.grids,
    )
