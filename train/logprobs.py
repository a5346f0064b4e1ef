"""Hidden states -> log-probability of each target, in chunks, so that (T, V) logits never exist whole.

    logprob_t = x_t[target_t] - logsumexp_v(x_t[v])        x_t = h_t . W, or what a `Distribution` makes of it
    entropy_t = logsumexp_v(x_t[v]) - sum_v p_t[v] x_t[v]

At vocabulary 103,424 the logits of 4,096 tokens, their softmax and its gradient would take 5 GB in float32. Here a
chunk of rows is multiplied out, reduced to a few numbers per token, and thrown away; the backward pass multiplies it
out again and turns it into both gradients at once. The forward pass does that where it can: where the slope of the loss
is known, and, whatever the loss, where the head is frozen: then a row of the gradient is one vector times its slope.

What was sampled must be scored under the distribution that it was drawn from: where the engine divides logits by a
temperature, bans tokens or cuts off a tail, log-probabilities of the bare logits differ from its own before any
rounding does. The way from logits to x is the engine's (ernie_model/distribution.py): bans, less the largest,
/ temperature, truncation, then the sum of exp x over chunks of the vocabulary, added up in float64.

Shape letters:  T tokens   D model width   V vocabulary   C tokens of a chunk   B banned ids
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ernie_model.distribution import Distribution, masses, temper_, thresholds
from ernie_model.exact import product
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
    entropy_T: Tensor | None = None  # as logprob_T, in nats; None if not asked for


AS_IT_IS = Distribution()


def token_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    distribution: Distribution | None = None,
    entropy: bool = False,
    slope_T: Tensor | None = None,
    chunk_bytes: int | None = None,
    exact: bool = False,
) -> TokenLogprobs:
    """log p(target_t | ...) of every row, natural logarithm.

    Args:
        hidden_TD: final hidden states; their dtype is the dtype of the matmuls.
        head_VD: weight of the head; gradients arrive in its own dtype.
        target_T: int64 in [0, V).
        distribution: what targets were drawn from; None is softmax of the logits. A target that it bans or cuts off is
            kept beside what it keeps, and the probabilities of all these add up to 1. So a token of the edge, which
            the engine's logits left inside and ours leave outside, has nearly the log-probability that it had there,
            instead of minus infinity, and still a gradient.
        entropy: also of that distribution. Which tokens are kept is taken as given: it has no gradient.
        slope_T: what d loss / d logprob_T will be, up to one factor, when it is known beforehand (cross-entropy: the
            target weights). The gradients are then made in the forward pass, from logits that are there anyway: one
            matmul in four is saved. A hint, never trusted: if the real slope differs, or the loss depends on the
            entropy too, the backward pass recomputes.
        exact: logits bit for bit those of `ErnieModel.logits` of a model that is exact (ernie_model/exact.py).
        chunk_bytes: memory for one chunk of logits; None takes what suits the device. The entropy takes as much again.
    """
    shape = _Shape(distribution or AS_IT_IS, hidden_TD.device, exact)
    if chunk_bytes is None:
        # Sorted logits with their places, and what remains of them, are several times as large.
        chunk_bytes = chunk_size(hidden_TD.device) // (4 if shape.distribution.truncates else 1)
    if not torch.is_grad_enabled():
        slope_T = None  # evaluation needs no gradients, early or late
    elif hidden_TD.requires_grad and not head_VD.requires_grad:
        slope_T = torch.ones_like(target_T, dtype=torch.float32)  # rows do not mix: each is multiplied by its own later
    return TokenLogprobs(
        *_TokenLogprobs.apply(hidden_TD, head_VD, target_T, slope_T, shape, entropy, chunk_bytes)  # pyright: ignore
    )


class _Shape:
    """Rows of logits -> x, of which exp are the masses, under one distribution for all rows."""

    def __init__(self, distribution: Distribution, device: torch.device, exact: bool = False):
        self.exact = exact
        self.distribution = distribution
        banned = distribution.banned_ids
        self.banned_B = torch.tensor(banned, dtype=torch.int64, device=device) if banned else None

    def ban_(self, logit_CV: Tensor, target_C1: Tensor) -> None:
        if self.banned_B is not None:
            own_C1 = logit_CV.gather(1, target_C1)
            logit_CV.index_fill_(1, self.banned_B, -math.inf).scatter_(1, target_C1, own_C1)

    def temper_(self, logit_CV: Tensor, highest_C1: Tensor) -> Tensor:
        return temper_(logit_CV, highest_C1, [self.distribution] * logit_CV.shape[0])

    def thresholds(self, x_CV: Tensor, e_CV: Tensor) -> Tensor | None:
        return thresholds(x_CV, e_CV, [self.distribution] * x_CV.shape[0])


def _cut(x_CV: Tensor, least_C1: Tensor, target_C1: Tensor) -> Tensor:
    """Which tokens have no mass."""
    return (x_CV < least_C1).scatter_(1, target_C1, False)


def _chunks(hidden_TD: Tensor, head_VD: Tensor, chunk_bytes: int) -> list[slice]:
    tokens, itemsize = hidden_TD.shape[0], max(hidden_TD.element_size(), 4)
    most = max(chunk_bytes // (head_VD.shape[0] * itemsize), FEWEST_ROWS)
    # equal chunks: a last chunk of a few rows would run at a fraction of the speed
    count = -(-tokens // most)
    size = -(-tokens // max(count, 1))
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)] if tokens else []


def _logits(
    hidden_TD: Tensor, weight_VD: Tensor, chunk_bytes: int, exact: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of each chunk in the wide dtype. One buffer serves all chunks, so that it stays in the cache."""
    chunks = _chunks(hidden_TD, weight_VD, chunk_bytes)
    buffer = hidden_TD.new_empty((chunks[0].stop if chunks else 0, weight_VD.shape[0]))
    for rows in chunks:
        out = buffer[: rows.stop - rows.start]
        if exact:
            out = product(hidden_TD[rows], weight_VD)
        else:
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

    def add(
        self,
        rows: slice,
        prob_CV: Tensor,
        target_C: Tensor,
        slope_C: Tensor,
        entropy: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Consumes `prob_CV`. d logprob / dx = onehot(target) - p, and d entropy / dx = -p (log p + entropy).

        Args:
            slope_C: d loss / d logprob over the temperature, which makes x of logits.
            entropy: (C,) entropies, and d loss / d entropy over the temperature.
        """
        of_prob_C, bent_CV = slope_C, None
        if entropy is not None:
            entropy_C, bend_C = entropy
            of_prob_C = slope_C + bend_C * entropy_C
            bent_CV = torch.special.entr(prob_CV).mul_(bend_C[:, None])
        grad_CV = prob_CV.mul_(-of_prob_C[:, None])
        grad_CV.scatter_add_(1, target_C[:, None], slope_C[:, None].to(grad_CV.dtype))
        if bent_CV is not None:
            grad_CV += bent_CV
        grad_CV = grad_CV.to(self.hidden_TD.dtype)
        if self.grad_TD is not None:
            self.grad_TD[rows] = grad_CV @ self.weight_VD
        if self.grad_VD is not None and self.grad_VD.dtype == grad_CV.dtype:
            self.grad_VD.addmm_(grad_CV.T, self.hidden_TD[rows])
        elif self.grad_VD is not None:
            self.grad_VD += grad_CV.T @ self.hidden_TD[rows]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, target_T, slope_T, shape, entropy, chunk_bytes):  # pyright: ignore
        weight_VD = cast(head_VD, hidden_TD)
        dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logprob_T = torch.empty(hidden_TD.shape[0], dtype=dtype, device=hidden_TD.device)
        highest_T, log_total_T = torch.empty_like(logprob_T), torch.empty_like(logprob_T)
        least_T = torch.empty_like(logprob_T) if shape.distribution.truncates else None
        entropy_T = torch.empty_like(logprob_T) if entropy else None
        correct_T = torch.empty_like(target_T, dtype=torch.bool)
        needed = ctx.needs_input_grad[:2]
        early = (
            _Gradients(hidden_TD, head_VD, *needed)
            if slope_T is not None and slope_T.shape[0] and any(needed)
            else None
        )
        for rows, x_CV in _logits(hidden_TD, weight_VD, chunk_bytes, shape.exact):
            target_C1 = target_T[rows, None]
            shape.ban_(x_CV, target_C1)
            highest_C1, argmax_C1 = x_CV.max(dim=1, keepdim=True)
            shape.temper_(x_CV, highest_C1)
            chosen_C1 = x_CV.gather(1, target_C1)
            if least_T is None:
                e_CV = x_CV.exp_()
            else:
                e_CV = x_CV.exp()
                least_C1 = shape.thresholds(x_CV, e_CV)
                e_CV.masked_fill_(_cut(x_CV, least_C1, target_C1), 0)
                least_T[rows] = least_C1[:, 0]
            total_C1 = masses(e_CV)[1][:, -1:]
            log_total_C1 = total_C1.log()
            logprob_T[rows] = (chosen_C1.double() - log_total_C1)[:, 0].to(dtype)
            highest_T[rows], log_total_T[rows] = highest_C1[:, 0], log_total_C1[:, 0].to(dtype)
            correct_T[rows] = (argmax_C1 == target_C1)[:, 0]
            if early is None and entropy_T is None:
                continue
            prob_CV = e_CV.div_(total_C1.to(e_CV.dtype))
            if entropy_T is not None:
                entropy_T[rows] = torch.special.entr(prob_CV).sum(1)
            if early is not None and slope_T is not None:
                early.add(rows, prob_CV, target_T[rows], slope_T[rows].to(dtype) / shape.distribution.temperature)
        ctx.early = None if early is None else (early.grad_TD, early.grad_VD)
        ctx.save_for_backward(hidden_TD, head_VD, target_T, slope_T, highest_T, log_total_T, least_T, entropy_T)
        ctx.shape, ctx.chunk_bytes = shape, chunk_bytes
        ctx.mark_non_differentiable(correct_T)
        ctx.set_materialize_grads(False)
        return logprob_T, correct_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T, _, bend_T):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, head_VD, target_T, slope_T, highest_T, log_total_T, least_T, entropy_T = ctx.saved_tensors
        early, ctx.early = ctx.early, None
        if grad_T is None:  # of a loss that depends on the entropy alone, or on neither
            grad_T = torch.zeros_like(log_total_T)
        if bend_T is not None:
            early = None
        if early is not None and early[1] is None:  # the head is frozen
            grad_TD, grad_VD = early[0].mul_(grad_T[:, None]), None
        elif early is not None and (factor := _common_factor(grad_T, slope_T)) is not None:
            grad_TD, grad_VD = (None if x is None else x.mul_(factor) for x in early)
        else:
            weight_VD, shape = cast(head_VD, hidden_TD), ctx.shape
            late = _Gradients(hidden_TD, head_VD, *ctx.needs_input_grad[:2])
            temperature = shape.distribution.temperature
            for rows, x_CV in _logits(hidden_TD, weight_VD, ctx.chunk_bytes, shape.exact):
                target_C1 = target_T[rows, None]
                shape.ban_(x_CV, target_C1)
                shape.temper_(x_CV, highest_T[rows, None])
                cut_CV = None if least_T is None else _cut(x_CV, least_T[rows, None], target_C1)
                prob_CV = x_CV.sub_(log_total_T[rows, None]).exp_()
                if cut_CV is not None:
                    prob_CV.masked_fill_(cut_CV, 0)
                entropy = None if bend_T is None else (entropy_T[rows], bend_T[rows] / temperature)
                late.add(rows, prob_CV, target_T[rows], grad_T[rows] / temperature, entropy)
            grad_TD, grad_VD = late.grad_TD, late.grad_VD
        return grad_TD, None if grad_VD is None else grad_VD.to(head_VD.dtype), *[None] * 5


def _common_factor(grad_T: Tensor, slope_T: Tensor) -> Tensor | None:
    """c where grad = c * slope to rounding, or None where the two are not proportional."""
    slope_T = slope_T.to(grad_T.dtype)
    steepest = slope_T.abs().argmax()
    factor = grad_T[steepest] / slope_T[steepest]
    tolerance = 4 * torch.finfo(grad_T.dtype).eps
    return factor if torch.allclose(grad_T, factor * slope_T, rtol=tolerance, atol=0.0) else None
