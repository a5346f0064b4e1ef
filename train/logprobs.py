"""Hidden states -> log-probability of each target, in chunks, so that (T, V) logits never exist whole.

    logprob_t = h_t . W[target_t] - logsumexp_v(h_t . W[v])

At vocabulary 103,424 the logits of 4,096 tokens, their softmax and its gradient would take 5 GB in float32. Here a
chunk of rows is multiplied out, reduced to three numbers per token, and thrown away; the backward pass multiplies it
out again and turns it into both gradients at once. The forward pass does that where it can: where the slope of the loss
is known, and, whatever the loss, where the head is frozen: then a row of the gradient is one vector times its slope.

Shape letters:  T tokens   D model width   V vocabulary   C tokens of a chunk
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ernie_model.layers import cast, wide

FEWEST_ROWS = 64
"""Of a chunk, however large the vocabulary: a product of fewer rows runs at a fraction of the speed."""


def chunk_size(device: torch.device) -> int:
    """Bytes of one chunk of logits in the wide dtype.

    On the CPU small enough for the cache; elsewhere large enough that reading the head once per chunk costs little.
    """
    return (6 if device.type == "cpu" else 256) * 2**20


class TokenLogprobs(NamedTuple):
    logprob_T: Tensor  # float32 (float64 in a float64 model), with gradient
    correct_T: Tensor  # bool: the target is the most probable token


def token_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    slope_T: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """log p(target_t | ...) of every row, natural logarithm.

    Args:
        hidden_TD: final hidden states; their dtype is the dtype of the matmuls.
        head_VD: weight of the head; gradients arrive in its own dtype.
        target_T: int64 in [0, V).
        slope_T: what d loss / d logprob_T will be, up to one factor, when it is known beforehand (cross-entropy: the
            target weights). The gradients are then made in the forward pass, from logits that are there anyway: one
            matmul in four is saved. A hint, never trusted: if the real slope differs, the backward pass recomputes.
        chunk_bytes: memory for one chunk of logits; None takes what suits the device.
    """
    chunk_bytes = chunk_bytes or chunk_size(hidden_TD.device)
    if not torch.is_grad_enabled():
        slope_T = None  # evaluation needs no gradients, early or late
    elif hidden_TD.requires_grad and not head_VD.requires_grad:
        slope_T = torch.ones_like(target_T, dtype=torch.float32)  # rows do not mix: each is multiplied by its own later
    logprob_T, correct_T = _TokenLogprobs.apply(hidden_TD, head_VD, target_T, slope_T, chunk_bytes)  # pyright: ignore
    return TokenLogprobs(logprob_T, correct_T)


def _chunks(hidden_TD: Tensor, head_VD: Tensor, chunk_bytes: int) -> list[slice]:
    tokens, itemsize = hidden_TD.shape[0], max(hidden_TD.element_size(), 4)
    most = max(chunk_bytes // (head_VD.shape[0] * itemsize), FEWEST_ROWS)
    # equal chunks: a last chunk of a few rows would run at a fraction of the speed
    count = -(-tokens // most)
    size = -(-tokens // max(count, 1))
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)] if tokens else []


def _logits(hidden_TD: Tensor, weight_VD: Tensor, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits of each chunk in the wide dtype. One buffer serves all chunks, so that it stays in the cache."""
    chunks = _chunks(hidden_TD, weight_VD, chunk_bytes)
    buffer = hidden_TD.new_empty((chunks[0].stop if chunks else 0, weight_VD.shape[0]))
    for rows in chunks:
        out = buffer[: rows.stop - rows.start]
        torch.mm(hidden_TD[rows], weight_VD.T, out=out)
        yield rows, wide(out)


