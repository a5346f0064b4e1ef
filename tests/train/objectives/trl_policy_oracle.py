"""TRL's own policy gradients, on log-probabilities that are written down, without a model and without its trainers.

`GRPOTrainer._compute_loss` reads attributes of a trainer that is never made; here it gets those it reads, no others.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.train.objectives.attempts import Attempt
from train.rl_config import Aggregate, Correction, KLEstimator, PolicyLoss, Ratio, RLObjectiveConfig

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=True,
    gather=lambda value: value,
    gather_for_metrics=lambda value: value,
    reduce=lambda value, reduction: value,
)

AGGREGATES = {
    Aggregate.sequence: "grpo",
    Aggregate.token: "dapo",
    Aggregate.length: "dr_grpo",
    Aggregate.sequence_sum: "luspo",
}
LEVELS = {  # vllm_importance_sampling_mode, and its bounds by ours
    Correction.icepop: ("token_mask", True),
    Correction.tis: ("token_truncate", False),
    Correction.mis: ("token_mask", False),
    Correction.tis_product: ("sequence_truncate", False),
    Correction.mis_product: ("sequence_mask", False),
}


def loss_type(config: RLObjectiveConfig) -> str | None:
    if config.loss is PolicyLoss.clip:
        return AGGREGATES[config.aggregate]
    if config.loss is PolicyLoss.cispo:
        return "cispo" if config.aggregate is Aggregate.token else None
    if config.aggregate is not Aggregate.sequence:
        return None
    return "sapo" if config.loss is PolicyLoss.sapo else "grpo"


def learned(config: RLObjectiveConfig, attempts: Sequence[Attempt]) -> tuple[float, list[list[float]]] | None:
    """Loss, and its gradient at each token of each attempt; None: TRL cannot be told to compute this.

    It has no token form of GSPO: where tokens of an attempt differ in weight, its gradients are others than ours.
    """
    kind = loss_type(config)
    if kind is None or config.entropy or (config.correction is not Correction.none and config.correction not in LEVELS):
        return None
    if config.kl and (config.kl_estimator is not KLEstimator.k3 or (config.kl_unbiased and config.has_sequence_ratio)):
        return None
    gmpo = config.loss is PolicyLoss.gmpo
    if gmpo and (config.correction is not Correction.none or config.opsm_delta is not None or config.kl_unbiased):
        return None

    tokens = max(len(attempt.policy) for attempt in attempts)

    def padded(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[*row, *[0.0] * (tokens - len(row))] for row in rows], dtype=torch.float64)

    logprob_BL = padded([attempt.policy for attempt in attempts]).requires_grad_()
    old_BL = padded([attempt.before for attempt in attempts])
    mask_BL = padded([[1.0] * len(attempt.policy) for attempt in attempts])
    tool_BL = padded([list(map(float, attempt.mask)) for attempt in attempts])
    engine_BL = padded([attempt.engine or attempt.before for attempt in attempts])
    ones_B1 = torch.ones(len(attempts), 1, dtype=torch.int64)
    inputs: dict[str, Tensor] = {
        "prompt_ids": ones_B1,
        "prompt_mask": ones_B1,
        "completion_ids": mask_BL.long(),
        "completion_mask": mask_BL,
        "tool_mask": tool_BL,
        "advantages": torch.tensor([attempt.advantage for attempt in attempts], dtype=torch.float64),
        "old_per_token_logps": old_BL,
        "sampling_per_token_logps": engine_BL,
        "ref_per_token_logps": padded([attempt.reference or attempt.before for attempt in attempts]),
        "num_items_in_batch": tool_BL.sum(),
    }
    if config.correction is not Correction.none:
        inputs["importance_sampling_ratio"] = importance(config, (old_BL - engine_BL) * tool_BL)
    low, high = (config.gmpo_clip, config.gmpo_clip) if gmpo else config.clip
    trainer: Any = (GMPOTrainer if gmpo else GRPOTrainer).__new__(GMPOTrainer if gmpo else GRPOTrainer)
    trainer.__dict__ |= {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": config.opsm_delta,
        "importance_sampling_level": "sequence" if config.ratio is Ratio.sequence else "token",
        "beta": config.kl,
        "loss_type": kind,
        "epsilon_low": low,
        "epsilon_high": config.cispo_cap if config.loss is PolicyLoss.cispo else high,
        "use_vllm": config.correction is not Correction.none,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": config.max_length,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(
            delta=config.dual_clip,
            use_bias_correction_kl=config.kl_unbiased,
            steps_per_generation=1,
            sapo_temperature_pos=config.sapo_positive,
            sapo_temperature_neg=config.sapo_negative,
        ),
    }
    answer = (logprob_BL, torch.zeros_like(old_BL), None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: answer
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    assert logprob_BL.grad is not None
    rows = zip(logprob_BL.grad.tolist(), attempts, strict=True)
    return loss.item(), [row[: len(attempt.policy)] for row, attempt in rows]


def importance(config: RLObjectiveConfig, log_k_BL: Tensor) -> Tensor:
    """`inputs["importance_sampling_ratio"]`, as `GRPOTrainer._generate_and_score_completions` makes it."""
    mode, lower = LEVELS[config.correction]
    low, high = config.bounds
    if mode.startswith("sequence"):
        log_k_BL = log_k_BL.sum(-1, keepdim=True)
    k_BL = log_k_BL.exp()
    if mode.endswith("truncate"):
        return k_BL.clamp(max=high)
    return k_BL.masked_fill((k_BL < (low if lower else -math.inf)) | (k_BL > high), 0.0)
