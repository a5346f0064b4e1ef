"""Settings to model and processor, and what they will cost.

model.checkpoint    weights, config.json and processor of a folder or a hub repository
model.config        random weights; the tokenizer's ids fill in vocab_size and the media tokens
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ernie_model.checkpoint import CheckpointError, load_config, load_model
from ernie_model.config import ConfigError, ErnieConfig, PositionAfterVideo
from ernie_model.counting import count_parameters
from ernie_model.expert_parallel import Shard, connect_experts, shard_experts
from ernie_model.images import ImageSettings
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.recompute import recompute, recompute_offload
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from ernie_model.video import VideoSettings
from train.compose import flatten
from train.config import (
    HeldIn,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    UserError,
    suggestion,
)
from train.footprint import Footprint, footprint
from train.made_by import check_made
from train.memory import give_back_freed_memory
from train.parallel.layout import Layout

TINY = "tiny"
WEIGHT_BYTES = 4
"""Of a float32 master weight."""


class Built(NamedTuple):
    model: ErnieModel
    processor: Processor
    notes: list[str]
    """What the user should know about how this was put together."""


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    frozen: bool = False,
    held_in: HeldIn = HeldIn.float32,
    layout: Layout | None = None,
    partition: Callable[[nn.Module], None] | None = None,
) -> Built:
    """What this rank holds of the model, on the CPU.

    A checkpoint is read module by module, and only the experts of this rank; random weights are drawn whole, so that
    every layout starts from the same ones.

    Args:
        frozen: only adapters will train: weights are held as they are computed in, not as float32 masters.
        held_in: `parallel.held_in`, of weights that train.
        layout: which experts are here; None: all.
        partition: `partitioner(...)` under ZeRO-3, which keeps a part of every weight.

    Raises:
        UserError, ConfigError, CheckpointError, TokenizerError: with what is wrong and where.
    """
    layout = layout or Layout()
    architecture = read_config(config)
    check_experts(architecture, layout.expert)
    notes: list[str] = []
    dtype = torch.bfloat16 if held_in is HeldIn.bfloat16 else (compute_dtype(config) if frozen else None)
    dtype = dtype or torch.float32
    experts = Shard(layout.expert_rank, layout.expert)
    with nullcontext() if partition is None else give_back_freed_memory():
        if config.checkpoint is not None:
            rule = config.position_after_video
            model = load_model(
                config.checkpoint,
                dtype=dtype,
                revision=config.revision,
                position_after_video=None if rule is None else PositionAfterVideo(rule.value),
                experts=experts,
                ready=partition,
            )
            notes += _differences(config, model.config)
        else:
            torch.manual_seed(seed)
            model = ErnieModel(architecture).set_dtype(dtype)
            shard_experts(model, experts)
            if partition is not None:
                for module in model.modules():
                    partition(module)
    if layout.expert_group is not None:
        connect_experts(model, layout.expert_group)
    model.compute_dtype = compute_dtype(config)
    set_recompute(model, config)
    return Built(model, build_processor(config, model.config), notes)


def check_experts(architecture: ErnieConfig, ranks: int) -> None:
    """Raises:
    UserError: the experts cannot be shared out among so many ranks.
    """
    experts = architecture.num_experts if architecture.sparse_layers else 0
    if ranks > 1 and (not experts or experts % ranks):
        sizes = [str(n) for n in range(2, experts + 1) if experts % n == 0]
        raise UserError(
            f"parallel.expert is {ranks}, but this model has {experts or 'no'} experts in a pool. "
            + (f"Choose one of {', '.join(sizes)}, or 1." if experts else "Set parallel.expert=1.")
        )


def compute_dtype(config: ModelConfig) -> torch.dtype | None:
    """See `ErnieModel.compute_dtype`."""
    return torch.bfloat16 if config.precision is Precision.bf16 else None


def set_recompute(model: ErnieModel, config: ModelConfig) -> None:
    """Put what `model.recompute` and `model.offload_activations` ask for into the model's seams."""
    run = recompute_offload if config.offload_activations else recompute
    if config.recompute is not Recompute.none:
        model.run_layer = run
    if config.recompute is Recompute.layers_and_vision and model.vision is not None:
        model.vision.run_block = run


def read_config(config: ModelConfig) -> ErnieConfig:
    """The architecture alone: of the checkpoint, or of model.config. No weights are read."""
    rule = None if config.position_after_video is None else PositionAfterVideo(config.position_after_video.value)
    if config.checkpoint is None:
        return read_architecture(config, rule)
    check_made("model.checkpoint", config.checkpoint)
    try:
        loaded = load_config(config.checkpoint, config.revision)
    except FileNotFoundError as error:
        raise UserError(f"model.checkpoint={config.checkpoint}: {error}") from error
    return loaded if rule is None else loaded.replace(position_after_video=rule)


