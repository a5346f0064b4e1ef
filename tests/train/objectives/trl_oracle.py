"""TRL's own loss functions, on log-probabilities that are written down, without a model and without its trainers.

Their methods read attributes of a trainer that is never made; here they get those they read, and no others.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from tests.train.objectives.rows import Said
from train.dpo_config import DPOObjectiveConfig, FDivergence, PreferenceLoss

Pairs = Sequence[tuple[Said, Said]]

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
)


def _rows(answers: Sequence[Said], which: str, dtype: torch.dtype) -> Tensor:
    """(B, L): log-probabilities, padded with 0 on the right."""
    tokens = max(len(said.policy) for said in answers)
    rows = [getattr(said, which) or [0.0] * len(said.policy) for said in answers]
    return torch.tensor([[*row, *[0.0] * (tokens - len(row))] for row in rows], dtype=dtype)


def _inputs(answers: Sequence[Said]) -> dict[str, Tensor]:
    """A prompt of one token, then the answers."""
    tokens = max(len(said.policy) for said in answers)
    mask = torch.tensor([[0] + [1] * len(said.policy) + [0] * (tokens - len(said.policy)) for said in answers])
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask}


def _model(logprob_BL: Tensor, **attributes: Any) -> Any:
    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, **inputs: Any) -> SimpleNamespace:
            zeros = torch.zeros_like(logprob_BL)
            return SimpleNamespace(
                log_probs=logprob_BL,
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
                log_sum_sq_probs=zeros,
                aux_loss=None,
                **attributes,
            )

    return Model()


def _trainer(cls: Any, **attributes: Any) -> Any:
    trainer = cls.__new__(cls)
    trainer.__dict__ |= {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": False,
        **attributes,
    }
    return trainer


def loss_of(config: DPOObjectiveConfig, chosen: Said, rejected: Said) -> float | None:
    """What TRL computes of a pair with these settings; None: it cannot be told to."""
    losses = {loss.value: weight for loss, weight in config.losses().items()}
    (first, weight), *more = losses.items()
    pair = [(chosen, rejected)]
    if config.mdpo_conditional or config.mdpo_anchor or config.normalize_logps or config.offset_alpha:
        return None
    if first in ("simpo", "orpo") or config.reference_free:
        if more or weight != 1:
            return None
        if first == "orpo":
            return orpo(pair, config.beta)
        likelihood = -config.sft_loss_ratio * sum(chosen.policy) / len(chosen.policy)
        keys = {name: getattr(config, name) for name in ("beta", "label_smoothing", "simpo_gamma")}
        if first in ("sigmoid", "hinge", "simpo", "ipo"):
            return likelihood + cpo(pair, first, average=first in ("simpo", "ipo"), **keys)
        return None
    smoothed = {"robust", "exo_pair"}  # elsewhere it does nothing
    if config.label_smoothing and not losses.keys() <= smoothed or config.ld_policy_only:
        return None
    known = {loss.value for loss in PreferenceLoss if loss.has_reference and not loss.unpaired}
    if not losses.keys() <= known - {"dpop", "kto_pair", "ipo_sum"}:
        return None
    if config.sft_loss_ratio:
        losses["sft"] = config.sft_loss_ratio
    alpha = config.f_divergence_type is FDivergence.alpha_divergence  # which it cannot do in float64
    return dpo(
        pair,
        losses,
        dtype=torch.float32 if alpha else torch.float64,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        ld_alpha=config.ld_alpha,
        f_divergence_type=config.f_divergence_type.value,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
    )


def dpo(pairs: Pairs, losses: dict[str, float], *, dtype: torch.dtype = torch.float64, **keys: Any) -> float:
    """`DPOTrainer._compute_loss`; `keys` are those of DPOConfig."""
    answers = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    model, reference = (_model(_rows(answers, which, dtype)) for which in ("policy", "reference"))
    settings = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    settings |= {"f_alpha_divergence_coef": 0.5, "use_weighting": False} | keys
    trainer = _trainer(
        DPOTrainer,
        model=model,
        ref_model=reference,
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        **settings,
    )
    return float(trainer._compute_loss(model, _inputs(answers), False))


def kto(labelled: Sequence[tuple[Said, bool]], kl: float, loss: str, weights: tuple[float, float]) -> float:
    """`KTOTrainer._compute_loss`, with the mean of mismatched log-ratios given."""
    answers = [said for said, _ in labelled]
    model, reference = (_model(_rows(answers, which, torch.float64)) for which in ("policy", "reference"))
    trainer = _trainer(
        KTOTrainer,
        model=model,
        ref_model=reference,
        beta=0.1,
        loss_type=loss,
        calculate_KL=loss == "kto",
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    trainer._compute_kl_logps = lambda asked, batch: torch.tensor([kl if asked is model else 0.0], dtype=torch.float64)
    inputs = _inputs(answers) | {"label": torch.tensor([wanted for _, wanted in labelled])}
    return float(trainer._compute_loss(model, inputs, False))


def cpo(pairs: Pairs, loss: str, *, average: bool, **keys: Any) -> float:
    """`CPOTrainer.cpo_loss`, without the likelihood that its trainer adds."""
    settings = {"beta": 0.1, "simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0} | keys
    trainer = _trainer(CPOTrainer, loss_type=loss, **settings)
    return float(trainer.cpo_loss(*_sums(pairs, average))[0].mean())


def orpo(pairs: Pairs, beta: float = 0.1) -> float:
    """`ORPOTrainer.odds_ratio_loss`, whose sign is the other one, and the likelihood that its trainer adds."""
    chosen, rejected = _sums(pairs, average=True)
    ratio, *_ = _trainer(ORPOTrainer, beta=beta).odds_ratio_loss(chosen, rejected)
    return float((-chosen - ratio).mean())


def _sums(pairs: Pairs, average: bool) -> list[Tensor]:
    sums = [
        [sum(said.policy) / (len(said.policy) if average else 1) for said in side] for side in zip(*pairs, strict=True)
    ]
    return [torch.tensor(side, dtype=torch.float64) for side in sums]
