"""A packed row's pairs: of every answer its summed log-probability, its length and its score.

    row       prompt  chosen  rejected   prompt  chosen  rejected  corrupted        one segment each
    pair      0       0       0          1       1       1         1

Sums are float64. A log-ratio is a small difference of large sums, and float32 would leave 1e-4 of a sum of 2,000.

Shape letters:  T tokens   S segments   N pairs
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import PackedBatch, Role


class Answers(NamedTuple):
    """One answer of each pair, float64 (N,) each. Sums are over its learned targets, times their weight."""

    logprob_N: Tensor
    """log p(answer | prompt) of the policy, with gradient."""
    shared_N: Tensor
    """Of it, the first targets, as many as the shorter answer of the pair has; with gradient."""
    length_N: Tensor
    """Targets, times their weight."""
    ref_logprob_N: Tensor | None
    """The same of the reference; None: the row has none."""
    ref_shared_N: Tensor | None
    kl_N: Tensor | None
    """Sum of exp(d) - 1 - d, d = log p_ref - log p of a target: 0 or more, and 0 where both agree. Detached."""


class PairSums(NamedTuple):
    chosen: Answers
    rejected: Answers
    corrupted: Answers | None
    """The chosen answer after corrupted pictures; None: no pair of the row has them."""
    corrupted_N: Tensor
    """float64: 1 where the pair has corrupted pictures, or else 0, and its `corrupted` is its chosen answer."""
    score_gap_N: Tensor
    """float64: score of the chosen answer - score of the rejected one; nan where the record has none."""
    segments: tuple[int, ...]
    """Of each pair its chosen segment in the batch, for `ids` and `datasets`."""


def pair_segments(batch: PackedBatch) -> list[dict[Role, int]]:
    """Of each pair in the row, which segment has which role."""
    records = [{batch.roles[segment]: segment for segment in of} for of in batch.record_segments] if batch.roles else []
    pairs = [roles for roles in records if Role.CHOSEN in roles or Role.REJECTED in roles]
    assert all(Role.CHOSEN in roles and Role.REJECTED in roles for roles in pairs), "an answer without the other one"
    return pairs


def count_pairs(batch: PackedBatch) -> Tensor:
    return torch.tensor(float(batch.roles.count(Role.CHOSEN)))


def segment_sums(value_T: Tensor, batch: PackedBatch) -> Tensor:
    """(T,) -> float64 (S,)"""
    zeros_S = value_T.new_zeros(batch.num_segments, dtype=torch.float64)
    return zeros_S.index_add(0, batch.segment_T, value_T.double())


def gather_pairs(logprob_T: Tensor, batch: PackedBatch) -> PairSums:
    """
    Args:
        logprob_T: log p(target_T[t]) of the policy.
        batch: on the same device; `ref_logprob_T` is read if it is there.
    """
    pairs, device = pair_segments(batch), logprob_T.device
    chosen = [roles[Role.CHOSEN] for roles in pairs]
    rejected = [roles[Role.REJECTED] for roles in pairs]
    corrupted = [roles.get(Role.CORRUPTED, roles[Role.CHOSEN]) for roles in pairs]
    chosen_N, rejected_N, corrupted_N = torch.tensor([chosen, rejected, corrupted], dtype=torch.int64, device=device)

    weight_T = batch.weight_T.double()
    learned_T = (weight_T != 0).double()
    count_S = segment_sums(learned_T, batch)
    shorter_N = torch.minimum(count_S[chosen_N], count_S[rejected_N])
    shared_S = torch.zeros_like(count_S)
    for place_N in (corrupted_N, chosen_N, rejected_N):
        shared_S = shared_S.index_copy(0, place_N, shorter_N)
    # 1, 2, ... of each segment's learned targets
    place_T = learned_T.cumsum(0) - (count_S.cumsum(0) - count_S)[batch.segment_T]
    shared_T = weight_T * (place_T <= shared_S[batch.segment_T])

    length_S, ref_T = segment_sums(weight_T, batch), batch.ref_logprob_T
    if ref_T is None and not pairs:  # a row that only keeps ranks in step
        ref_T = torch.zeros_like(logprob_T)
    logprob_S, logprob_shared_S = (segment_sums(logprob_T * by_T, batch) for by_T in (weight_T, shared_T))
    ref_S = ref_shared_S = kl_S = None
    if ref_T is not None:
        ref_S, ref_shared_S = (segment_sums(ref_T * by_T, batch) for by_T in (weight_T, shared_T))
        behind_T = ref_T.double() - logprob_T.detach().double()
        kl_S = segment_sums((torch.expm1(behind_T) - behind_T) * weight_T, batch)

    def answers(place_N: Tensor) -> Answers:
        sums = (logprob_S, logprob_shared_S, length_S, ref_S, ref_shared_S, kl_S)
        return Answers(*(None if value_S is None else value_S[place_N] for value_S in sums))  # pyright: ignore

    scores = batch.scores or (float("nan"),) * batch.num_segments
    gaps = [scores[one] - scores[other] for one, other in zip(chosen, rejected, strict=True)]
    has_corrupted = [float(Role.CORRUPTED in roles) for roles in pairs]
    return PairSums(
        chosen=answers(chosen_N),
        rejected=answers(rejected_N),
        corrupted=answers(corrupted_N) if any(has_corrupted) else None,
        corrupted_N=torch.tensor(has_corrupted, dtype=torch.float64, device=device),
        score_gap_N=torch.tensor(gaps, dtype=torch.float64, device=device),
        segments=tuple(chosen),
    )
