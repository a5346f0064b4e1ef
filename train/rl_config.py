"""Typed schemas of `ernie rl`: what is rolled out, how it is judged, and how that becomes a loss."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ernie_model.inference.engine import EngineSettings
from train.config import (
    DataConfig,
    EvaluateConfig,
    FilesData,
    ObjectiveKind,
    TooLong,
    TrainingConfig,
    check,
    check_kind,
    suggestion,
)
from train.dpo_config import ReferenceConfig, ReferenceKind, reference_kind
from train.inference_config import AgentConfig, RewardLimits, SamplingConfig
from train.rewards.registry import OWN, check_part
from train.rewards.shaping import ACCURACY, COMPARISONS, PARTS


class PolicyLoss(Enum):
    """Formulas and sources: train/objectives/surrogate.py."""

    clip = "clip"
    """PPO's: min(r A, clip(r) A). With ratio=sequence GSPO, with ratio=token GRPO."""
    cispo = "cispo"
    """min(r, objective.cispo_cap) weighs log p, and no token is left out."""
    sapo = "sapo"
    """A sigmoid in place of the clip."""
    gmpo = "gmpo"
    """The geometric mean over an attempt of its tokens' ratios, each of which is clipped."""


class Ratio(Enum):
    """Of policy to policy at the time of the rollout."""

    sequence = "sequence"
    """One for the whole attempt, the geometric mean of its tokens' (GSPO), in the form that weighs token by token."""
    token = "token"


class Aggregate(Enum):
    """What the mean of the loss is over."""

    sequence = "sequence"
    """Mean over an attempt's tokens, then over the attempts of the update (GRPO, GSPO)."""
    token = "token"
    """Over all tokens of the update (DAPO)."""
    length = "length"
    """Sum of all tokens over attempts x objective.max_length (Dr. GRPO)."""
    sequence_sum = "sequence_sum"
    """Sum over an attempt's tokens, mean over attempts (LUSPO)."""


class Correction(Enum):
    """What becomes of tokens on whose probability engine and trainer disagree, by k = p_old / p_engine."""

    none = "none"
    icepop = "icepop"
    """k inside objective.band, 0 outside (Ring-1T)."""
    icepop_mask = "icepop_mask"
    """1 inside, 0 outside."""
    tis = "tis"
    """min(k, upper bound)."""
    mis = "mis"
    """k up to the upper bound, 0 above."""
    icepop_sequence = "icepop_sequence"
    """icepop of the geometric mean over the attempt (ERNIE 5.0, equation 2)."""
    icepop_mask_sequence = "icepop_mask_sequence"
    """icepop_mask of the geometric mean."""
    tis_product = "tis_product"
    """tis of the product over the attempt."""
    mis_product = "mis_product"
    """mis of the product."""
    icepop_mask_product = "icepop_mask_product"
    """icepop_mask of the product."""

    @property
    def has_lower_bound(self) -> bool:
        return not self.value.startswith(("tis", "mis"))


class KLEstimator(Enum):
    """Of the divergence from the reference, with l = log p / p_ref of a sampled token."""

    k1 = "k1"
    """l. As a loss on tokens of the policy itself its gradient is 0 on average, so it needs objective.kl_unbiased."""
    k2 = "k2"
    """l^2 / 2."""
    k3 = "k3"
    """exp(-l) - 1 + l."""


class AdvantageKind(Enum):
    group_std = "group_std"
    """(R - mean of the group) / its standard deviation."""
    group_mean = "group_mean"
    """R - mean of the group (Dr. GRPO)."""
    rloo = "rloo"
    """R - mean of the others."""
    batch_std = "batch_std"
    """R - mean of the group, over the standard deviation of all that the rollout's updates learn from."""
    gdpo = "gdpo"
    """group_std of each part of the reward for itself, then their weighted sum, then over its own deviation."""


# What each loss reads of what not all of them read. A setting that the chosen one does not read is refused.
READS: dict[PolicyLoss, tuple[str, ...]] = {
    PolicyLoss.clip: ("ratio", "clip_low", "clip_high", "dual_clip"),
    PolicyLoss.cispo: ("ratio", "cispo_cap"),
    PolicyLoss.sapo: ("ratio", "sapo_positive", "sapo_negative"),
    PolicyLoss.gmpo: ("gmpo_clip",),
}


