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
    """bfloat16 logits: max |difference| where two programs should agree to the bit, and distances from the truth."""

    same_kernel: float
    """Against transformers' defaults, SDPA and grouped matmul, with our attention on SDPA as well."""
    both_eager: float
    """Against transformers' eager attention, with our attention kernel, and nothing else, replaced by the same."""
    as_is: float
    """Against transformers' defaults, with our own CPU attention kernel: it sums in another order."""
    ours_from_exact: float
    """Root mean square difference of ours, as it is, from float64 logits of the same (bfloat16) weights."""
    theirs_from_exact: float
    """The same for transformers' defaults: how much of the above is bfloat16 itself."""


def bfloat16_errors(shape: Shape, folder: Path) -> Bfloat16:
    reference = make_reference(shape)
    ours = load_ours(reference, folder, dtype=torch.bfloat16)
    sdpa = read_reference(shape, folder, attention="sdpa", experts="grouped_mm")
    eager = read_reference(shape, folder, attention="eager", experts="grouped_mm")
    exact = load_ours(reference, folder, dtype=torch.bfloat16).set_dtype(torch.float64)
    bits, squares, count = [], [0.0, 0.0], 0
    # One conversation at a time: padding changes the shapes of matmuls, and with them the order of float32 sums.
    for one in ([c] for c in make_conversations(shape.rows, seed=3)):
        mine = run_ours(ours, one, grads=False).logits.double()
        with mock.patch("ernie_model.context.LONGEST_TILED", 0):
            mine_sdpa = run_ours(ours, one, grads=False).logits.double()
        with mock.patch.object(Packed, "attend", attend_eagerly):
            mine_eager = run_ours(ours, one, grads=False).logits.double()
        theirs = run_reference(sdpa, one, grads=False).logits.double()
        theirs_eager = run_reference(eager, one, grads=False).logits.double()
        truth = run_ours(exact, one, grads=False).logits
        pairs = ((mine_sdpa, theirs), (mine_eager, theirs_eager), (mine, theirs))
        bits.append([(a - b).abs().max().item() for a, b in pairs])
        squares = [total + (x - truth).square().sum().item() for total, x in zip(squares, (mine, theirs), strict=True)]
        count += truth.numel()
    distances = [(total / count) ** 0.5 for total in squares]
    return Bfloat16(*(max(column) for column in zip(*bits, strict=True)), *distances)
