"""Preference losses: what a policy pays for how it weighs a pair of answers. Pure functions on numbers per pair.

    w, l      log p / p_ref of the chosen and of the rejected answer        (log p with reference_free)
    w', l'    the same per token                    cw, cl    log p per token
    h         f(w) - f(l), f the identity for reverse KL                    z = beta h          S = log sigmoid

    sigmoid       -(1-e) S(z) - e S(-z)                             2305.18290; with e cDPO
                  z less offset_alpha log(score gap)                2402.10571
    sigmoid_norm  the same, z = beta (w' - l')                      TRL 1.16
    robust        (-(1-e) S(z) + e S(-z)) / (1 - 2e)                2403.00409
    hinge         max(0, 1 - z)                                     2305.10425
    exo_pair      KL of (sigmoid z, sigmoid -z) against (1-e, e)    2402.00856, 16
    discopop      -S(z) (1-m) + exp(-z) m,  m = sigmoid(z / tau)    2406.08414, 5
    ipo           (w' - l' - 1 / 2 beta)^2                          2310.12036, 17, per token as its authors ran it
    ipo_sum       (w - l - 1 / 2 beta)^2                            as printed there
    nca_pair      -S(beta w) - S(-beta w) / 2 - S(-beta l) / 2      2402.05369
    bco_pair      -S(beta w - d) - S(d - beta l)                    2404.04656; d: 0, or a moving mean of rewards
    sppo_hard     (w - 1 / 2 beta)^2 + (l + 1 / 2 beta)^2           2405.00675, 4.7 with P = 1 and 0
    apo_zero      1 - sigmoid(beta w) + sigmoid(beta l)             2408.06266, 7
    apo_down      sigmoid(beta w) + 1 - sigmoid(beta (w - l))       2408.06266, 8
    dpop          -S(beta (w - l - lambda max(0, -w)))              2402.13228, 3
                  -S(beta (w - l)) + lambda max(0, -w)              dpop_outside: ERNIEKit
    kto_pair      (1 - sigmoid(beta (w - KL_l))) / 2                2402.01306 on pairs; KL_w, KL_l: means of w, l,
                  + (1 - sigmoid(beta (KL_w - l))) / 2              at least 0
    simpo         -(1-e) S(z) - e S(-z),  z = beta (cw - cl) - gamma    2405.14734
    or            -S(log odds(cw) - log odds(cl)),  of p = exp(cw)  2403.07691
    orpo          -cw + beta * or

SimPO's margin gamma is not multiplied by beta (papers that print it as gamma / beta mean the same). With f: forward KL
1 - exp(-w), JS log 2 + S(w), alpha (exp((a-1) w) - 1) / (a-1) (2309.16240). Reference 7.1 to 7.3; numbers are arXiv's.

Shape letters:  N pairs
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.dpo_config import DPOObjectiveConfig, FDivergence, PreferenceLoss
from train.objectives.pairs import Answers, PairSums

LARGEST_EXPONENT = 80.0
"""Of the ratios that a divergence raises to a power; beyond it (e^80) the score is flat."""
MOST_CERTAIN = -1e-10
"""log p per token for odds: p = 1 has none."""


class Views(NamedTuple):
    """What losses look at, float64 (N,) each: see the module's docstring."""

    w_N: Tensor
    l_N: Tensor
    w_mean_N: Tensor
    l_mean_N: Tensor
    cw_mean_N: Tensor
    cl_mean_N: Tensor
    score_gap_N: Tensor
    kl_w: Tensor | float = 0.0
    """Means of w and l over the update, at least 0, without gradient; only kto_pair looks at them."""
    kl_l: Tensor | float = 0.0
    shift: float = 0.0
    """What bco_pair measures rewards against."""


