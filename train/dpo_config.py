"""Typed schemas of `ernie dpo`: what a pair of answers is worth, and what the policy is compared with."""

from dataclasses import dataclass, field
from enum import Enum

from train.config import ObjectiveKind, TrainingConfig, check_kind


class ReferenceKind(Enum):
    auto = "auto"
    """none where the loss needs no reference, adapters_off with adapters, otherwise copy."""
    copy = "copy"
    """A second model with the weights that training starts from."""
    adapters_off = "adapters_off"
    """The same model without the adapter that trains."""
    cache = "cache"
    """Log-probabilities of every record, computed once before the first update and kept on disk."""
    none = "none"


@dataclass
class DPOObjectiveConfig:
    """What is minimised."""

    kind: ObjectiveKind = ObjectiveKind.dpo


@dataclass
class ReferenceConfig:
    """The frozen policy that log-probabilities are compared with (train/reference.py)."""

    kind: ReferenceKind = ReferenceKind.auto


@dataclass
class DPOConfig(TrainingConfig):
    """`ernie dpo`: everything it can be told."""

    objective: DPOObjectiveConfig = field(default_factory=DPOObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.objective.kind, ObjectiveKind.dpo)
