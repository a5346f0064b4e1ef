"""Typed schemas of `ernie rl`: what is rolled out, how it is judged, and how that becomes a loss."""

import math
from dataclasses import dataclass, field
from enum import Enum

from ernie_model.inference.engine import EngineSettings
from train.config import ObjectiveKind, TrainingConfig, check, check_kind
from train.dpo_config import ReferenceConfig
from train.inference_config import AgentConfig, SamplingConfig


class PolicyLoss(Enum):
    """Formulas and sources: train/objectives/policy_gradient.py."""

    clip = "clip"
    """PPO's: min(r A, clip(r) A). With ratio=sequence GSPO, with ratio=token GRPO."""
    cispo = "cispo"
    sapo = "sapo"
    gmpo = "gmpo"


class Ratio(Enum):
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
    icepop_sequence = "icepop_sequence"
    """icepop of the geometric mean over the attempt (ERNIE 5.0, equation 2)."""
    tis = "tis"
    """min(k, upper bound)."""
    mis = "mis"
    """k up to the upper bound, 0 above."""


class AdvantageKind(Enum):
    group_std = "group_std"
    """(R - mean of the group) / its standard deviation."""
    group_mean = "group_mean"
    """R - mean of the group (Dr. GRPO)."""
    rloo = "rloo"
    batch_std = "batch_std"
    """R - mean of the group, over the standard deviation of all of the rollout."""


@dataclass
class RLObjectiveConfig:
    """How log-probabilities and advantages become a loss."""

    kind: ObjectiveKind = ObjectiveKind.rl
    loss: PolicyLoss = PolicyLoss.clip
    ratio: Ratio = Ratio.sequence
    aggregate: Aggregate = Aggregate.sequence
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    correction: Correction = Correction.icepop
    band: list[float] = field(default_factory=lambda: [0.5, 5.0])
    """Smallest and largest k; [0, .inf] cuts nothing."""
    kl: float = 0.0
    """Weight of the divergence from the reference (k3); 0 needs no reference."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    advantage: AdvantageKind = AdvantageKind.group_std

    def __post_init__(self):
        check(0 <= self.clip_low < 1, f"objective.clip_low is {self.clip_low}; it must be at least 0 and less than 1.")
        check(
            0 <= self.clip_high < math.inf,
            f"objective.clip_high is {self.clip_high}; it must be 0 or more, and finite.",
        )


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
    exact: bool = False
    """Engine and trainer compute the same log-probabilities to the last bit. Slower."""
    replay_experts: bool = False
    """The trainer sends tokens to the experts that the engine sent them to (router replay)."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self):
        for name in ("groups", "updates", "max_rounds"):
            check(getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}; it must be at least 1.")
        check(self.attempts >= 2, f"rollout.attempts is {self.attempts}; a group is compared within, so at least 2.")
        check(
            self.groups % self.updates == 0,
            f"rollout.groups is {self.groups} and rollout.updates {self.updates}; each update gets equally many "
            "groups, so groups must be divisible by updates.",
        )
        check(self.max_lag >= 0, f"rollout.max_lag is {self.max_lag}; it must be 0 or more.")
        check(self.ahead in (0, 1), f"rollout.ahead is {self.ahead}; it must be 0 or 1.")


class SamplerKind(Enum):
    difficulty = "difficulty"
    """Prompts whose attempts are likely to be of different worth come first (reference 3.4)."""
    uniform = "uniform"
    """All alike, epoch after epoch; groups of equal attempts are left out all the same."""


@dataclass
class SamplerConfig:
    """Which prompts are asked."""

    kind: SamplerKind = SamplerKind.difficulty


@dataclass
class RewardsConfig:
    """What an attempt is worth: the sum of its parts times their weights."""

    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """`accuracy` is the reward that the question names; others by their names in train/rewards."""
    workers: int = 1
    """Processes that compute rewards; 0 computes them in the training process, without limits."""


@dataclass
class RLConfig(TrainingConfig):
    """`ernie rl`: everything it can be told."""

    objective: RLObjectiveConfig = field(default_factory=RLObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    reward: str | None = None
    """For records that name none: see train/rewards, or python:module.function."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    agent: AgentConfig = field(default_factory=AgentConfig)

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
            sampling.repetition_penalty == 1,
            f"sampling.repetition_penalty is {sampling.repetition_penalty}; log-probabilities are learned without it, "
            "so it must be 1.0. To discourage repetition, reward it less.",
        )
