"""What attempts are worth, to how much better than expected each is.

    group_std    (R - mean) / (standard deviation + eps)     of the group, Bessel's
    group_mean    R - mean                                   Dr. GRPO
    rloo          R - mean of the others                     = A / (A - 1) * group_mean
    batch_std    (R - mean of the group) / (standard deviation of all R - mean of the rollout + eps)

Attempts that could not be scored (None) have advantage 0 and take no part in means. Reference 1.1, 9.

Shape letters:  A attempts of a group
"""

import math
from collections.abc import Mapping, Sequence

from train.rl_config import AdvantageKind, RLObjectiveConfig

EPS = 1e-4


def advantages(
    worth: Sequence[Sequence[float | None]],
    config: RLObjectiveConfig,
    *,
    parts: Sequence[Sequence[Mapping[str, float | None]]] = (),
    weights: Mapping[str, float] | None = None,
    domains: Sequence[str] = (),
) -> list[list[float]]:
    """Of each group, of each attempt.

    Args:
        parts, weights: what the worth is made of.
        domains: of each group.
    """
    centred = [_centred(group) for group in worth]
    match config.advantage:
        case AdvantageKind.group_mean:
            scales = [1.0] * len(worth)
        case AdvantageKind.rloo:
            sizes = [sum(one is not None for one in group) for group in worth]
            scales = [size / (size - 1) if size > 1 else 1.0 for size in sizes]
        case AdvantageKind.batch_std:
            together = [value for group in centred for value in group if value is not None]
            scales = [1 / (_std(together) + EPS)] * len(worth)
        case AdvantageKind.group_std:
            scales = [1 / (_std([value for value in group if value is not None]) + EPS) for group in centred]
    return [
        [0.0 if value is None else value * scale for value in group]
        for group, scale in zip(centred, scales, strict=True)
    ]


def _centred(group: Sequence[float | None]) -> list[float | None]:
    known = [one for one in group if one is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [None if one is None else one - mean for one in group]


def _std(centred: Sequence[float]) -> float:
    """Bessel's, of numbers whose mean is 0; 0 of fewer than two."""
    if len(centred) < 2:
        return 0.0
    return math.sqrt(sum(value * value for value in centred) / (len(centred) - 1))
