"""Rows of pairs and labelled answers: of log-probabilities that are written down, and for a small model to compute."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from data.encode import Example
from ernie_model.rope import position_ids
from tests.train.small import CONFIG, IMAGE
from train.dpo_config import DPOObjectiveConfig


@dataclass
class Said:
    """One answer: log p of its tokens by policy and reference."""

    policy: list[float]
    reference: list[float] | None = None
    score: float = math.nan


def evenly(policy: float, reference: float | None, tokens: int, score: float = math.nan) -> Said:
    """The sums, spread over tokens."""
    share = [policy / tokens] * tokens
    return Said(share, None if reference is None else [reference / tokens] * tokens, score)


PAIR = (evenly(-10.0, -11.0, 5), evenly(-12.0, -11.5, 4))
"""The pair of reference 7.1: log-ratios 1 and -0.5."""


def row(*records: dict[Role, Said], prompt: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, PackedBatch]:
    """(logprob_T, batch): each record's prompt without its last token, then its answers, each after that token."""
    logprobs: list[float] = []
    references: list[float] = []
    weights: list[float] = []
    lengths, stems, roles, numbers, scores = [], [], [], [], []
    for number, record in enumerate(records):
        stem = len(lengths)
        for role, said in {Role.PROMPT: Said([]), **record}.items():
            learned = len(said.policy)
            padding = prompt - 1 if role is Role.PROMPT else 0
            logprobs += [0.0] * padding + said.policy + [0.0] * (role is not Role.PROMPT)
            references += [0.0] * padding + (said.reference or [0.0] * learned) + [0.0] * (role is not Role.PROMPT)
            weights += [0.0] * padding + [1.0] * learned + [0.0] * (role is not Role.PROMPT)
            lengths.append(padding + learned + (role is not Role.PROMPT))
            stems.append(-1 if role in (Role.PROMPT, Role.CORRUPTED) else stem)
            roles.append(role)
            numbers.append(number)
            scores.append(said.score)
    token_T = torch.arange(len(logprobs))
    has_reference = any(said.reference is not None for record in records for said in record.values())
    batch = PackedBatch(
        token_T=token_T,
        target_T=token_T,
        weight_T=torch.tensor(weights),
        position_3T=token_T.expand(3, -1),
        lengths=tuple(lengths),
        ids=tuple(f"record {number}" for number in numbers),
        datasets=("made",) * len(lengths),
        stems=tuple(stems),
        roles=tuple(roles),
        records=tuple(numbers),
        scores=tuple(scores),
        ref_logprob_T=torch.tensor(references, dtype=dtype) if has_reference else None,
    )
    return torch.tensor(logprobs, dtype=dtype), batch


def pair(chosen: Said, rejected: Said, corrupted: Said | None = None) -> dict[Role, Said]:
    record = {Role.CHOSEN: chosen, Role.REJECTED: rejected}
    return record if corrupted is None else {**record, Role.CORRUPTED: corrupted}


def settings(loss: str = "sigmoid", **keys: Any) -> DPOObjectiveConfig:
    return DPOObjectiveConfig(preference_loss_type=loss, **keys)


def record(seed: int, *answers: Role, image: bool = False, pictures: tuple[Role, ...] = ()) -> Example:
    """Prompt and answers of random tokens for tests/train/small.py's model, of lengths that differ.

    Args:
        image: the prompt opens with one.
        pictures: these answers hold an image of their own, which nobody learns to write.
    """
    generator = torch.Generator().manual_seed(seed)
    picture_T = torch.tensor([41, 40, 40, 42])
    prompt_T = torch.randint(3, 40, (5 + seed % 3,), generator=generator)
    if image:
        prompt_T = torch.cat([picture_T, prompt_T])
    tokens, targets, weights, positions = [prompt_T[:-1]], [prompt_T[1:]], [torch.zeros(len(prompt_T) - 1)], []
    positions.append(position_ids(prompt_T, [IMAGE] * image, CONFIG)[:, :-1])
    for number, role in enumerate(answers):
        answer_T = torch.randint(3, 40, (2 + (seed + 2 * number) % 4,), generator=generator)
        wanted_T = torch.ones(len(answer_T))
        if role in pictures:
            answer_T, wanted_T = torch.cat([answer_T, picture_T]), torch.cat([wanted_T, torch.zeros(4)])
        whole_T = torch.cat([prompt_T, answer_T])
        grids = [IMAGE] * (image + (role in pictures))
        start = 0 if role is Role.CORRUPTED else len(prompt_T) - 1
        tokens.append(whole_T[start:])
        targets.append(torch.cat([whole_T[start + 1 :], whole_T.new_zeros(1)]))
        before_T = torch.zeros(len(prompt_T) - 1 - start)
        weights.append(torch.cat([before_T, wanted_T, torch.zeros(1)]))
        positions.append(position_ids(whole_T, grids, CONFIG)[:, start:])
    items = image + sum((role in pictures) + (image and role is Role.CORRUPTED) for role in answers)
    return Example(
        id=f"record {seed}",
        token_T=torch.cat(tokens),
        target_T=torch.cat(targets),
        weight_T=torch.cat(weights),
        position_3T=torch.cat(positions, dim=1),
        grids=(IMAGE,) * items,
        patch_PX=torch.randn(8 * items, 588, generator=generator) if items else None,
        lengths=tuple(map(len, tokens)),
        stems=(-1, *(-1 if role is Role.CORRUPTED else 0 for role in answers)),
        roles=(Role.PROMPT, *answers),
    )
