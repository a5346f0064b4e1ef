"""Typed schemas of `ernie dpo`: what a pair of answers is worth, and what the policy is compared with."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from enum import Enum

from train.config import FilesData, ObjectiveKind, PeftConfig, PeftKind, TrainingConfig, check, check_kind


class PreferenceLoss(Enum):
    """Formulas and sources: train/objectives/preference.py, train/objectives/kto.py."""

    sigmoid = "sigmoid"
    """DPO; with objective.label_smoothing cDPO."""
    hinge = "hinge"
    ipo = "ipo"
    """With log-ratios per token."""
    ipo_sum = "ipo_sum"
    """With log-ratios of whole answers."""
    robust = "robust"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    sigmoid_norm = "sigmoid_norm"
    """DPO with log-ratios per token."""
    dpop = "dpop"
    kto_pair = "kto_pair"
    simpo = "simpo"
    odds_ratio = "or"
    """ORPO's term alone."""
    orpo = "orpo"
    """NLL per token + beta x or."""
    kto = "kto"
    """For answers labelled good or bad, without pairs."""
    apo_zero_unpaired = "apo_zero_unpaired"
    """The same, without an estimate of the KL divergence."""

    @property
    def unpaired(self) -> bool:
        return self in (PreferenceLoss.kto, PreferenceLoss.apo_zero_unpaired)

    @property
    def has_reference(self) -> bool:
        return self not in (PreferenceLoss.simpo, PreferenceLoss.odds_ratio, PreferenceLoss.orpo)


# What each loss reads beside beta. A setting that no chosen loss reads would do nothing, and is refused.
_SUMS = ("normalize_logps", "ld_alpha")
_DELTA = ("reference_free", "f_divergence_type", *_SUMS)
_LABELS = ("desirable_weight", "undesirable_weight")
READS: dict[PreferenceLoss, tuple[str, ...]] = {
    PreferenceLoss.sigmoid: ("label_smoothing", "offset_alpha", *_DELTA),
    PreferenceLoss.hinge: _DELTA,
    PreferenceLoss.ipo: ("reference_free",),
    PreferenceLoss.ipo_sum: ("reference_free", *_SUMS),
    PreferenceLoss.robust: ("label_smoothing", *_DELTA),
    PreferenceLoss.exo_pair: ("label_smoothing", *_DELTA),
    PreferenceLoss.nca_pair: _SUMS,
    PreferenceLoss.bco_pair: ("bco_momentum", *_SUMS),
    PreferenceLoss.sppo_hard: _SUMS,
    PreferenceLoss.apo_zero: _SUMS,
    PreferenceLoss.apo_down: _SUMS,
    PreferenceLoss.discopop: ("discopop_tau", *_DELTA),
    PreferenceLoss.sigmoid_norm: ("label_smoothing", "reference_free"),
    PreferenceLoss.dpop: ("dpop_lambda", "dpop_outside", *_SUMS),
    PreferenceLoss.kto_pair: _SUMS,
    PreferenceLoss.simpo: ("simpo_gamma", "label_smoothing", "reference_free"),
    PreferenceLoss.odds_ratio: ("reference_free",),
    PreferenceLoss.orpo: ("reference_free",),
    PreferenceLoss.kto: _LABELS,
    PreferenceLoss.apo_zero_unpaired: _LABELS,
}