@dataclass
class RLObjectiveConfig:
    """How log-probabilities and advantages become a loss."""

    kind: ObjectiveKind = ObjectiveKind.rl
    loss: PolicyLoss = PolicyLoss.clip
    ratio: Ratio = Ratio.sequence
    aggregate: Aggregate = Aggregate.sequence
    max_length: int | None = None
    """Divides the sum over an attempt's tokens, for aggregate=length: the longest an attempt may get."""
    clip_low: float | None = None
    """clip: ratios below 1 - clip_low are clipped where the advantage is negative; null: 3e-4 with ratio=sequence, 0.2
    with ratio=token."""
    clip_high: float | None = None
    """Those above 1 + clip_high, where it is positive; null: 4e-4 with ratio=sequence, 0.2 with ratio=token."""
    dual_clip: float | None = None
    """clip: no ratio above it counts for more where the advantage is negative, either; null: any does."""
    cispo_cap: float = 5.0
    """cispo: the largest ratio."""
    sapo_positive: float = 1.0
    """sapo: steepness where the advantage is positive,"""
    sapo_negative: float = 1.05
    """and where it is not."""
    gmpo_clip: float = 0.4
    """gmpo: the largest absolute value of a token's log-ratio that counts."""
    correction: Correction = Correction.icepop
    band: list[float] | None = None
    """Smallest and largest k; [0, .inf] cuts nothing. null: [0.5, 5] for icepop and its relatives, [0, 2] for tis and
    mis, which have no lower bound."""
    opsm_delta: float | None = None
    """Attempts with negative advantage whose tokens have, on average, become less likely than when they were sampled,
    by more than this many nats, are left out (off-policy sequence masking); null: none is."""
    kl: float = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: KLEstimator = KLEstimator.k3
    kl_unbiased: bool = False
    """Multiply the estimate by the token's ratio p / p_old, with its gradient: that of the divergence itself, whatever
    policy sampled (DeepSeek-V3.2)."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    advantage: AdvantageKind = AdvantageKind.group_std
    advantage_eps: float = 1e-4
    """Is added to standard deviations that are divided by."""
    per_domain: bool = False
    """batch_std, gdpo: the deviation is that of the rollout's groups of the same domain."""

    def __post_init__(self):
        for name in ("cispo_cap", "sapo_positive", "sapo_negative", "gmpo_clip"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"objective.{name} is {value}; it must be a positive number.")
        for name in ("kl", "entropy"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"objective.{name} is {value}; it must be 0 or a positive number.")
        check(
            0 <= self.advantage_eps < math.inf,
            f"objective.advantage_eps is {self.advantage_eps}; it must be 0 or more, and finite.",
        )
        check(
            not self.per_domain or self.advantage in (AdvantageKind.batch_std, AdvantageKind.gdpo),
            f"objective.per_domain is true, but objective.advantage={self.advantage.value} divides by nothing that is "
            "taken over several groups. Leave it out, or choose batch_std or gdpo.",
        )
        check(
            self.clip_low is None or 0 <= self.clip_low < 1,
            f"objective.clip_low is {self.clip_low}; it must be at least 0 and less than 1, or null.",
        )
        check(
            self.clip_high is None or 0 <= self.clip_high < math.inf,
            f"objective.clip_high is {self.clip_high}; it must be 0 or more, and finite, or null.",
        )
        check(
            self.opsm_delta is None or 0 <= self.opsm_delta < math.inf,
            f"objective.opsm_delta is {self.opsm_delta}; it must be 0 or more, and finite, or null.",
        )
        self._check_read()
        check(
            self.dual_clip is None or 1 + self.clip[1] < self.dual_clip < math.inf,
            f"objective.dual_clip is {self.dual_clip}; it must be finite and more than 1 + objective.clip_high = "
            f"{1 + self.clip[1]:g}, for example 3, or null.",
        )
        check(
            (self.aggregate is Aggregate.length) == (self.max_length is not None),
            f"objective.aggregate is {self.aggregate.value} and objective.max_length "
            + (
                "null: say what divides the sum over an attempt's tokens, for example objective.max_length=4096."
                if self.max_length is None
                else f"{self.max_length}, which only aggregate=length reads. Leave one of the two out."
            ),
        )
        check(
            self.max_length is None or self.max_length >= 1,
            f"objective.max_length is {self.max_length}; it must be at least 1.",
        )
        sums = self.aggregate in (Aggregate.token, Aggregate.length)
        check(
            not sums or not self.has_sequence_ratio,
            f"objective.aggregate={self.aggregate.value} weighs an attempt by its length, and the ratio of "
            f"{'gmpo' if self.loss is PolicyLoss.gmpo else 'objective.ratio=sequence'} is one for all of it: that is "
            "neither GSPO nor DAPO. Use objective.aggregate=sequence (GSPO) or sequence_sum (LUSPO)"
            + (", or objective.ratio=token." if self.loss is not PolicyLoss.gmpo else "."),
        )
        self._check_band()
        check(
            self.kl_estimator is not KLEstimator.k1 or self.kl_unbiased,
            "objective.kl_estimator is k1, whose gradient is 0 on average when it is a loss. Add "
            "objective.kl_unbiased=true, or use objective.kl_estimator=k3.",
        )

    def _check_read(self) -> None:
        """Refuse a setting that would do nothing."""
        default = {field.name: field.default for field in dataclasses.fields(self)}

        def refuse(key: str, unless: str) -> None:
            value = getattr(self, key)
            shown = value.value if isinstance(value, Enum) else value
            check(value == default[key], f"objective.{key} is {shown}, but {unless}")

        for key in dict.fromkeys(key for keys in READS.values() for key in keys):
            if key not in READS[self.loss]:
                readers = ", ".join(loss.value for loss, keys in READS.items() if key in keys)
                refuse(
                    key, f"{self.loss.value} does not use it. Leave it out, or choose objective.loss from {readers}."
                )
        if self.correction is Correction.none:
            refuse("band", "objective.correction=none has no use for it. Leave it out, or choose a correction.")
        if self.advantage in (AdvantageKind.group_mean, AdvantageKind.rloo):
            refuse(
                "advantage_eps",
                f"objective.advantage={self.advantage.value} divides by no deviation. Leave it out, or choose "
                "objective.advantage=group_std.",
            )
        if self.kl == 0:
            for key in ("kl_estimator", "kl_unbiased"):
                refuse(key, "objective.kl is 0. Give objective.kl a weight, for example 0.001, or leave it out.")

    def _check_band(self) -> None:
        low, high = self.bounds if self.band is None or len(self.band) == 2 else (math.nan, math.nan)
        check(
            0 <= low <= 1 <= high,
            f"objective.band is {self.band}; it must be two numbers, [smallest, largest], with 1 between them, which "
            "is agreement. For example [0.5, 5].",
        )
        check(
            low == 0 or self.correction.has_lower_bound,
            f"objective.band is {self.band}, but {self.correction.value} has no lower bound. Use [0, {high:g}], or a "
            "correction of the icepop family.",
        )

    @property
    def has_sequence_ratio(self) -> bool:
        """One ratio for all tokens of an attempt."""
        return self.loss is PolicyLoss.gmpo or self.ratio is Ratio.sequence

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 a ratio counts."""
        low, high = (3e-4, 4e-4) if self.ratio is Ratio.sequence else (0.2, 0.2)
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Of k."""
        low, high = ((0.5, 5.0) if self.correction.has_lower_bound else (0.0, 2.0)) if self.band is None else self.band
        return low, high


