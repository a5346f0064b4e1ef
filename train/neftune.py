"""NEFTune: noise on the text embeddings while training (arXiv 2310.05914).

    x[t] += alpha / sqrt(L * D) * u[t],     u[t] uniform in [-1, 1)^D,     L tokens of t's segment

The noise of a segment is a function of (seed, step, record id) alone: a resumed run draws it again, and neither packing
nor the number of ranks changes it. Media tokens get none: their embeddings are replaced by the features of pixels. The
model knows nothing of this; two hooks add it from outside.

Shape letters:  T tokens   L tokens of a segment   D model width
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from data.batch import PackedBatch
from train.policy import Policy


def install(policy: Policy, alpha: float, *, seed: int, step: Callable[[], int]) -> None:
    """Add noise to `policy` from now on, in training mode only.

    Args:
        step: the update that is being worked on, counted from 0.
    """
    batches: list[PackedBatch] = []  # the one in the model now

    def remember(_, arguments: tuple) -> None:
        batches[:] = arguments[:1]

    def add(embedding: torch.nn.Module, _, x_TD: Tensor) -> Tensor | None:
        batch = batches.pop() if batches else None  # none: a forward of the model alone, as generation makes
        if batch is None or not embedding.training:
            return None
        return x_TD + noise(batch, x_TD, alpha, seed=seed, step=step(), first=policy.first_token(batch))

    policy.register_forward_pre_hook(remember)
    policy.model.embed_tokens.register_forward_hook(add)


def noise(batch: PackedBatch, x_TD: Tensor, alpha: float, *, seed: int, step: int, first: int = 0) -> Tensor:
    """Like `x_TD`, which holds the embeddings of `batch` from token `first` on."""
    parts, at = [], -first
    for record, length in zip(batch.ids, batch.lengths, strict=True):
        rows = slice(max(-at, 0), max(min(x_TD.shape[0] - at, length), 0))  # of this segment, those in x_TD
        at += length
        if rows.start >= rows.stop:
            continue
        digest = hashlib.blake2b(f"{seed}/{step}/{record}".encode(), digest_size=7).digest()
        generator = torch.Generator(x_TD.device).manual_seed(int.from_bytes(digest))
        uniform_LD = torch.rand(length, x_TD.shape[1], generator=generator, dtype=torch.float32, device=x_TD.device)
        parts.append((2 * uniform_LD[rows] - 1) * (alpha / (length * x_TD.shape[1]) ** 0.5))
    return torch.cat(parts).to(x_TD.dtype) if parts else torch.zeros_like(x_TD)
