"""AdamW: which parameters decay, and the learning rate of every step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from train.config import OptimConfig, Schedule

FUSED_DEVICES = ("cpu", "cuda", "xpu")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases and the embedding do not.

    Decay pulls a weight towards zero. A norm's neutral value is 1, and a bias or the embedding of a rare token gets
    little gradient to push back with. An embedding that is tied to the head counts as an embedding; an untied head is a
    matrix and decays. Routers are matrices too. Frozen parameters are left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    names: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and "embed_tokens" not in name
        group = "decay" if decays else "no_decay"
        groups[group].append(parameter)
        names[group].append(name)
    return [
        {"name": group, "params": groups[group], "names": names[group], "weight_decay": decay}
        for group, decay in (("decay", weight_decay), ("no_decay", 0.0))
        if groups[group]
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        groups,
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