MISMATCHES = ("mean", "max", "p_mean", "p_max", "k3", "chi2", "low", "high", "masked", "unknown")
"""Numbers of train/reinforcement/mismatch.py that are the larger the worse it is."""


@dataclass
class MismatchConfig:
    """When disagreement of engine and trainer is told, and when it ends the run. By the names of its numbers, without
    mismatch_: see train/reinforcement/mismatch.py."""

    warn: dict[str, float] = field(default_factory=lambda: {"masked": 0.01, "mean": 0.1})
    """Told when it is above."""
    stop: dict[str, float] = field(default_factory=lambda: {"masked": 0.3, "mean": 1.0})
    """The run ends when it stays above,"""
    patience: int = 3
    """for so many updates in a row."""
    rise: float = 2.0
    """Told when the mean of |log p_old - log p_engine| over 20 updates is more than this many times that of the
    20 before."""
    routing: bool = False
    """Compare what the routers of engine and trainer choose, too (train/reinforcement/routing.py). The engine must
    report it, which takes time. With rollout.replay_experts it does anyway."""

    def __post_init__(self):
        for key, limits in (("warn", self.warn), ("stop", self.stop)):
            for name, limit in limits.items():
                check(
                    name in MISMATCHES,
                    f"mismatch.{key}.{name}: there is no such number. There are {', '.join(MISMATCHES)}.",
                )
                check(limit >= 0, f"mismatch.{key}.{name} is {limit}; it must be 0 or more.")
        for name in self.warn.keys() & self.stop.keys():
            check(
                self.warn[name] <= self.stop[name],
                f"mismatch.warn.{name} is {self.warn[name]} and mismatch.stop.{name} {self.stop[name]}; the run would "
                "end before it warns. Lower the first, or raise the second.",
            )
        check(self.patience >= 1, f"mismatch.patience is {self.patience}; it must be at least 1.")
        check(self.rise > 1, f"mismatch.rise is {self.rise}; it must be more than 1.")


