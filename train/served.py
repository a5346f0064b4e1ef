"""Settings to a model that works: weights, processor, engine."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from ernie_model.checkpoint import load_model, local_folder
from ernie_model.config import PositionAfterVideo
from ernie_model.inference.engine import Engine
from ernie_model.inference.kernels import copied_bytes
from ernie_model.inference.quantize import load_quantised, prepare, quantization_of
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.calibration import quantise
from train.checks.machine import available_memory
from train.config import Precision, UserError
from train.inference_config import ModelAtWork, Weights
from train.made_by import check_made

logger = logging.getLogger(__name__)


class Served(NamedTuple):
    model: ErnieModel
    processor: Processor


def open_model(config: Weights) -> Served:
    """The model, in evaluation mode, on the GPU where there is one.

    Raises:
        UserError, ConfigError, CheckpointError, TokenizerError: with what is wrong and where.
    """
    source = str(local_folder(weights_folder(config.checkpoint), config.revision, FILES))
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    rule = None if config.position_after_video is None else PositionAfterVideo(config.position_after_video.value)
    read = Processor.from_pretrained(source)
    # Positions follow the model's rule, which may have been overridden.
    config_of_model = read.config if rule is None else read.config.replace(position_after_video=rule)
    processor = Processor(read.tokenizer, config_of_model, read.image, read.video, read.chat)
    if quantization_of(source) is not None:
        refuse_changes(config)
        model = load_quantised(source, dtype=dtype, device=device_of(config), position_after_video=rule)
        return Served(model, processor)
    raw = json.loads((Path(source) / "config.json").read_text("utf-8"))
    if dtype is torch.bfloat16 and raw.get("dtype", raw.get("torch_dtype")) == "float32":
        logger.warning("weights in float32 are held in bfloat16; precision=fp32 keeps them as they are.")
    model = load_model(source, dtype=dtype, position_after_video=rule)
    model.requires_grad_(False).eval()
    if config.adapter is not None:
        merge_adapter(model, config.adapter)
    model = model.to(device_of(config))
    if quantise(model, processor, config.quantize) is not None:
        prepare(model)
    return Served(model, processor)


FILES = ["*.safetensors", "*.json", "*.jinja", "*.ttf", "tokenizer.model"]


def refuse_changes(config: Weights) -> None:
    """Raises UserError: quantised weights can neither be quantised again nor take an adapter."""
    for key, value in (("adapter", config.adapter), ("quantize", ", ".join(config.quantize.parts()))):
        if value:
            raise UserError(
                f"checkpoint={config.checkpoint} is quantised already, and {key}={value} needs weights of 16 bits or "
                f"more. Name the checkpoint that it was made of, or leave {key} out."
            )


@torch.no_grad()
def merge_adapter(model: ErnieModel, adapter: str) -> None:
    """W := W + scale * B A, in place, of every tensor that the adapter changes.

    Args:
        adapter: a folder in peft's format, or a run folder with one.

    Raises:
        UserError: there is no adapter, or it is of another model.
    """
    from train.lora.files import read_adapter  # peft takes seconds to import
    from train.lora.layers import effective_rows

    folder = _adapter_in(Path(adapter)) or Path(adapter)
    for name, factors in read_adapter(folder, model, "adapter").factors.items():
        weight = model.get_parameter(name)
        wide = torch.promote_types(weight.dtype, factors.A.dtype)
        for index in range(weight.shape[0]) if weight.ndim == 3 else (None,):  # one expert's float32 copy at a time
            part = () if index is None else (index,)
            weight[part] = effective_rows(weight, [factors], part, dtype=wide).to(weight.dtype)


def open_engine(config: ModelAtWork, served: Served) -> Engine:
    """
    Raises:
        UserError: engine.* asks for what this model, or this machine, cannot be run with.
    """
    free, copies = available_memory(device_of(config)), copied_bytes(served.model)
    if free is not None and config.engine.cache_gib * 2**30 + copies > free:
        faster = f" and copies of dense weights take {copies / 2**30:.1f} GiB" if copies else ""
        way_out = "lower it" if copies < free else "precision=bf16 and quantize.* make the copies smaller"
        raise UserError(
            f"engine.cache_gib is {config.engine.cache_gib:g}{faster}, but beside the model only {free / 2**30:.1f} "
            f"GiB are free on {device_of(config)}; {way_out}."
        )
    try:
        return Engine(served.model, served.processor.tokenizer, config.engine)
    except ValueError as error:
        raise UserError(str(error)) from error


def device_of(config: Weights) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")


def weights_folder(checkpoint: str) -> str:
    """`checkpoint`, or the folder of weights in it when it is the folder of a run.

    Raises:
        UserError: a run folder without any, or another folder without config.json; an experiment that was not run.
    """
    check_made("checkpoint", checkpoint)
    folder = Path(checkpoint)
    if not (folder / "run.json").exists():
        if folder.is_dir() and not (folder / "config.json").exists():
            raise UserError(f"checkpoint={checkpoint} holds no config.json. {_way_out(folder)}")
        return checkpoint
    for name in ("export", "best"):
        if (folder / name / "config.json").exists():
            return str(folder / name)
    if _adapter_in(folder) is not None:
        raise UserError(f"checkpoint={checkpoint} is the folder of a run that trained an adapter. {_way_out(folder)}")
    raise UserError(
        f"checkpoint={checkpoint} is the folder of a run that has written no weights yet. "
        f"`ernie export checkpoint={checkpoint} output=FOLDER` writes those of its newest checkpoint."
    )


def _way_out(folder: Path) -> str:
    """What a folder without config.json is taken for, and what to say instead."""
    if (folder / "state.json").exists():
        return f"It is the state of a run; `ernie export checkpoint={folder} output=FOLDER` writes its weights."
    if (adapter := _adapter_in(folder)) is not None:
        return f"Name what it was trained on, and the adapter: checkpoint=BASE adapter={adapter}."
    within = [name for name in ("export", "quantized", "best") if (folder / name / "config.json").exists()]
    if within:
        return f"Did you mean checkpoint={folder / within[0]}?"
    return "Name a folder of weights, the folder of a run, or a name on the hub."


def _adapter_in(folder: Path) -> Path | None:
    """The folder itself, or the adapter of a run's folder."""
    places = (folder, folder / "adapter", folder / "best_adapter")
    return next((place for place in places if (place / "adapter_config.json").exists()), None)
