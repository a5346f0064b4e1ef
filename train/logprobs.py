"""Hidden states -> log-probability of each target, in chunks, so that (T, V) logits never exist whole.

    logprob_t = h_t . W[target_t] - logsumexp_v(h_t . W[v])

At vocabulary 103,424 the logits of 4,096 tokens, their softmax and its gradient would take 5 GB in float32. Here a chunk
of rows is multiplied out, reduced to three numbers per token, and thrown away; the backward pass multiplies it out again
and turns it into both gradients at once.

Shape letters:  T tokens   D model width   V vocabulary   C tokens of a chunk
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ernie_model.layers import cast, wide

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of logits in the wide dtype: large enough for full-speed matmuls, small enough for the cache."""


class TokenLogprobs(NamedTuple):
    logprob_T: Tensor  # float32 (float64 in a float64 model), with gradient
    correct_T: Tensor  # bool: the target is the most probable token


def token_logprobs(
    hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> TokenLogprobs:
    """log p(target_t | ...) of every row, natural logarithm.

    Args:
        hidden_TD: final hidden states; their dtype is the dtype of the matmuls.
        head_VD: weight of the head; gradients arrive in its own dtype.
        target_T: int64 in [0, V).
        chunk_bytes: memory for one chunk of logits.
    """
    logprob_T, correct_T = _TokenLogprobs.apply(hidden_TD, head_VD, target_T, chunk_bytes)  # pyright: ignore
    return TokenLogprobs(logprob_T, correct_T)


def _chunks(hidden_TD: Tensor, head_VD: Tensor, chunk_bytes: int) -> list[slice]:
    tokens, itemsize = hidden_TD.shape[0], max(hidden_TD.element_size(), 4)
    most = max(chunk_bytes // (head_VD.shape[0] * itemsize), 16)
    # equal chunks: a last chunk of a few rows would run at a fraction of the speed
    count = -(-tokens // most)
    size = -(-tokens // max(count, 1))
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)] if tokens else []


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, target_T, chunk_bytes):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_VD = cast(head_VD, hidden_TD)
        dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logprob_T = torch.empty(hidden_TD.shape[0], dtype=dtype, device=hidden_TD.device)
        logsumexp_T = torch.empty_like(logprob_T)
        correct_T = torch.empty_like(target_T, dtype=torch.bool)
        for rows in _chunks(hidden_TD, head_VD, chunk_bytes):
            logit_CV = wide(hidden_TD[rows] @ weight_VD.T)
            target_C = target_T[rows]
            chosen_C = logit_CV.gather(1, target_C[:, None])[:, 0]
            largest_C, argmax_C = logit_CV.max(dim=1)
            logsumexp_T[rows] = logit_CV.sub_(largest_C[:, None]).exp_().sum(1).log_().add_(largest_C)
            logprob_T[rows] = chosen_C - logsumexp_T[rows]
            correct_T[rows] = argmax_C == target_C
        ctx.save_for_backward(hidden_TD, head_VD, target_T, logsumexp_T)
        ctx.chunk_bytes = chunk_bytes
        ctx.mark_non_differentiable(correct_T)
        return logprob_T, correct_T

    @staticmethod
    def backward(ctx, grad_T, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, head_VD, target_T, logsumexp_T = ctx.saved_tensors
        weight_VD = cast(head_VD, hidden_TD)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        # Accumulated over chunks, so in the wide dtype; bfloat16 sums would lose small contributions.
        grad_VD = torch.zeros_like(head_VD, dtype=wide(head_VD[:0]).dtype) if need_head else None
        for rows in _chunks(hidden_TD, head_VD, ctx.chunk_bytes):
            hidden_CD, grad_C = hidden_TD[rows], grad_T[rows]
            prob_CV = wide(hidden_CD @ weight_VD.T).sub_(logsumexp_T[rows, None]).exp_()
            # d logprob / d logit = onehot(target) - prob
            prob_CV.mul_(-grad_C[:, None])
            prob_CV.scatter_add_(1, target_T[rows, None], grad_C[:, None].to(prob_CV.dtype))
            grad_CV = prob_CV.to(hidden_TD.dtype)
            if grad_TD is not None:
                grad_TD[rows] = grad_CV @ weight_VD
            if grad_VD is not None and grad_VD.dtype == grad_CV.dtype:
                grad_VD.addmm_(grad_CV.T, hidden_CD)
            elif grad_VD is not None:
                grad_VD += grad_CV.T @ hidden_CD
        return grad_TD, None if grad_VD is None else grad_VD.to(head_VD.dtype), None, None