class FDivergence(Enum):
    """Between policy and reference; docs/dpo.md has what it makes of a log-ratio."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js_divergence = "js_divergence"
    alpha_divergence = "alpha_divergence"


class Corrupt(Enum):
    """See data.corrupt.Corrupt."""

    crop = "crop"
    noise = "noise"
    blank = "blank"


class ReferenceKind(Enum):
    auto = "auto"
    """none where the loss needs no reference; adapters_off with an adapter that starts anew; otherwise copy."""
    copy = "copy"
    """A second model, with the weights that training starts from or those of `checkpoint`."""
    adapters_off = "adapters_off"
    """The same model without the adapter that trains."""
    cache = "cache"
    """Log-probabilities of every record, computed before the first update and kept on disk."""
    none = "none"


class ReferenceUpdate(Enum):
    frozen = "frozen"
    """The reference stays what it is."""
    ema = "ema"
    """Every so many updates, reference = (1 - mix) * reference + mix * policy."""
    sync = "sync"
    """Every so many updates, the reference becomes the policy."""


@dataclass
class DPOObjectiveConfig:
    """What is minimised: the mean over pairs of

        pref_loss_ratio x preference loss + added losses + sft_loss_ratio x NLL per token of the chosen answer + mDPO's

    Names are ERNIEKit's, and TRL's where it has none (docs/dpo.md has the table).
    """

    kind: ObjectiveKind = ObjectiveKind.dpo
    preference_loss_type: str = "sigmoid"
    """A value of PreferenceLoss."""
    beta: float = 0.1
    """How dear it is to leave the reference; what log-ratios are multiplied by."""
    pref_loss_ratio: float = 1.0
    """Weight of the preference loss."""
    added_losses: dict[str, float] = field(default_factory=dict)
    """More preference losses, with their weights: {bco_pair: 0.2}."""
    sft_loss_ratio: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen answer's tokens."""
    reference_free: bool = False
    """Use log-probabilities where the loss has log-ratios; no reference is needed."""
    label_smoothing: float = 0.0
    """Share of pairs that may be the wrong way round (sigmoid, sigmoid_norm, robust, exo_pair, simpo)."""
    normalize_logps: bool = False
    """Multiply an answer's log-ratio by (mean length of both answers / its own)."""
    ld_alpha: float | None = None
    """Weight of an answer's tokens beyond the length of the other one; null is 1."""
    ld_policy_only: bool = False
    """ld_alpha is for the policy's log-probabilities, and not for the reference's."""
    f_divergence_type: FDivergence = FDivergence.reverse_kl
    """What holds the policy near the reference (sigmoid, hinge, robust, exo_pair, discopop)."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; at 1 it is reverse_kl."""
    offset_alpha: float = 0.0
    """sigmoid asks for a margin of offset_alpha x log(score of chosen - score of rejected). Every pair needs scores."""
    simpo_gamma: float = 0.5
    """simpo asks for this margin, after beta."""
    dpop_lambda: float = 50.0
    """dpop: weight of what the chosen answer's log-probability lost."""
    dpop_outside: bool = False
    """dpop: the penalty is added to the loss as it is, as in ERNIEKit, and not inside of beta and sigmoid."""
    discopop_tau: float = 0.05
    bco_momentum: float | None = None
    """bco_pair: measure rewards against their moving mean over updates, in which the last update counts
    1 - bco_momentum; null: against 0."""
    mdpo_conditional: float = 0.0
    """Weight of mDPO's loss that prefers the chosen answer with its pictures over the same with corrupted ones."""
    mdpo_corrupt: Corrupt = Corrupt.crop
    """How pictures are corrupted for it (data/corrupt.py)."""
    mdpo_keep: list[float] = field(default_factory=lambda: [0.0, 0.2])
    """Smallest and largest share of a picture's area that a crop keeps."""
    mdpo_anchor: float = 0.0
    """Weight of mDPO's loss that holds the chosen answer above the reference."""
    mdpo_delta: float = 0.0
    """By how much, as a reward."""
    desirable_weight: float = 1.0
    """Weight of answers labelled good (kto, apo_zero_unpaired),"""
    undesirable_weight: float = 1.0
    """and bad."""

    def __post_init__(self):
        losses = self.losses()
        for name in ("beta", "pref_loss_ratio", "discopop_tau", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"objective.{name} is {value}; it must be a positive number.")
        for name in (
            "sft_loss_ratio",
            "offset_alpha",
            "simpo_gamma",
            "dpop_lambda",
            "mdpo_conditional",
            "mdpo_anchor",
        ):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"objective.{name} is {value}; it must be 0 or a positive number.")
        for name in ("f_alpha_divergence_coef", "mdpo_delta"):
            check(math.isfinite(getattr(self, name)), f"objective.{name} is {getattr(self, name)}; it must be finite.")
        check(
            0 <= self.label_smoothing < 0.5,
            f"objective.label_smoothing is {self.label_smoothing}; it must lie in 0..0.5, 0.5 excluded: there labels "
            "say nothing.",
        )
        check(
            self.ld_alpha is None or 0 <= self.ld_alpha <= 1,
            f"objective.ld_alpha is {self.ld_alpha}; it must lie in 0..1, or be null.",
        )
        check(
            len(self.mdpo_keep) == 2 and 0 <= self.mdpo_keep[0] <= self.mdpo_keep[1] <= 1,
            f"objective.mdpo_keep is {self.mdpo_keep}; it must be two shares of an area, [smallest, largest], in 0..1.",
        )
        check(
            self.bco_momentum is None or 0 <= self.bco_momentum < 1,
            f"objective.bco_momentum is {self.bco_momentum}; it must lie in 0..1, 1 excluded, or be null.",
        )
        self._check_read(losses)
        if PreferenceLoss.exo_pair in losses:
            check(
                self.label_smoothing > 0,
                "objective.label_smoothing is 0, but exo_pair takes its logarithm. Set it, for example "
                "objective.label_smoothing=0.001.",
            )

    def losses(self) -> dict[PreferenceLoss, float]:
        """Every preference loss with its weight.

        Raises:
            UserError: a name that there isn't, a weight that isn't positive, a loss twice, pairs and labels together.
        """
        first = _loss("objective.preference_loss_type", self.preference_loss_type)
        losses = {first: self.pref_loss_ratio}
        for name, weight in self.added_losses.items():
            key = f"objective.added_losses.{name}"
            loss = _loss(key, name)
            check(loss not in losses, f"{key}: {name} is objective.preference_loss_type already; set pref_loss_ratio.")
            check(0 < weight < math.inf, f"{key} is {weight}; it must be a positive number.")
            losses[loss] = weight
        unpaired = [loss.value for loss in losses if loss.unpaired]
        check(
            not unpaired or len(losses) == 1,
            f"objective.added_losses: {', '.join(loss.value for loss in losses)} cannot be added up, because "
            f"{', '.join(unpaired)} is for answers with a label, and takes no other beside it.",
        )
        return losses

    def _check_read(self, losses: dict[PreferenceLoss, float]) -> None:
        """Refuse a setting that would do nothing, or that a loss has no meaning with."""
        names = " and ".join(loss.value for loss in losses)
        reads = [READS[loss] for loss in losses]
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for key in sorted({key for keys in READS.values() for key in keys}):
            value = getattr(self, key)
            shown = value.value if isinstance(value, Enum) else value
            readers = ", ".join(loss.value for loss, keys in READS.items() if key in keys)
            check(
                value == default[key] or any(key in keys for keys in reads),
                f"objective.{key} is {shown}, but {names} does not use it. Leave it out, or choose one of {readers} "
                "as objective.preference_loss_type.",
            )
        for loss, keys in zip(losses, reads, strict=True):
            check(
                not self.reference_free or "reference_free" in keys,
                f"objective.reference_free is true, but {loss.value} looks at what one answer gained over the "
                "reference. Set objective.reference_free=false, or choose a loss of margins, such as sigmoid.",
            )
        check(
            not self.reference_free or self.f_divergence_type is FDivergence.reverse_kl,
            f"objective.f_divergence_type is {self.f_divergence_type.value}, a divergence from a reference that "
            "objective.reference_free=true leaves out. Give one of the two.",
        )
        check(
            not self.reference_free or self.mdpo_anchor == 0,
            f"objective.mdpo_anchor is {self.mdpo_anchor}, but it compares with the reference that "
            "objective.reference_free=true leaves out. Give one of the two.",
        )
        check(
            self.ld_alpha is None or not self.normalize_logps,
            "objective.ld_alpha and objective.normalize_logps both correct for length. Give one of the two.",
        )
        for key, needs, given in (
            ("ld_policy_only", "ld_alpha", self.ld_alpha is not None),
            ("mdpo_delta", "mdpo_anchor", self.mdpo_anchor > 0),
            (
                "f_alpha_divergence_coef",
                "f_divergence_type=alpha_divergence",
                self.f_divergence_type is FDivergence.alpha_divergence,
            ),
        ):
            value = getattr(self, key)
            check(
                value == default[key] or given,
                f"objective.{key} is {value}, but it does nothing without objective.{needs}. Give that too, or leave "
                "it out.",
            )
        if any(loss.unpaired for loss in losses):
            for key in ("sft_loss_ratio", "mdpo_conditional", "mdpo_anchor"):
                value = getattr(self, key)
                check(value == 0, f"objective.{key} is {value}, but {names} has no pairs. Set it to 0.")


