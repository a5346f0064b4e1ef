"""AdamW: its parameter groups, and the learning rate of every step."""

import math

import torch
from torch import nn

from ernie_model.parts import Part, part_of
from train.config import OptimConfig, Schedule
from train.trained import decays, lr_scales

FUSED_DEVICES = ("cpu", "cuda", "xpu")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """One group for each pair of learning-rate scale and weight decay that occurs among the trained parameters.

    The loop sets group["lr"] to the step's learning rate times group["lr_scale"]; checkpoints go by group["names"].
    """
    named = dict(model.named_parameters())
    groups: dict[tuple[float, float], dict] = {}
    for name, scale in lr_scales(model, config).items():
        decay = config.weight_decay if decays(name, named[name]) else 0.0
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "names": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay},
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


def unreached_parts(optimizer: torch.optim.Optimizer) -> list[Part]:
    """Parts that were to learn and never had a gradient other than zero: no token of the run came by.

    AdamW's moments tell, and checkpoints keep them, so all starts of a run count.
    """
    reached: dict[Part, bool] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state, part = optimizer.state.get(parameter, {}), part_of(name)
            moved = any(bool(state[key].any()) for key in ("exp_avg", "exp_avg_sq") if key in state)
            reached[part] = reached.get(part, False) or moved
    return [part for part in Part if reached.get(part) is False]


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
