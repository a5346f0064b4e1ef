"""AdamW: its parameter groups, and the learning rate of every step."""

import math

import torch
from torch import nn

from ernie_model.expert_parallel import shard_of
from ernie_model.parts import only_media
from train.config import OptimConfig, Schedule
from train.trained import decays, lr_scales

FUSED_DEVICES = ("cpu", "cuda", "xpu")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """A group for each combination of what a group can have, as far as it occurs among the trained parameters.

    lr_scale       the loop sets group["lr"] to the step's learning rate times this
    weight_decay
    media          only images and videos reach these: the group rests in an update without any
    names          of its parameters

    What several ranks share out goes into groups of its own, and so does each dtype: ZeRO lays a group end to end.
    """
    named = dict(model.named_parameters())
    groups: dict[tuple, dict] = {}
    for name, scale in lr_scales(model, config).items():
        decay, media = config.weight_decay if decays(name, named[name]) else 0.0, only_media(name)
        group = groups.setdefault(
            (scale, decay, media, shard_of(named[name]), named[name].dtype),
            {
                "params": [],
                "names": [],
                "lr": config.lr * scale,
                "lr_scale": scale,
                "weight_decay": decay,
                "media": media,
            },
        )
        group["params"].append(named[name])
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what trains: `train.trained.freeze` comes first.

    Raises:
        UserError: a key of `optim.lr_scale` matches nothing.
    """
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        # One kernel for all parameters instead of several per parameter; same formula.
        fused=device.type in FUSED_DEVICES,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` (counted from 0) of `steps`.

    warm-up:   lr * (step + 1) / (warmup_steps + 1)                        for step < warmup_steps
    then from lr at step = warmup_steps down to lr * min_lr_ratio at the last step, along a line or half a cosine.

    A function of the step alone: resuming needs no state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule is Schedule.constant:
        return config.lr
    done = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    left = 1 - done if config.schedule is Schedule.linear else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