def needs_reference(config: DPOObjectiveConfig) -> bool:
    """Does the loss compare with log-probabilities of a reference?"""
    ratios = any(loss.has_reference for loss in config.losses()) or config.mdpo_conditional > 0
    return config.mdpo_anchor > 0 or (ratios and not config.reference_free)


def _loss(key: str, name: str) -> PreferenceLoss:
    known = [loss.value for loss in PreferenceLoss]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "."
    check(name in known, f"{key}: there is no loss {name}{hint} There are {', '.join(known)}.")
    return PreferenceLoss(name)


@dataclass
class ReferenceConfig:
    """The policy that log-probabilities are compared with (train/reference.py)."""

    kind: ReferenceKind = ReferenceKind.auto
    checkpoint: str | None = None
    """Local folder or hub id of the reference's weights; null: those that training starts from."""
    update: ReferenceUpdate = ReferenceUpdate.frozen
    every: int | None = None
    """Updates of the policy between two of the reference, for ema and sync."""
    mix: float | None = None
    """The policy's share in an update of the reference, for ema."""
    cache_folder: str | None = None
    """Where kind=cache keeps log-probabilities; runs may share it. null: reference/ in the run folder."""

    def __post_init__(self):
        kind, moving = self.kind.value, self.update is not ReferenceUpdate.frozen
        check(
            self.checkpoint is None or self.kind in (ReferenceKind.auto, ReferenceKind.copy),
            f"reference.checkpoint={self.checkpoint} would not be read: reference.kind is {kind}. Use "
            "reference.kind=copy, or leave the checkpoint out.",
        )
        check(
            not moving or self.kind in (ReferenceKind.auto, ReferenceKind.copy),
            f"reference.update={self.update.value} changes the weights of the reference, and reference.kind={kind} has "
            "none of its own. Use reference.kind=copy, or reference.update=frozen.",
        )
        check(
            self.cache_folder is None or self.kind is ReferenceKind.cache,
            f"reference.cache_folder={self.cache_folder} would not be used: reference.kind is {kind}. Use "
            "reference.kind=cache, or leave the folder out.",
        )
        every = "null" if self.every is None else self.every
        check(
            moving == (self.every is not None),
            f"reference.every is {every} and reference.update {self.update.value}; "
            + ("say after how many updates, for example 100." if moving else "a frozen reference has no use for it."),
        )
        check(self.every is None or self.every >= 1, f"reference.every is {self.every}; it must be 1 or more.")
        ema = self.update is ReferenceUpdate.ema
        check(
            ema == (self.mix is not None),
            f"reference.mix is {self.mix} and reference.update {self.update.value}; "
            + ("say which share of the policy is mixed in, for example 0.01." if ema else "only ema has a use for it."),
        )
        check(
            self.mix is None or 0 < self.mix < 1,
            f"reference.mix is {self.mix}; it must lie between 0 and 1. reference.update=sync takes the policy whole.",
        )