def build_processor(config: ModelConfig, architecture: ErnieConfig) -> Processor:
    if config.processor == TINY:
        return Processor(load_tiny_tokenizer(), architecture, *_pixels(config, ImageSettings(), VideoSettings()))
    source = config.processor or config.checkpoint
    assert source is not None  # ModelConfig checks it
    try:
        loaded = Processor.from_pretrained(source, config.revision if config.processor is None else None)
    except (OSError, CheckpointError) as error:
        key = "model.processor" if config.processor else "model.checkpoint"
        raise UserError(f"{key}={source} has no processor that can be read: {error}") from error
    # Positions must follow the model's configuration, which may have been overridden.
    return Processor(loaded.tokenizer, architecture, *_pixels(config, loaded.image, loaded.video), loaded.chat)


def _pixels(config: ModelConfig, image: ImageSettings, video: VideoSettings) -> tuple[ImageSettings, VideoSettings]:
    """The processor's settings with the areas that the user gave."""
    if config.image_pixels is not None:
        image = replace(image, min_pixels=config.image_pixels[0], max_pixels=config.image_pixels[1])
    if config.video_pixels is not None:
        video = replace(video, min_pixels=config.video_pixels[0], max_pixels=config.video_pixels[1])
    return image, video


def read_architecture(config: ModelConfig, rule: PositionAfterVideo | None) -> ErnieConfig:
    """model.config as an ErnieConfig; ids that belong to the tokenizer may be left out."""
    assert config.config is not None  # ModelConfig checks it
    raw = dict(config.config)
    if config.processor == TINY:
        ids = tiny_tokenizer_ids()
        vocab_size = ids.pop("vocab_size")
        if "text_config" in raw:
            raw = {**ids, **raw, "text_config": {"vocab_size": vocab_size, **raw["text_config"]}}
        else:
            raw = {"vocab_size": vocab_size, **raw}
    try:
        architecture = ErnieConfig.from_json(raw)
    except (ConfigError, KeyError, TypeError) as error:
        raise UserError(f"model.config: {error}") from error
    _refuse_unknown_keys(config.config, architecture)
    return architecture if rule is None else architecture.replace(position_after_video=rule)


def _refuse_unknown_keys(given: dict[str, Any], architecture: ErnieConfig) -> None:
    """A config.json may carry whatever its writer liked; in one that a user types, a key nobody reads is a mistake."""
    if given.get("model_type") == "ernie4_5_moe_vl":  # Baidu's spelling, which is only read
        return
    known = sorted(f"model.config.{key}" for key in {*flatten(architecture.to_json()), "rope_theta"})
    for key in flatten(given, "model.config"):
        if key not in known:
            raise UserError(f"{key} is not a key of {architecture.model_type}{suggestion(key, known)}")


def _differences(config: ModelConfig, loaded: ErnieConfig) -> list[str]:
    """A checkpoint brings its own architecture; say so where model.config asks for another one."""
    if config.config is None:
        return []
    try:
        asked = read_architecture(config, None)
    except UserError:  # incomplete, as tiny models are without their tokenizer: nothing was asked for
        return []
    names = [name for name in vars(asked) if getattr(asked, name) != getattr(loaded, name)]
    if not names:
        return []
    return [f"model.config differs from {config.checkpoint} in {', '.join(names)}; the checkpoint's values are used."]


# --------------------------------------------------------------------------------------------------- the arithmetic


class Arithmetic(NamedTuple):
    """What a run will be, before its first step."""

    total: int
    active_text: int
    active_vision: int
    memory: Footprint
    largest_update_tokens: int


def arithmetic(
    model: ErnieModel,
    settings: ModelConfig,
    *,
    max_tokens: int,
    max_patches: int | None,
    accumulation: int,
    parallel: ParallelConfig,
    ranks: int,
    device: torch.device,
) -> Arithmetic:
    """Of `model` as it will train; see `train.footprint.footprint`."""
    count = count_parameters(model.config)
    return Arithmetic(
        total=count.total,
        active_text=count.active_text,
        active_vision=count.active_vision,
        memory=footprint(
            model,
            settings,
            max_tokens=max_tokens,
            max_patches=max_patches,
            accumulation=accumulation,
            parallel=parallel,
            ranks=ranks,
            device=device,
        ),
        largest_update_tokens=max_tokens * accumulation * ranks // parallel.sequence,
    )


def human(number: float, unit: str = "") -> str:
    """2_950_000 → 2.95 M, 360_748_032 → 361 M, 29_400_000_000 → 29.4 B."""
    for size, letter in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.0f} {unit}".strip()