class RolloutBackend(Enum):
    local = "local"
    """The suite's own engine, on the weights that train."""
    vllm = "vllm"
    """vLLM servers, which get the weights after each update."""


@dataclass
class VLLMConfig:
    """Where the servers are, for rollout.backend=vllm."""

    urls: list[str] = field(default_factory=list)
    """http://host:port of each; groups are dealt out to them in turn."""
    folder: str | None = None
    """Where weights are written for the servers, which must see it under the same name; null: in the run folder."""
    timeout_s: float = 3600.0
    """For one answer, and for one push of the weights."""
    retries: int = 3
    """Times that a push, or a request to one server, is tried again."""
    patience_s: float = 600.0
    """How long a run waits for a server when none is left."""

    def __post_init__(self):
        for url in self.urls:
            check(
                re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url) is not None,
                f"rollout.vllm.urls has {url!r}; each must be http://host:port.",
            )
        twice = [
            url
            for number, url in enumerate(self.urls)
            if url.rstrip("/") in [u.rstrip("/") for u in self.urls[:number]]
        ]
        check(not twice, f"rollout.vllm.urls names {twice[:1]} twice; name each server once.")
        for name in ("timeout_s", "patience_s"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"rollout.vllm.{name} is {value}; it must be more than 0, and finite.")
        check(self.retries >= 0, f"rollout.vllm.retries is {self.retries}; it must be 0 or more.")