def reference_kind(config: ReferenceConfig, peft: PeftConfig, *, needed: bool) -> ReferenceKind:
    """What `auto` stands for, or the kind that was asked for.

    Args:
        needed: the loss compares with a reference.

    Raises:
        UserError: the adapters are such that this kind would be another policy than the one that training starts from;
            the loss needs a reference, and there is to be none, or the other way round.
    """
    lora, kind = peft.kind is PeftKind.lora, config.kind
    check(
        not lora or config.update is not ReferenceUpdate.ema,
        "reference.update=ema averages weights, and the average of two adapters B A is not the product of the averages "
        "of B and A. With peft=lora use reference.update=sync, or frozen.",
    )
    own = config.checkpoint is not None or config.update is not ReferenceUpdate.frozen
    check(
        needed or (kind in (ReferenceKind.auto, ReferenceKind.none) and not own),
        f"reference.{_asked(config)} would do nothing: the loss of these settings compares with no reference. Leave "
        "it out (reference.kind=auto), or choose a loss with one, such as objective.preference_loss_type=sigmoid.",
    )
    check(
        not needed or kind is not ReferenceKind.none,
        "reference.kind is none, but the loss compares with a reference. Use reference.kind=auto, or a loss that needs "
        "none.",
    )
    if kind is ReferenceKind.auto:
        if not needed:
            return ReferenceKind.none
        off = lora and peft.init_from is None and not own
        return ReferenceKind.adapters_off if off else ReferenceKind.copy
    if kind is ReferenceKind.adapters_off:
        check(lora, "reference.kind=adapters_off needs an adapter to turn off: peft=lora. Or use reference.kind=copy.")
        check(
            peft.init_from is None,
            f"reference.kind=adapters_off would be the model without peft.init_from={peft.init_from}, and training "
            "starts with it. To train a new adapter on top, give the old one as peft.frozen={start: FOLDER}; to go on "
            "with the old one, use reference.kind=copy or cache.",
        )
    return kind


def _asked(config: ReferenceConfig) -> str:
    if config.checkpoint is not None:
        return f"checkpoint={config.checkpoint}"
    if config.update is not ReferenceUpdate.frozen:
        return f"update={config.update.value}"
    return f"kind={config.kind.value}"


@dataclass
class DPOConfig(TrainingConfig):
    """`ernie dpo`: everything it can be told."""

    objective: DPOObjectiveConfig = field(default_factory=DPOObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.objective.kind, ObjectiveKind.dpo)
        reference_kind(self.reference, self.peft, needed=needs_reference(self.objective))
        if self.reference.kind is ReferenceKind.cache and isinstance(self.data, FilesData):
            sets = {"data": self.data} | {f"data.sets.{name}": one for name, one in self.data.sets.items()}
            for name, one in sets.items():
                check(
                    not one.streaming,
                    f"reference.kind=cache goes through all records before the first update, and {name}.streaming is "
                    f"true: a stream has no end. Use {name}.streaming=false, or reference.kind=copy.",
                )
