"""Measure one shape against transformers. The tests bound these numbers, the table prints them."""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from ernie_model.context import Packed
from tests.parity.reference import (
    Shape,
    attend_eagerly,
    grad_error,
    in_float64,
    load_ours,
    logit_error,
    loss_error,
    make_conversations,
    make_reference,
    read_reference,
    reference_in_float64,
    run_ours,
    run_reference,
)


@dataclass(frozen=True)
class Errors:
    """Relative to the reference: its largest logit, its loss, the norm of each gradient."""

    logits: float
    loss: float
    grads: float
    worst: str
    """The parameter whose gradient is furthest off."""


def float32_errors(shape: Shape, folder: Path) -> Errors:
    reference = make_reference(shape)
    conversations = make_conversations(shape.rows, seed=3)
    return _errors(run_ours(load_ours(reference, folder), conversations), run_reference(reference, conversations))


def float64_errors(shape: Shape, folder: Path) -> Errors:
    reference = make_reference(shape)
    conversations = make_conversations(shape.rows, seed=3)
    ours = run_ours(load_ours(reference, folder, dtype=torch.float64), conversations)
    with in_float64():
        return _errors(ours, run_reference(reference_in_float64(reference), conversations))


def _errors(ours, reference) -> Errors:
    grads, worst = grad_error(ours, reference)
    return Errors(logit_error(ours, reference), loss_error(ours, reference), grads, worst)


@dataclass(frozen=True)
class Bfloat16:
    """max |difference| of bfloat16 logits, as they are."""

    same_kernel: float
    """Against transformers' defaults, SDPA and grouped matmul, with ours using SDPA too (as it does for long segments)."""
    eager: float
    """Against transformers' eager attention, which rounds scores and probabilities to bfloat16; ours does not."""
    both_eager: float
    """The same with our attention kernel, and nothing else, replaced by one that rounds as eager does."""


def bfloat16_errors(shape: Shape, folder: Path) -> Bfloat16:
    reference = make_reference(shape)
    ours = load_ours(reference, folder, dtype=torch.bfloat16)
    sdpa = read_reference(shape, folder, attention="sdpa", experts="grouped_mm")
    eager = read_reference(shape, folder, attention="eager", experts="grouped_mm")
    found = []
    # One conversation at a time: padding changes the shapes of matmuls, and with them the order of float32 sums.
    for one in ([c] for c in make_conversations(shape.rows, seed=3)):
        mine = run_ours(ours, one, grads=False).logits.float()
        with mock.patch("ernie_model.context.LONGEST_TILED", 0):
            mine_sdpa = run_ours(ours, one, grads=False).logits.float()
        with mock.patch.object(Packed, "attend", attend_eagerly):
            mine_eager = run_ours(ours, one, grads=False).logits.float()
        theirs = run_reference(sdpa, one, grads=False).logits.float()
        theirs_eager = run_reference(eager, one, grads=False).logits.float()
        pairs = ((mine_sdpa, theirs), (mine, theirs_eager), (mine_eager, theirs_eager))
        found.append([(a - b).abs().max().item() for a, b in pairs])
    return Bfloat16(*(max(column) for column in zip(*found, strict=True)))
