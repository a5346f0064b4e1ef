"""Rows of attempts whose log-probabilities are written down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from train.objectives.policy_gradient import build
from train.rl_config import RLObjectiveConfig


@dataclass
class Attempt:
    """One attempt, token by token. An engine's nan is not known; the reference's and the engine's default is `old`."""

    policy: list[float]
    old: list[float] | None
    advantage: float | list[float] = 1.0
    engine: list[float] | None = None
    reference: list[float] | None = None
    sampled: list[bool] | None = None
    """False: an observation."""

    @property
    def mask(self) -> list[bool]:
        return self.sampled or [True] * len(self.policy)

    @property
    def before(self) -> list[float]:
        return self.policy if self.old is None else self.old


def row(
    *groups: Sequence[Attempt], prompt: int = 3, junk: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, PackedBatch]:
    """(logprob_T with gradient, batch): each group's prompt without its last token, then its attempts, each after it.

    Args:
        junk: stands in the streams where nothing was sampled.
    """
    columns: list[tuple[float, float, float, float, float, float]] = []
    lengths, stems, roles, records = [], [], [], []
    for number, group in enumerate(groups):
        stem = len(lengths)
        columns += [(junk, 0.0, junk, junk, junk, junk)] * (prompt - 1)
        lengths.append(prompt - 1)
        stems.append(-1)
        roles.append(Role.PROMPT)
        for attempt in group:
            advantages = attempt.advantage
            if not isinstance(advantages, list):
                advantages = [advantages] * len(attempt.policy)
            streams = (
                attempt.policy,
                map(float, attempt.mask),
                attempt.before,
                attempt.engine or attempt.before,
                attempt.reference or attempt.before,
                advantages,
            )
            for column in zip(*streams, strict=True):
                columns.append(column if column[1] else (junk, 0.0, junk, junk, junk, junk))
            columns.append((junk, 0.0, junk, junk, junk, junk))
            lengths.append(len(attempt.policy) + 1)
            stems.append(stem)
            roles.append(Role.ATTEMPT)
        records += [number] * (1 + len(group))
    policy_T, weight_T, old_T, engine_T, ref_T, advantage_T = torch.tensor(columns, dtype=torch.float64).T.to(dtype)
    token_T = torch.arange(len(columns))
    fresh = all(attempt.old is None for group in groups for attempt in group)
    batch = PackedBatch(
        token_T=token_T,
        target_T=token_T,
        weight_T=weight_T.float(),
        position_3T=token_T.expand(3, -1),
        lengths=tuple(lengths),
        ids=tuple(f"group {number}" for number in records),
        datasets=("made",) * len(lengths),
        stems=tuple(stems),
        roles=tuple(roles),
        records=tuple(records),
        scores=(math.nan,) * len(lengths),
        ref_logprob_T=ref_T,
        old_logprob_T=None if fresh else old_T,
        engine_logprob_T=engine_T,
        advantage_T=advantage_T,
    )
    return policy_T.clone().requires_grad_(), batch


def moved(old: Sequence[float], by: Sequence[float], **keys: Any) -> Attempt:
    """The policy's log-ratios are `by`."""
    return Attempt([a + b for a, b in zip(old, by, strict=True)], list(old), **keys)


def settings(**keys: Any) -> RLObjectiveConfig:
    return RLObjectiveConfig(**keys)


@dataclass
class Update:
    """What an update would learn from one row."""

    loss: float
    """Divided as the gradient is."""
    gradients: list[list[float]]
    """d loss / d log p of each attempt, token by token."""
    metrics: dict[str, float]


def update(config: RLObjectiveConfig, *groups: Sequence[Attempt], nominal: int | None = None, **keys: Any) -> Update:
    logprob_T, batch = row(*groups, **keys)
    objective = build(config, attempts_per_update=nominal or sum(map(len, groups)))
    units = float(objective.count(batch))
    divisor = objective.divisor or units
    found = objective.loss(logprob_T, batch)
    (found.total / divisor).backward()
    assert logprob_T.grad is not None
    parts = logprob_T.grad.split(batch.lengths)
    return Update(
        loss=found.total.item() / divisor,
        gradients=[part[:-1].tolist() for part, role in zip(parts, batch.roles, strict=True) if role is Role.ATTEMPT],
        metrics={name: value.item() / units for name, value in found.metrics.items()},
    )
