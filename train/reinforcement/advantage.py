"""What attempts are worth, to how much better they are than was to be expected.

    group_std     (R - m) / (s + eps)      m, s: mean and standard deviation of the group                 GRPO
    group_mean     R - m                                                                             Dr. GRPO
    rloo           R - mean of the others                                           = A / (A - 1) * group_mean
    batch_std     (R - m) / (S + eps)      S: standard deviation of all R
    gdpo           D / (S + eps)           D: sum of weight * group_std over the parts of the reward, S: standard
                                           deviation of all D (their mean is 0)                 2601.05242

`All` are the groups that the rollout's updates learn from: those that were left out have no part in S, those that come
out of the queue have.

    R = 1, 0, 0, 0    group_std 1.5, -0.5 (three times)    group_mean 0.75, -0.25    rloo 1, -0.3333    at eps 0

Standard deviations are Bessel's. Attempts that could not be scored (None) have advantage 0, and no part in any mean,
deviation or count. Groups whose attempts are worth the same have advantage 0; so has a group with one scored attempt.

gdpo normalises before it adds up, so that a part with a small weight, or one that hardly differs, keeps its share: a
group whose attempts are all right and differ in format alone is not drowned by one that differs in accuracy.

With objective.per_domain, S is that of the group's own domain (the rewards of different domains have different
spreads; ERNIE 4.5 normalises by subset).

Reference 3.4, 4.4, 9 and 10.

Shape letters:  A attempts of a group
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import assert_never

from train.reinforcement.groups import SAME
from train.rl_config import AdvantageKind, RLObjectiveConfig

Group = Sequence[float | None]
"""A numbers; None: not known."""


def advantages(
    worth: Sequence[Group],
    config: RLObjectiveConfig,
    *,
    parts: Sequence[Sequence[Mapping[str, float | None]]] = (),
    weights: Mapping[str, float] | None = None,
    domains: Sequence[Hashable] = (),
) -> list[list[float]]:
    """Of each attempt of each group.

    Args:
        worth: weighted sums of the parts.
        parts: what each attempt's worth is made of; read by gdpo.
        weights: of the parts; read by gdpo.
        domains: of each group; read by per_domain.

    Raises:
        ValueError: a worth that is not finite; parts or domains that do not fit the groups.
    """
    _check(worth)
    eps = config.advantage_eps
    match config.advantage:
        case AdvantageKind.group_mean:
            values = [_centred(group) for group in worth]
        case AdvantageKind.rloo:
            values = [_scaled(_centred(group), _others(group)) for group in worth]
        case AdvantageKind.group_std:
            values = [_standardised(group, eps) for group in worth]
        case AdvantageKind.batch_std:
            values = _over_domains(worth, [_centred(group) for group in worth], config, domains)
        case AdvantageKind.gdpo:
            sums = _sums_of_parts(worth, parts, weights or {}, eps)
            values = _over_domains(sums, sums, config, domains)
        case _:
            assert_never(config.advantage)
    return [[0.0 if value is None else value for value in group] for group in values]


def _check(worth: Sequence[Group]) -> None:
    for number, group in enumerate(worth):
        for value in group:
            if value is not None and not math.isfinite(value):
                raise ValueError(f"an attempt of group {number} is worth {value}; it must be finite, or None.")


def _known(group: Group) -> list[float]:
    return [value for value in group if value is not None]


def _centred(group: Group) -> list[float | None]:
    known = _known(group)
    if not known or max(known) - min(known) <= SAME:
        return [None if value is None else 0.0 for value in group]
    mean = _mean(known)
    return [None if value is None else value - mean for value in group]


def _scaled(group: Group, scale: float) -> list[float | None]:
    return [None if value is None else value * scale for value in group]


def _others(group: Group) -> float:
    """(R - mean of the others) / (R - mean)."""
    count = len(_known(group))
    return count / (count - 1) if count > 1 else 0.0


def _standardised(group: Group, eps: float) -> list[float | None]:
    centred = _centred(group)
    return _scaled(centred, _inverse(_std(_known(centred)), eps))


def _sums_of_parts(
    worth: Sequence[Group],
    parts: Sequence[Sequence[Mapping[str, float | None]]],
    weights: Mapping[str, float],
    eps: float,
) -> list[list[float | None]]:
    """Of weight times the standardised part; a part that an attempt lacks adds nothing."""
    if [len(group) for group in parts] != [len(group) for group in worth]:
        raise ValueError("gdpo needs the parts of each attempt's reward.")
    sums: list[list[float | None]] = []
    for group, attempts in zip(worth, parts, strict=True):
        totals = [0.0] * len(group)
        for name, weight in weights.items():
            values = [None if one is None else part.get(name) for one, part in zip(group, attempts, strict=True)]
            for place, value in enumerate(_standardised(values, eps)):
                totals[place] += weight * (value or 0.0)
        sums.append([None if one is None else total for one, total in zip(group, totals, strict=True)])
    return sums


def _over_domains(
    of: Sequence[Group], values: Sequence[Group], config: RLObjectiveConfig, domains: Sequence[Hashable]
) -> list[list[float | None]]:
    """`values` over the standard deviation of `of`."""
    keys = list(domains) if config.per_domain else [None] * len(of)
    if len(keys) != len(of):
        raise ValueError(f"per_domain needs the domain of each of {len(of)} groups; there are {len(keys)}.")
    out: list[list[float | None]] = [[] for _ in of]
    for domain in dict.fromkeys(keys):
        places = [place for place, key in enumerate(keys) if key == domain]
        known = [value for place in places for value in _known(of[place])]
        scale = _inverse(_std(known), config.advantage_eps)
        for place in places:
            out[place] = _scaled(values[place], scale)
    return out


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Bessel's; 0 of fewer than two, and of equal values."""
    if len(values) < 2 or max(values) - min(values) <= SAME:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _inverse(std: float, eps: float) -> float:
    return 1 / (std + eps) if std > 0 else 0.0