def views(pairs: PairSums, config: DPOObjectiveConfig) -> Views:
    """Corrections for length, and for the lack of a reference."""
    chosen, rejected = pairs.chosen, pairs.rejected
    return Views(
        w_N=log_ratio(chosen, rejected, config),
        l_N=log_ratio(rejected, chosen, config),
        w_mean_N=_difference(chosen.logprob_N, _reference(chosen.ref_logprob_N, config)) / _tokens(chosen),
        l_mean_N=_difference(rejected.logprob_N, _reference(rejected.ref_logprob_N, config)) / _tokens(rejected),
        cw_mean_N=chosen.logprob_N / _tokens(chosen),
        cl_mean_N=rejected.logprob_N / _tokens(rejected),
        score_gap_N=pairs.score_gap_N,
    )


def log_ratio(one: Answers, other: Answers, config: DPOObjectiveConfig) -> Tensor:
    """log p / p_ref of one answer of each pair, corrected for length as settings want it."""
    policy_N, ref_N = one.logprob_N, one.ref_logprob_N
    if config.ld_alpha is not None:  # 2409.06411: tokens that the other answer has no counterpart for
        policy_N = one.shared_N + config.ld_alpha * (policy_N - one.shared_N)
        if not config.ld_policy_only and ref_N is not None and one.ref_shared_N is not None:
            ref_N = one.ref_shared_N + config.ld_alpha * (ref_N - one.ref_shared_N)
    ratio_N = _difference(policy_N, _reference(ref_N, config))
    if config.normalize_logps:
        ratio_N = ratio_N * ((one.length_N + other.length_N) / 2 / _tokens(one))
    return ratio_N


def preference_loss(loss: PreferenceLoss, views: Views, config: DPOObjectiveConfig) -> Tensor:
    """(N,), before its weight."""
    return LOSSES[loss](views, config)


# ------------------------------------------------------------------------------------------------------- of margins


def _sigmoid(of: Views, config: DPOObjectiveConfig) -> Tensor:
    z_N = _z(of, config)
    if config.offset_alpha:
        z_N = z_N - config.offset_alpha * torch.log(of.score_gap_N + 1e-6)
    return _smoothed(z_N, config.label_smoothing)