class _Gradients:
    """Both gradients of sum_t slope_t * logprob_t, gathered chunk by chunk."""

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor, need_hidden: bool, need_head: bool):
        self.weight_VD = cast(head_VD, hidden_TD)
        self.hidden_TD = hidden_TD
        self.grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        # Added up over chunks, so in the wide dtype; bfloat16 sums would lose small contributions.
        self.grad_VD = torch.zeros_like(head_VD, dtype=wide(head_VD[:0]).dtype) if need_head else None

    def add(self, rows: slice, prob_CV: Tensor, target_C: Tensor, slope_C: Tensor) -> None:
        """Consumes `prob_CV`: d logprob / d logit = onehot(target) - prob."""
        grad_CV = prob_CV.mul_(-slope_C[:, None])
        grad_CV.scatter_add_(1, target_C[:, None], slope_C[:, None].to(grad_CV.dtype))
        grad_CV = grad_CV.to(self.hidden_TD.dtype)
        if self.grad_TD is not None:
            self.grad_TD[rows] = grad_CV @ self.weight_VD
        if self.grad_VD is not None and self.grad_VD.dtype == grad_CV.dtype:
            self.grad_VD.addmm_(grad_CV.T, self.hidden_TD[rows])
        elif self.grad_VD is not None:
            self.grad_VD += grad_CV.T @ self.hidden_TD[rows]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, target_T, slope_T, chunk_bytes):  # pyright: ignore
        weight_VD = cast(head_VD, hidden_TD)
        dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logprob_T = torch.empty(hidden_TD.shape[0], dtype=dtype, device=hidden_TD.device)
        logsumexp_T = torch.empty_like(logprob_T)
        correct_T = torch.empty_like(target_T, dtype=torch.bool)
        needed = ctx.needs_input_grad[:2]
        early = (
            _Gradients(hidden_TD, head_VD, *needed)
            if slope_T is not None and slope_T.shape[0] and any(needed)
            else None
        )
        for rows, logit_CV in _logits(hidden_TD, weight_VD, chunk_bytes):
            target_C = target_T[rows]
            chosen_C = logit_CV.gather(1, target_C[:, None])[:, 0]
            largest_C, argmax_C = logit_CV.max(dim=1)
            exp_CV = logit_CV.sub_(largest_C[:, None]).exp_()
            sum_C = exp_CV.sum(1)
            logsumexp_T[rows] = sum_C.log().add_(largest_C)
            logprob_T[rows] = chosen_C - logsumexp_T[rows]
            correct_T[rows] = argmax_C == target_C
            if early is not None and slope_T is not None:
                early.add(rows, exp_CV.div_(sum_C[:, None]), target_C, slope_T[rows].to(dtype))
        ctx.early = None if early is None else (early.grad_TD, early.grad_VD)
        ctx.save_for_backward(hidden_TD, head_VD, target_T, slope_T, logsumexp_T)
        ctx.chunk_bytes = chunk_bytes
        ctx.mark_non_differentiable(correct_T)
        return logprob_T, correct_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, head_VD, target_T, slope_T, logsumexp_T = ctx.saved_tensors
        early, ctx.early = ctx.early, None
        if early is not None and early[1] is None:  # the head is frozen
            grad_TD, grad_VD = early[0].mul_(grad_T[:, None]), None
        elif early is not None and (factor := _common_factor(grad_T, slope_T)) is not None:
            grad_TD, grad_VD = (None if x is None else x.mul_(factor) for x in early)
        else:
            weight_VD = cast(head_VD, hidden_TD)
            late = _Gradients(hidden_TD, head_VD, *ctx.needs_input_grad[:2])
            for rows, logit_CV in _logits(hidden_TD, weight_VD, ctx.chunk_bytes):
                prob_CV = logit_CV.sub_(logsumexp_T[rows, None]).exp_()
                late.add(rows, prob_CV, target_T[rows], grad_T[rows])
            grad_TD, grad_VD = late.grad_TD, late.grad_VD
        return grad_TD, None if grad_VD is None else grad_VD.to(head_VD.dtype), None, None, None


def _common_factor(grad_T: Tensor, slope_T: Tensor) -> Tensor | None:
    """c where grad = c * slope to rounding, or None where the two are not proportional."""
    slope_T = slope_T.to(grad_T.dtype)
    steepest = slope_T.abs().argmax()
    factor = grad_T[steepest] / slope_T[steepest]
    tolerance = 4 * torch.finfo(grad_T.dtype).eps
    return factor if torch.allclose(grad_T, factor * slope_T, rtol=tolerance, atol=0.0) else None
