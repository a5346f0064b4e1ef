"""What is reported of a policy gradient's update, and its entropy bonus.

Of the ratio r that the loss clips (one per attempt, or one per token):
    ratio_mean  ratio_std  ratio_min  ratio_max
    clipped_low  clipped_high  clipped_dual     share of sampled tokens that are clipped, where the advantage is
                                                negative, positive, and by objective.dual_clip (cispo: capped)
    clipped_attempts_low  ..._high              the same of attempts, where all of one are clipped together
    kl_old_k1  kl_old_k3                        divergence of the policy from the one that sampled: means over tokens of
                                                -log r, and of r - 1 - log r, token by token

Of the weight M by k = p_old / p_engine:
    correction_mean                             of M; near 1 where engine and trainer agree
    correction_low  correction_high             share of sampled tokens whose k (or whose attempt's) is out of bounds
    masked                                      share of sampled tokens with M = 0,
    masked_positive  masked_negative            of those with positive, and with negative advantage
    masked_attempts                             share of attempts with such a token
    entropy_masked                              of the policy at such tokens, mean, where it is computed: above
                                                `entropy` if they are those of which it is least certain

Of attempts:
    attempt_tokens                              sampled tokens, mean; of attempts that have any
    attempt_tokens_positive  ..._negative       by the sign of the advantage
    zero_advantage                              share without one
    entropy                                     of the policy, per sampled token, where it is computed

Why is my gradient zero? Tokens of the update; the first is the sum of those below it:
    tokens_sampled                              the policy sampled them, and nothing masks their attempt
    tokens_impossible                           the trainer's distribution gives them probability 0
    tokens_zero_advantage                       all attempts of the group are worth the same
    tokens_dropped                              objective.opsm_delta leaves their attempt out
    tokens_masked                               M is 0
    tokens_clipped                              clipped
    tokens_taught                               have a gradient
and beside them
    tokens_unknown                              the engine's log-probability is nan; k is 1
    attempts_silent                             attempts without a sampled token: masked as truncated or unscored

Shape letters:  T tokens
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from train.loop import Beside, all_sum
from train.objectives.policy_gradient import Attempts, Terms, count_tokens, gather_attempts, loss_terms, shares
from train.policy import PolicyOutput
from train.rl_config import Aggregate, RLObjectiveConfig

Number = TypeVar("Number", Tensor, float)


class PolicyRecord(Beside):
    """Goes last among what adds to the rows.

    Args:
        attempts_per_update: as for `policy_gradient.build`.
        sequence: ranks that share each row.
    """

    def __init__(
        self, config: RLObjectiveConfig, accelerator: Accelerator, *, attempts_per_update: int, sequence: int = 1
    ):
        self.config, self.accelerator, self.sequence = config, accelerator, sequence
        self.divisor: Tensor | float = float(attempts_per_update)
        self._start()

    def _start(self) -> None:
        device = self.accelerator.device
        self._sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
        self._ends_2 = torch.tensor([-torch.inf, -torch.inf], dtype=torch.float64, device=device)  # -min, max

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        self._start()
        if self.config.entropy and self.config.aggregate is Aggregate.token:
            tokens = torch.tensor(sum(float(count_tokens(batch)) for batch in microbatches), dtype=torch.float64)
            total = all_sum(self.accelerator, tokens.to(self.accelerator.device))
            self.divisor = (total / self.sequence).clamp(min=1)

    def terms(self, batch: PackedBatch, output: PolicyOutput) -> Tensor | float:
        attempts = gather_attempts(output.logprob_T, batch)
        entropy_T = output.entropy_T
        if entropy_T is not None:
            entropy_T = torch.where(attempts.sampled_T, entropy_T.double(), 0.0)
        with torch.no_grad():
            terms = loss_terms(attempts, batch, self.config)
            sums = add_up(attempts, terms, entropy_T)
            self._sums += torch.stack([value.double() for value in sums])
            ratio_T = terms.ratio_T.exp()
            ends_2T = torch.stack([-ratio_T, ratio_T]).masked_fill(~attempts.sampled_T, -torch.inf)
            self._ends_2 = torch.maximum(self._ends_2, ends_2T.amax(1))
        if not self.config.entropy:
            return 0.0
        assert entropy_T is not None, "objective.entropy needs Policy.wants_entropy"
        total = (shares(attempts, self.config) * entropy_T).sum()
        return -self.config.entropy * total / self.divisor

    def sums(self) -> Tensor:
        return torch.cat([self._sums / self.sequence, one_of_ranks(self._ends_2, self.accelerator).flatten()])

    def report(self, sums: Tensor) -> dict[str, float]:
        count = len(Sums._fields)
        low, high = sums[count:].view(2, -1).amax(1).tolist()
        return reported(Sums(*sums[:count].tolist()), -low, high, self.config)


def one_of_ranks(value_N: Tensor, accelerator: Accelerator) -> Tensor:
    """(N,) -> (N, ranks): this rank's numbers in its own place and 0 in the others': a sum over ranks gathers."""
    out_NR = value_N.new_zeros(*value_N.shape, accelerator.num_processes)
    out_NR[..., accelerator.process_index] = value_N
    return out_NR


class Sums(NamedTuple, Generic[Number]):
    """Over a row; over an update, as plain numbers. `by attempt`: each token counts 1 / |attempt|."""

    # attempts
    silent: Number
    attempts: Number
    """That are not silent."""
    positive_attempts: Number
    negative_attempts: Number
    ratio_by_attempt: Number
    square_by_attempt: Number
    low_by_attempt: Number
    high_by_attempt: Number
    masked_attempts: Number
    # tokens
    sampled: Number
    positive: Number
    negative: Number
    ratio: Number
    square: Number
    low: Number
    high: Number
    dual: Number
    k1: Number
    k3: Number
    weight: Number
    k_low: Number
    k_high: Number
    weightless: Number
    weightless_positive: Number
    weightless_negative: Number
    entropy: Number
    entropy_tokens: Number
    weightless_entropy: Number
    # why a gradient is zero
    impossible: Number
    zero_advantage: Number
    dropped: Number
    masked: Number
    clipped: Number
    taught: Number
    unknown: Number


def add_up(attempts: Attempts, terms: Terms, entropy_T: Tensor | None) -> Sums[Tensor]:
    sampled_T, advantage_T, length_S = attempts.sampled_T, attempts.advantage_T, attempts.length_S
    by_attempt_T = sampled_T / length_S.clamp(min=1)[attempts.segment_T]
    ratio_T, token_T = terms.ratio_T.exp(), attempts.log_ratio_T
    positive_T, negative_T = sampled_T & (advantage_T > 0), sampled_T & (advantage_T < 0)
    low_T, high_T, dual_T = (sampled_T & of_T for of_T in (terms.pull.low_T, terms.pull.high_T, terms.pull.dual_T))
    weightless_T = sampled_T & (terms.weights.weight_T == 0)
    none = sampled_T.new_zeros((), dtype=torch.float64)
    left_T, kinds = sampled_T, {}
    for name, here_T in {
        "impossible": attempts.impossible_T,
        "zero_advantage": advantage_T == 0,
        "dropped": terms.dropped_T,
        "masked": terms.weights.weight_T == 0,
        "clipped": terms.pull.slope_T == 0,
    }.items():
        kinds[name] = (left_T & here_T).sum()
        left_T = left_T & ~here_T
    return Sums(
        silent=(attempts.attempt_S & (length_S == 0)).sum(),
        attempts=(length_S > 0).sum(),
        positive_attempts=(positive_T * by_attempt_T).sum(),
        negative_attempts=(negative_T * by_attempt_T).sum(),
        ratio_by_attempt=(ratio_T * by_attempt_T).sum(),
        square_by_attempt=(ratio_T.square() * by_attempt_T).sum(),
        low_by_attempt=(low_T * by_attempt_T).sum(),
        high_by_attempt=(high_T * by_attempt_T).sum(),
        masked_attempts=(attempts.means(weightless_T.double()) > 0).sum(),
        sampled=sampled_T.sum(),
        positive=positive_T.sum(),
        negative=negative_T.sum(),
        ratio=(ratio_T * sampled_T).sum(),
        square=(ratio_T.square() * sampled_T).sum(),
        low=low_T.sum(),
        high=high_T.sum(),
        dual=dual_T.sum(),
        k1=-token_T.sum(),
        k3=(torch.expm1(token_T) - token_T).sum(),
        weight=(terms.weights.weight_T * sampled_T).sum(),
        k_low=(terms.weights.low_T & sampled_T).sum(),
        k_high=(terms.weights.high_T & sampled_T).sum(),
        weightless=weightless_T.sum(),
        weightless_positive=(weightless_T & positive_T).sum(),
        weightless_negative=(weightless_T & negative_T).sum(),
        entropy=none if entropy_T is None else entropy_T.sum(),
        entropy_tokens=sampled_T.sum() * (entropy_T is not None),
        weightless_entropy=none if entropy_T is None else (entropy_T * weightless_T).sum(),
        **kinds,
        taught=left_T.sum(),
        unknown=attempts.unknown_T.sum(),
    )


def reported(sums: Sums[float], low: float, high: float, config: RLObjectiveConfig) -> dict[str, float]:
    """`low`, `high`: the smallest and the largest ratio."""
    out = {
        f"tokens_{name}": getattr(sums, name)
        for name in ("sampled", "impossible", "zero_advantage", "dropped", "masked", "clipped", "taught", "unknown")
    }
    out["attempts_silent"] = sums.silent
    tokens, attempts = sums.sampled, sums.attempts
    if not tokens:
        return out
    if config.has_sequence_ratio:
        mean, square = sums.ratio_by_attempt / attempts, sums.square_by_attempt / attempts
        out |= {"clipped_attempts_low": sums.low_by_attempt / attempts}
        out |= {"clipped_attempts_high": sums.high_by_attempt / attempts}
    else:
        mean, square = sums.ratio / tokens, sums.square / tokens
    out |= {
        "ratio_mean": mean,
        "ratio_std": max(square - mean**2, 0.0) ** 0.5,
        "ratio_min": low,
        "ratio_max": high,
        "clipped_low": sums.low / tokens,
        "clipped_high": sums.high / tokens,
        "clipped_dual": sums.dual / tokens,
        "kl_old_k1": sums.k1 / tokens,
        "kl_old_k3": sums.k3 / tokens,
        "correction_mean": sums.weight / tokens,
        "correction_low": sums.k_low / tokens,
        "correction_high": sums.k_high / tokens,
        "masked": sums.weightless / tokens,
        "masked_positive": sums.weightless_positive / max(sums.positive, 1),
        "masked_negative": sums.weightless_negative / max(sums.negative, 1),
        "masked_attempts": sums.masked_attempts / attempts,
        "attempt_tokens": tokens / attempts,
        "zero_advantage": 1 - (sums.positive_attempts + sums.negative_attempts) / attempts,
    }
    for name in ("positive", "negative"):
        if of := getattr(sums, f"{name}_attempts"):
            out[f"attempt_tokens_{name}"] = getattr(sums, name) / of
    if sums.entropy_tokens:
        out["entropy"] = sums.entropy / sums.entropy_tokens
        if sums.weightless:
            out["entropy_masked"] = sums.weightless_entropy / sums.weightless
    return out