def _sigmoid_norm(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return _smoothed(config.beta * (of.w_mean_N - of.l_mean_N), config.label_smoothing)


def _robust(of: Views, config: DPOObjectiveConfig) -> Tensor:
    z_N, e = _z(of, config), config.label_smoothing
    return (-(1 - e) * F.logsigmoid(z_N) + e * F.logsigmoid(-z_N)) / (1 - 2 * e)


def _hinge(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return torch.relu(1 - _z(of, config))


def _exo_pair(of: Views, config: DPOObjectiveConfig) -> Tensor:
    z_N, e = _z(of, config), config.label_smoothing
    return torch.sigmoid(z_N) * (F.logsigmoid(z_N) - math.log1p(-e)) + torch.sigmoid(-z_N) * (
        F.logsigmoid(-z_N) - math.log(e)
    )


def _discopop(of: Views, config: DPOObjectiveConfig) -> Tensor:
    z_N = _z(of, config)
    modulation_N = z_N / config.discopop_tau
    # exp(-z) alone overflows where its weight is 0
    return -F.logsigmoid(z_N) * torch.sigmoid(-modulation_N) + torch.exp(F.logsigmoid(modulation_N) - z_N)


def _ipo(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return (of.w_mean_N - of.l_mean_N - 1 / (2 * config.beta)).square()


def _ipo_sum(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return (of.w_N - of.l_N - 1 / (2 * config.beta)).square()


# -------------------------------------------------------------------------------------------- of each answer alone


def _nca_pair(of: Views, config: DPOObjectiveConfig) -> Tensor:
    w_N, l_N = config.beta * of.w_N, config.beta * of.l_N
    return -F.logsigmoid(w_N) - 0.5 * F.logsigmoid(-w_N) - 0.5 * F.logsigmoid(-l_N)


def _bco_pair(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return -F.logsigmoid(config.beta * of.w_N - of.shift) - F.logsigmoid(of.shift - config.beta * of.l_N)


def _sppo_hard(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return (of.w_N - 0.5 / config.beta).square() + (of.l_N + 0.5 / config.beta).square()


def _apo_zero(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return torch.sigmoid(-config.beta * of.w_N) + torch.sigmoid(config.beta * of.l_N)


def _apo_down(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return torch.sigmoid(config.beta * of.w_N) + torch.sigmoid(-config.beta * (of.w_N - of.l_N))


def _dpop(of: Views, config: DPOObjectiveConfig) -> Tensor:
    lost_N = config.dpop_lambda * torch.relu(-of.w_N)
    if config.dpop_outside:
        return -F.logsigmoid(config.beta * (of.w_N - of.l_N)) + lost_N
    return -F.logsigmoid(config.beta * (of.w_N - of.l_N - lost_N))


def _kto_pair(of: Views, config: DPOObjectiveConfig) -> Tensor:
    # each half is measured against the other one's divergence
    return 0.5 * (torch.sigmoid(config.beta * (of.kl_l - of.w_N)) + torch.sigmoid(config.beta * (of.l_N - of.kl_w)))


# ------------------------------------------------------------------------------------------------ without a reference


def _simpo(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return _smoothed(config.beta * (of.cw_mean_N - of.cl_mean_N) - config.simpo_gamma, config.label_smoothing)


def _or(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return -F.logsigmoid(_log_odds(of.cw_mean_N) - _log_odds(of.cl_mean_N))


def _orpo(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return -of.cw_mean_N + config.beta * _or(of, config)


LOSSES: dict[PreferenceLoss, Callable[[Views, DPOObjectiveConfig], Tensor]] = {
    PreferenceLoss.sigmoid: _sigmoid,
    PreferenceLoss.hinge: _hinge,
    PreferenceLoss.ipo: _ipo,
    PreferenceLoss.ipo_sum: _ipo_sum,
    PreferenceLoss.robust: _robust,
    PreferenceLoss.exo_pair: _exo_pair,
    PreferenceLoss.nca_pair: _nca_pair,
    PreferenceLoss.bco_pair: _bco_pair,
    PreferenceLoss.sppo_hard: _sppo_hard,
    PreferenceLoss.apo_zero: _apo_zero,
    PreferenceLoss.apo_down: _apo_down,
    PreferenceLoss.discopop: _discopop,
    PreferenceLoss.sigmoid_norm: _sigmoid_norm,
    PreferenceLoss.dpop: _dpop,
    PreferenceLoss.kto_pair: _kto_pair,
    PreferenceLoss.simpo: _simpo,
    PreferenceLoss.odds_ratio: _or,
    PreferenceLoss.orpo: _orpo,
}

# ------------------------------------------------------------------------------------------------------------ pieces


def _z(of: Views, config: DPOObjectiveConfig) -> Tensor:
    return config.beta * (score(of.w_N, config) - score(of.l_N, config))


def score(ratio_N: Tensor, config: DPOObjectiveConfig) -> Tensor:
    """f'(p / p_ref) up to a constant, of log p / p_ref, f the divergence (2309.16240)."""
    kind, alpha = config.f_divergence_type, config.f_alpha_divergence_coef
    if kind is FDivergence.js_divergence:
        return math.log(2) + F.logsigmoid(ratio_N)
    if kind is FDivergence.forward_kl:
        alpha = 0.0
    if kind is FDivergence.reverse_kl or abs(alpha - 1) < 1e-6:
        return ratio_N
    return torch.expm1(((alpha - 1) * ratio_N).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)


def _smoothed(z_N: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(z_N) - smoothing * F.logsigmoid(-z_N)


def _log_odds(logprob_N: Tensor) -> Tensor:
    """log p / (1 - p), of log p < 0."""
    logprob_N = logprob_N.clamp(max=MOST_CERTAIN)
    return logprob_N - torch.log(-torch.expm1(logprob_N))


def _difference(policy_N: Tensor, ref_N: Tensor | None) -> Tensor:
    return policy_N if ref_N is None else policy_N - ref_N


def _reference(ref_N: Tensor | None, config: DPOObjectiveConfig) -> Tensor | None:
    return None if config.reference_free else ref_N


def _tokens(answers: Answers) -> Tensor:
    return answers.length_N.clamp(min=1)