@dataclass
class RolloutConfig:
    """What the policy is asked before it learns from its answers."""

    backend: RolloutBackend = RolloutBackend.local
    groups: int = 16
    """Prompts that are learned from in one rollout."""
    attempts: int = 8
    """Answers to each."""
    updates: int = 4
    """Optimizer steps that a rollout is divided into; groups must be divisible by it."""
    max_rounds: int = 4
    """Times that more prompts are asked until there are enough with attempts of different worth."""
    max_lag: int = 1
    """Rollouts that finished groups may wait in the queue when there were more than enough; 0 throws them away."""
    ahead: int = 0
    """1: answers are sampled while the policy learns from those before, with weights that are one rollout older."""
    mask_truncated: bool = False
    """Attempts that a limit cut off teach nothing (overlong filtering); statistics keep them, as wrong."""
    max_idle: int | None = 20
    """Rollouts in a row that give nothing to learn, all attempts of a group being worth the same, before the run saves
    and ends; null never ends it."""
    keep_equal: bool = False
    """Learn from groups whose attempts are all worth the same, too: they teach nothing, but take a place."""
    tool_steps: int = 4
    """Of backend=local: steps that the engine takes for others while an attempt is in a tool; then it waits for it. The
    attempt is not let in before, so that numbers do not depend on the clock. More where a tool takes many steps."""
    noise: float = 0.0
    """Of backend=local: disturb the engine's weights by normal noise of so many standard deviations of each matrix, to
    see what an engine that disagrees with the trainer does to training. An experiment, never a help."""
    exact: bool = False
    """Engine and trainer compute the same log-probabilities to the last bit. Slower."""
    replay_experts: bool = False
    """The trainer sends tokens to the experts that the engine sent them to (router replay)."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self):
        for name in ("groups", "updates", "max_rounds"):
            check(getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}; it must be at least 1.")
        check(self.tool_steps >= 0, f"rollout.tool_steps is {self.tool_steps}; it must be 0 or more.")
        check(self.attempts >= 2, f"rollout.attempts is {self.attempts}; a group is compared within, so at least 2.")
        check(
            self.groups % self.updates == 0,
            f"rollout.groups is {self.groups} and rollout.updates {self.updates}; each update gets equally many "
            "groups, so groups must be divisible by updates.",
        )
        check(0 <= self.noise < math.inf, f"rollout.noise is {self.noise}; it must be 0 (none) or a positive number.")
        check(
            not self.noise or (self.backend is RolloutBackend.local and not self.exact),
            f"rollout.noise is {self.noise}: it disturbs our own engine (rollout.backend=local), and exact=true "
            "forbids any difference. Leave it out.",
        )
        check(self.max_lag >= 0, f"rollout.max_lag is {self.max_lag}; it must be 0 or more.")
        check(
            self.max_idle is None or self.max_idle >= 1,
            f"rollout.max_idle is {self.max_idle}; it must be at least 1, or null to go on however little there is to "
            "learn.",
        )
        check(self.ahead in (0, 1), f"rollout.ahead is {self.ahead}; it must be 0 or 1.")
        if self.backend is RolloutBackend.vllm:
            check(
                bool(self.vllm.urls),
                "rollout.backend is vllm, and rollout.vllm.urls names no server. Start one (docs/rl_vllm.md) and name "
                "it: rollout.vllm.urls=[http://localhost:8000].",
            )
            check(
                self.tool_steps == RolloutConfig.tool_steps,
                f"rollout.tool_steps is {self.tool_steps}, and servers of rollout.backend=vllm never wait for a tool. "
                "Leave it out.",
            )
            for name in ("exact", "replay_experts"):
                value = getattr(self, name)
                check(
                    not value,
                    f"rollout.{name} is true, which vLLM cannot do. Leave it out, or use rollout.backend=local.",
                )


class SamplerKind(Enum):
    difficulty = "difficulty"
    """Prompts whose attempts are likely to be of different worth come first (train/reinforcement/difficulty.py)."""
    uniform = "uniform"
    """All alike, epoch after epoch. Groups of equal attempts teach nothing all the same, and others are asked in their
    place (DAPO's filtering)."""


@dataclass
class SamplerConfig:
    """Which prompts are asked. Times are in rollouts."""

    kind: SamplerKind = SamplerKind.difficulty
    prior: float = 0.5
    """Share of right attempts that is expected of a prompt nobody has tried, where the record names no tier."""
    tier_prior: list[float] = field(default_factory=lambda: [0.9, 0.7, 0.5, 0.3, 0.1])
    """The same for each tier of difficulty that records name, 0 (easy) first."""
    prior_attempts: float = 2.0
    """As how many attempts that expectation counts."""
    tier_gain: list[float] = field(default_factory=list)
    """A curriculum: factor on the probability of each tier's prompts, tier 0 first; [] is 1 for all."""
    decay: float = 0.99
    """What is left, one rollout later, of the weight of what an attempt told: the policy has changed since."""
    floor: float = 0.05
    """Share of draws that are uniform over active prompts, so that none is forgotten."""
    fresh: float = 0.1
    """Share of draws for prompts that were never asked, as long as there are any."""
    quotas: dict[str, float] = field(default_factory=dict)
    """Share of the trained groups that each domain shall have, of their sum: {math: 2, charts: 1}; 0 leaves a domain
    out. {}: by the number of its prompts that are not resting."""
    smoothing: float = 0.3
    """Weight of the newest rollout in the share of useless groups, by which more prompts are asked than needed."""
    max_expansion: float = 3.0
    """At most so many times more; 1 asks no more than needed."""
    margin: float = 0.0
    """Standard deviations of the number of useful groups that are asked beyond its mean. 0 is short in every other
    rollout, and further rounds fill it up; more leaves groups for the next rollout (rollout.max_lag)."""
    rest_after: int = 2
    """Useless groups of one kind in a row (all right, all wrong, all equal, not scored) before a prompt rests. 1 rests
    more, also by chance."""
    rest: int = 50
    """Rollouts of the first rest; each further one is twice as long."""
    max_rest: int = 400
    retire_after: int | None = 4
    """Rests of a prompt that is always right before it retires; null never."""
    audit: float = 0.01
    """Share of draws for retired prompts. One that is no longer all right comes back."""

    def __post_init__(self):
        check(
            0 < self.prior < 1,
            f"sampler.prior is {self.prior}; it must lie between 0 and 1, without them: no group of a prompt that is "
            "surely right, or surely wrong, is useful.",
        )
        for tier, p in enumerate(self.tier_prior):
            check(
                0 < p < 1,
                f"sampler.tier_prior has {p} for tier {tier}; each must lie between 0 and 1, without them.",
            )
        for tier, gain in enumerate(self.tier_gain):
            check(
                0 < gain < math.inf,
                f"sampler.tier_gain has {gain} for tier {tier}; each must be finite and more than 0. To leave prompts "
                "out, leave them out of the data.",
            )
        check(
            not self.tier_gain or len(self.tier_gain) == len(self.tier_prior),
            f"sampler.tier_gain has {len(self.tier_gain)} factors and sampler.tier_prior {len(self.tier_prior)}; give "
            "one for each tier, or [] for no curriculum.",
        )
        check(
            0 < self.prior_attempts < math.inf,
            f"sampler.prior_attempts is {self.prior_attempts}; it must be finite and more than 0.",
        )
        for name in ("decay", "smoothing"):
            value = getattr(self, name)
            check(0 < value <= 1, f"sampler.{name} is {value}; it must be more than 0 and at most 1.")
        for name in ("floor", "fresh", "audit"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"sampler.{name} is {value}; it is a share, from 0 to 1.")
        for domain, share in self.quotas.items():
            check(
                0 <= share < math.inf, f"sampler.quotas gives {domain} {share}; a share must be finite and 0 or more."
            )
        check(
            not self.quotas or sum(self.quotas.values()) > 0,
            "sampler.quotas leaves all domains out; give at least one a share above 0, or {}.",
        )
        check(
            1 <= self.max_expansion < math.inf,
            f"sampler.max_expansion is {self.max_expansion}; it must be finite and at least 1, which asks no more "
            "prompts than needed.",
        )
        check(
            0 <= self.margin < math.inf,
            f"sampler.margin is {self.margin} standard deviations; it must be 0 or more, and finite.",
        )
        for name in ("rest_after", "rest"):
            value = getattr(self, name)
            check(value >= 1, f"sampler.{name} is {value}; it must be at least 1.")
        check(
            self.max_rest >= self.rest,
            f"sampler.max_rest is {self.max_rest} and sampler.rest {self.rest}; the longest rest cannot be shorter "
            "than the first.",
        )
        check(
            self.retire_after is None or self.retire_after >= 1,
            f"sampler.retire_after is {self.retire_after}; it must be at least 1, or null to never retire a prompt.",
        )


@dataclass
class RewardsConfig(RewardLimits):
    """What an attempt is worth: the sum of its parts times their weights."""

    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """`accuracy` is the reward that the question names; the others are in train/rewards/shaping.py."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of parts, by name: {overlong: {length: 4096, cache: 512}}."""
    longest_answer: int = 1000
    """Characters; a longer answer is wrong, and of a bad form, unless it has less than four times as many as the right
    one. It would say everything at once."""

    def __post_init__(self):
        known = [ACCURACY, *PARTS, *COMPARISONS]
        check(
            self.weights.get(ACCURACY, 0) > 0,
            f"rewards.weights.accuracy is {self.weights.get(ACCURACY)}; it must be positive: which prompts are asked, "
            "and which groups are learned from, goes by what is right.",
        )
        for name, weight in self.weights.items():
            check(
                name in known or name.startswith(OWN),
                f"rewards.weights names {name}{suggestion(name, known) or '.'} Parts: {', '.join(known)}, and "
                "python:module.function for one of your own.",
            )
            check(math.isfinite(weight), f"rewards.weights.{name} is {weight}; it must be a finite number.")
            if name in PARTS or name in COMPARISONS:
                check_part(name, self.options.get(name, {}))
        for name in self.options:
            check(
                name != ACCURACY,
                "rewards.options.accuracy would not be read: options of the question's own reward are its record's "
                "`reward_options`.",
            )
            check(
                name in self.weights,
                f"rewards.options.{name} is of a part without a weight. Give rewards.weights.{name}.",
            )
        super().__post_init__()
        check(self.longest_answer >= 1, f"rewards.longest_answer is {self.longest_answer}; it must be at least 1.")


@dataclass
class RecordConfig:
    """What people look at: rollouts.html and the tables of the trackers, from rollouts.jsonl (docs/rl.md)."""

    every: int = 5
    """Of so many rollouts, the first is recorded with its attempts; 0 records none. Numbers are kept of all."""
    groups: int = 4
    """Of a recorded rollout, at most: some that are learned from, and some of every other kind."""
    attempts: int = 6
    """Of a group, at most, on the page and in the trackers: those with the highest reward, and two with the lowest.
    rollouts.jsonl has all."""
    rollouts: int = 40
    """On the page, at most, evenly over the run."""
    zero_gradient_every: int = 50
    """Updates between two tables on the console that say where gradients go; 0 shows one only when something is off.
    zero_gradient.jsonl has all."""
    plots_every: int = 50
    """Updates between two drawings of the run's curves; 0 draws them at its end only."""

    def __post_init__(self):
        for name in ("every", "zero_gradient_every", "plots_every"):
            check(getattr(self, name) >= 0, f"record.{name} is {getattr(self, name)}; it must be 0 (never) or more.")
        for name in ("groups", "rollouts"):
            check(getattr(self, name) >= 1, f"record.{name} is {getattr(self, name)}; it must be at least 1.")
        check(self.attempts >= 3, f"record.attempts is {self.attempts}; two are the worst, so it must be at least 3.")


@dataclass
class RLConfig(TrainingConfig):
    """`ernie rl`: everything it can be told."""

    objective: RLObjectiveConfig = field(default_factory=RLObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    reward: str | None = None
    """For records that name none: see train/rewards, or python:module.function."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    agent: AgentConfig = field(default_factory=AgentConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.objective.kind, ObjectiveKind.rl)
        sampling = self.sampling
        check(
            sampling.temperature > 0,
            f"sampling.temperature is {sampling.temperature}; attempts at a prompt must differ to be compared, and the "
            "likeliest token is drawn from no distribution that could be learned. Use 1.0, or another positive number.",
        )
        check(
            sampling.top_k != 1 and sampling.min_p < 1,
            f"sampling.top_k is {sampling.top_k} and sampling.min_p {sampling.min_p}, which leave the likeliest token "
            "alone: all attempts at a prompt would be the same. Use sampling.top_k=0 and sampling.min_p=0, which leave "
            "all tokens, or other values.",
        )
        check(
            sampling.repetition_penalty == 1,
            f"sampling.repetition_penalty is {sampling.repetition_penalty}; log-probabilities are learned without it, "
            "so it must be 1.0. To discourage repetition, reward it less.",
        )
        check(
            self.data.accumulation == 1,
            f"data.accumulation is {self.data.accumulation}, but an update of `ernie rl` goes through as many rows as "
            "its attempts fill. Leave it out; rollout.groups, attempts and updates say how much that is.",
        )
        self._check_nothing_ignored()
        check(
            self.agent.max_tokens <= self.data.max_tokens,
            f"agent.max_tokens is {self.agent.max_tokens} and data.max_tokens {self.data.max_tokens}: an attempt with "
            "its prompt must fit in one row, or it could not be learned from. Lower the first or raise the second.",
        )
        check(
            self.peft.dropout == 0,
            f"peft.dropout is {self.peft.dropout}: it would make training disagree with the engine about every token. "
            "Use 0.",
        )
        check(
            self.parallel.sequence == 1,
            f"parallel.sequence is {self.parallel.sequence}, and `ernie rl` does not share rows among ranks. Use 1; "
            "parallel.expert and parallel.zero make room.",
        )
        check(
            self.reference.kind is not ReferenceKind.cache,
            "reference.kind=cache holds log-probabilities of records, and attempts are new every time. Use "
            "reference.kind=auto.",
        )
        check(
            not self.mismatch.routing or self.rollout.backend is RolloutBackend.local,
            "mismatch.routing is true, and vLLM does not report the experts of both pools. Set it to false, or use "
            "rollout.backend=local.",
        )
        reference_kind(self.reference, self.peft, needed=self.objective.kl > 0)
        joint = self.parallel.expert > 1 or self.parallel.zero == 3
        check(
            not (self.rollout.ahead and joint and self.rollout.backend is RolloutBackend.local),
            f"rollout.ahead is {self.rollout.ahead}, and with parallel.expert={self.parallel.expert} and "
            f"parallel.zero={self.parallel.zero} a forward pass takes all ranks, so that nothing can be sampled while "
            "the policy learns. Use rollout.ahead=0, or rollout.backend=vllm.",
        )

    def _check_nothing_ignored(self) -> None:
        """Raises UserError: a setting of fine-tuning on which nothing here depends."""
        data, evaluate, agent = self.data, self.evaluate, self.agent
        check(
            data.too_long is TooLong.quarantine,
            f"data.too_long is {data.too_long.value}, and `ernie rl` neither cuts prompts nor shrinks their pictures. "
            "Leave it out; those that are too long fail (`ernie doctor rl ...` names them), so shorten them, or raise "
            "agent.max_tokens and data.max_tokens.",
        )
        check(
            data.shuffle,
            "data.shuffle is false, and the sampler of `ernie rl` always draws prompts at random. Leave it out; "
            "sampler.kind=uniform draws all alike, epoch after epoch.",
        )
        check(
            evaluate.max_new_tokens == EvaluateConfig().max_new_tokens,
            f"evaluate.max_new_tokens is {evaluate.max_new_tokens}, and held-out questions are answered as in a "
            "rollout. Leave it out; sampling.max_new_tokens is for both.",
        )
        check(
            evaluate.sheet in (0, EvaluateConfig.sheet),
            f"evaluate.sheet is {evaluate.sheet}, and `ernie rl` draws no sheet of held-out pictures. Leave it out; "
            "rollouts.html shows what was asked and answered.",
        )
        for key in ("input_filters", "output_filters"):
            check(
                not getattr(agent, key),
                f"agent.{key} is {getattr(agent, key)}, and attempts are not filtered: they are learned from as they "
                "were sampled. Leave it out; what must not be written is worth less by a part of the reward "
                "(rewards.weights).",
            )
        for key, set_to, default, meaning in (
            ("lookahead", data.lookahead, DataConfig.lookahead, "from how many records a row is filled"),
            ("workers", data.workers, DataConfig.workers, "how many processes read records ahead"),
            ("prefetch", data.prefetch, DataConfig.prefetch, "how many rows are packed ahead"),
            ("cache_gib", data.cache_gib, DataConfig.cache_gib, "how many encoded records are kept"),
            ("cache_folder", data.cache_folder, DataConfig.cache_folder, "where decoded pixels are kept"),
            ("slow_s", data.slow_s, DataConfig.slow_s, "when a record that is being read ahead is named"),
            ("dead_s", data.dead_s, DataConfig.dead_s, "when a record that is being read ahead is given up"),
            ("min_image_pixels", data.min_image_pixels, DataConfig.min_image_pixels, "how far pictures may shrink"),
        ):
            check(
                set_to == default,
                f"data.{key} is {set_to}, and would do nothing: it says {meaning}, and `ernie rl` reads prompts "
                "as they are drawn and fills rows with attempts. Leave it out.",
            )
        if isinstance(data, FilesData):
            default_of = {"modality_ratio": {}, "mix": FilesData.mix, "stop": FilesData.stop}
            shares = [
                *(f"data.sets.{name}.weight" for name, one in data.sets.items() if one.weight != 1),
                *(f"data.sets.{name}.modality" for name, one in data.sets.items() if one.modality is not None),
                *(f"data.{key}" for key in ("modality_ratio", "mix", "stop") if getattr(data, key) != default_of[key]),
            ]
            check(
                not shares,
                f"{shares[0] if shares else ''} would do nothing: `ernie rl` draws prompts by difficulty and domain. "
                "Leave it out; sampler.quotas sets the shares of domains, which are the sets where records name no "
                "`domain`.",
            )
