"""The next token of each request, from its row of logits.

    logits ─► penalties ─► bias, bans ─► constraint ─┬─► argmax                                      temperature 0
                                                     └─► / temperature ─► top-k ─► top-p ─► min-p ─► draw

Rows with different parameters are sampled in one go. Work over the whole vocabulary that only some rows need is done
for those rows, and penalties, bias and bans touch only the tokens they name.

What is kept by truncation, with ties kept together, so that the order of equal logits never matters:

    top-k   tokens at least as likely as the k-th likeliest
    top-p   tokens such that those strictly more likely have less than p of the mass (of what top-k kept)
    min-p   tokens at least min_p times as likely as the likeliest

Random numbers come from a counter, not a state: the draw of token number n of a request is a function of (seed, n), so
neither the requests beside it nor a restart in between changes the text.

Shape letters:  S rows (one for each request)   V vocabulary   C chunks of it   W logits in a chunk
"""

import hashlib
import math
import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Lock

import numpy as np
import torch
from torch import Tensor

from ernie_model.inference.automaton import PatternError
from ernie_model.inference.grammar import KEPT_PATTERNS, Compiled, Guide, TokenBytes
from ernie_model.inference.request import RequestError, SamplingParams, TokenLogprobs
from ernie_model.tokenizer import (
    BEGIN_OF_SENTENCE,
    END_OF_SENTENCE,
    MEDIA_TOKENS,
    START,
    STOP,
    UNKNOWN,
    Tokenizer,
)

NEVER_WRITTEN = (*MEDIA_TOKENS.values(), "<|AUDIO_PLACEHOLDER|>", UNKNOWN, START, BEGIN_OF_SENTENCE)
"""What only an input may hold. A placeholder in an answer would ask for pixels that are not there, and a start or end
token would go to the vision experts; padding and the begin of a text have no place in one either."""

_COLDEST = 1e-30
"""Temperatures below it are as good as 0, and float32 would take them for 0."""
_CANDIDATES = 256
"""Of so many tokens the nucleus is looked for first, on the CPU, where sorting a vocabulary takes 30 times as long."""


class Vocabulary:
    """What sampling must know of the tokenizer; one for each engine.

    Args:
        vocab_size: logits in a row, `config.vocab_size`; often larger than the tokenizer's, which is the default.
        never: ids that are never sampled either: what the model takes for pictures, whatever the tokenizer calls it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, never: Collection[int] = ()):
        self.tokenizer = tokenizer
        self.size = vocab_size or tokenizer.vocab_size
        self.terminators = frozenset(_ids_of(tokenizer, (END_OF_SENTENCE, STOP)))
        """Ids that end an answer."""
        written = tokenizer.token_bytes
        nameless = [i for i in range(self.size) if i >= len(written) or written[i] is None]
        self.banned_ids = tuple(sorted({*_ids_of(tokenizer, NEVER_WRITTEN), *nameless, *never}))
        """Never sampled, in order: `NEVER_WRITTEN`, `never`, and rows of the embedding that no token belongs to."""
        self._banned_on: dict[torch.device, Tensor] = {}
        self._compiled: OrderedDict[str, Compiled | PatternError] = OrderedDict()
        self._lock = Lock()
        self._preparing = BoundedSemaphore(2)  # each may take 10 s and 3 GiB

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """For constraints."""
        return TokenBytes(self)

    def written(self, token_id: int) -> bytes:
        """What a token writes; nothing if there is no such token."""
        known = self.tokenizer.token_bytes
        return (known[token_id] if token_id < len(known) else None) or b""

    def compiled(self, pattern: str) -> Compiled:
        """The constraint of this pattern, made once as long as it is among those used last. From any thread.

        Raises:
            PatternError: it has none; that is kept, too.
        """
        found = self._kept(pattern)
        if found is None:
            with self._preparing:  # whoever waited for its turn may find the work done
                found = self._kept(pattern)
                if found is None:
                    try:
                        found = Compiled(pattern, self)
                    except PatternError as error:
                        found = error
                    with self._lock:
                        self._compiled[pattern] = found
                        if len(self._compiled) > KEPT_PATTERNS:
                            self._compiled.popitem(last=False)
        if isinstance(found, PatternError):
            raise PatternError(*found.args)
        return found

    def _kept(self, pattern: str) -> Compiled | PatternError | None:
        with self._lock:
            if pattern in self._compiled:
                self._compiled.move_to_end(pattern)
            return self._compiled.get(pattern)

    def banned_on(self, device: torch.device) -> Tensor:
        if device not in self._banned_on:
            self._banned_on[device] = torch.tensor(self.banned_ids, dtype=torch.long, device=device)
        return self._banned_on[device]


def _ids_of(tokenizer: Tokenizer, strings: Sequence[str]) -> list[int]:
    return [i for i in map(tokenizer.special_id, strings) if i is not None]


class Sampler:
    """One request's parameters and what its next token depends on besides the logits.

    Args:
        prompt_ids: for the repetition penalty.

    Raises:
        RequestError: an id outside the vocabulary, a bias that is no number, a constraint that cannot be expressed.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocabulary: Vocabulary):
        self.params = params
        self.vocabulary = vocabulary
        self.greedy = params.temperature == 0
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.num_sampled = 0
        _check_ids("logit_bias", params.logit_bias, vocabulary.size)
        _check_ids("banned_ids", params.banned_ids, vocabulary.size)
        _check_ids("stop_ids", params.stop_ids, vocabulary.size)
        for token_id, value in params.logit_bias.items():
            if not math.isfinite(value):
                raise RequestError(f"logit_bias[{token_id}] is {value}; it must be finite. Ban a token by banned_ids.")
        bias = dict(params.logit_bias) | dict.fromkeys(params.banned_ids, -math.inf)
        self._bias = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float64, len(bias))
        self._seen = _Seen(prompt_ids, params) if _penalises(params) else None
        self._guide = Guide(params, prompt_ids, vocabulary) if params.constraint is not None else None

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self.num_sampled += 1
        if self._seen is not None:
            self._seen.add(token_id)
        if self._guide is not None:
            self._guide.accept(token_id)

    def uniform(self) -> float:
        """The random number of the next token, in [0, 1)."""
        digest = hashlib.blake2b(f"{self.seed}:{self.num_sampled}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) * 2.0**-53


def _check_ids(name: str, ids: Sequence[int] | dict[int, float], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"{name} names token {token_id}; ids go from 0 to {vocab_size - 1}.")


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class _Seen:
    """The tokens that penalties speak of, and how often each is in the answer."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams):
        # the prompt's tokens matter to the repetition penalty only
        first = list(dict.fromkeys(prompt_ids)) if params.repetition_penalty != 1 else []
        self.place = {token_id: place for place, token_id in enumerate(first)}
        self._ids = np.array(first + [0] * 64, np.int64)
        self._counts = np.zeros(len(self._ids), np.float64)

    def add(self, token_id: int) -> None:
        place = self.place.setdefault(token_id, len(self.place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self.place)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self.place)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One request's next token; `error` says why there is none, and the other fields then mean nothing."""

    token_id: int
    logprob: float
    """Under the distribution that it was drawn from (`Completion.logprobs`)."""
    top: TokenLogprobs | None = None
    error: str | None = None


@torch.no_grad()
def sample(logit_SV: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """Draw one token for each row. The samplers are not told: `Sampler.accept` does that.

    Args:
        logit_SV: overwritten, to save a copy of it.
    """
    if not samplers:
        return []
    S, V = logit_SV.shape
    assert len(samplers) == S and all(sampler.vocabulary.size == V for sampler in samplers)
    x_SV = logit_SV if logit_SV.dtype in (torch.float32, torch.float64) else logit_SV.float()
    _penalise(x_SV, samplers)
    _add_bias(x_SV, samplers)
    x_SV.index_fill_(1, samplers[0].vocabulary.banned_on(x_SV.device), -math.inf)
    for row, sampler in enumerate(samplers):
        forbidden = sampler._guide.forbidden() if sampler._guide is not None else None
        if forbidden is not None:
            x_SV[row].masked_fill_(torch.from_numpy(forbidden).to(x_SV.device), -math.inf)

    # From here on the largest logit of a row is 0: no temperature, however low, makes infinities of it.
    highest_S1 = x_SV.amax(1, keepdim=True)
    x_SV -= highest_S1
    if any(sampler.params.temperature not in (0, 1) for sampler in samplers):
        temperatures = [1.0 if sampler.greedy else max(sampler.params.temperature, _COLDEST) for sampler in samplers]
        x_SV /= _column(temperatures, x_SV)
    e_SV = x_SV.exp()
    if any(not sampler.greedy and _truncates(sampler.params) for sampler in samplers):
        cut_SV = x_SV < _thresholds(x_SV, e_SV, samplers)
        x_SV.masked_fill_(cut_SV, -math.inf)
        e_SV.masked_fill_(cut_SV, 0)

    # Sums and searches go by chunks: many times as fast as over whole rows, and a cumulative sum in float64 is short.
    W = math.gcd(V, 1024)
    e_SCW = e_SV.unflatten(1, (-1, W))
    mass_SC = e_SCW.sum(2).double().cumsum(1)
    total_S = mass_SC[:, -1]
    greedy = [sampler.greedy for sampler in samplers]
    if all(greedy):
        token_S = _argmax(x_SV.unflatten(1, (-1, W)))
    else:
        token_S = _draw(e_SCW, mass_SC, _column([sampler.uniform() for sampler in samplers], mass_SC))
        if any(greedy):
            greedy_S = torch.tensor(greedy, device=x_SV.device)
            token_S = torch.where(greedy_S, _argmax(x_SV.unflatten(1, (-1, W))), token_S)
    logprob_S = x_SV.gather(1, token_S[:, None]).squeeze(1).double() - total_S.log()
    rows = torch.stack([token_S.double(), logprob_S, highest_S1.squeeze(1).double(), total_S]).T.tolist()
    tops = _top(x_SV, total_S, samplers)
    return [
        Sampled(int(token), logprob, tops.get(row), None if math.isfinite(total) else _complaint(highest))
        for row, (token, logprob, highest, total) in enumerate(rows)
    ]


def _complaint(highest: float) -> str:
    if highest == -math.inf:
        return "No token may be sampled: banned_ids, logit_bias and constraint together leave none."
    return f"The model's logits are not finite (the largest is {highest}): no token can be sampled."


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


# ------------------------------------------------------------------------------- penalties and bias: only some tokens


def _penalise(x_SV: Tensor, samplers: Sequence[Sampler]) -> None:
    rows = [(row, sampler, sampler._seen) for row, sampler in enumerate(samplers) if sampler._seen is not None]
    if not rows:
        return
    sizes = [len(seen.place) for _, _, seen in rows]
    row_N, id_N = _places([row for row, _, _ in rows], [seen.ids for _, _, seen in rows], x_SV.device)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float64), sizes)).to(x_SV.device, x_SV.dtype)

    repetition_N = spread([sampler.params.repetition_penalty for _, sampler, _ in rows])
    presence_N = spread([sampler.params.presence_penalty for _, sampler, _ in rows])
    frequency_N = spread([sampler.params.frequency_penalty for _, sampler, _ in rows])
    count_N = torch.from_numpy(np.concatenate([seen.counts for _, _, seen in rows])).to(x_SV.device, x_SV.dtype)
    x_N = x_SV[row_N, id_N]
    x_N = torch.where(x_N > 0, x_N / repetition_N, x_N * repetition_N)
    x_SV[row_N, id_N] = x_N - presence_N * (count_N > 0) - frequency_N * count_N


def _add_bias(x_SV: Tensor, samplers: Sequence[Sampler]) -> None:
    rows = [(row, *sampler._bias) for row, sampler in enumerate(samplers) if len(sampler._bias[0])]
    if not rows:
        return
    row_N, id_N = _places([row for row, _, _ in rows], [ids for _, ids, _ in rows], x_SV.device)
    bias_N = torch.from_numpy(np.concatenate([values for _, _, values in rows])).to(x_SV.device, x_SV.dtype)
    x_SV[row_N, id_N] += bias_N


def _places(rows: Sequence[int], ids: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    row_N = np.repeat(np.array(rows, np.int64), [len(some) for some in ids])
    return torch.from_numpy(row_N).to(device), torch.from_numpy(np.concatenate(ids)).to(device)


# ---------------------------------------------------------------------------------------------------------- truncation


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _thresholds(x_SV: Tensor, e_SV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """(S, 1): the smallest logit that is kept. Rows of x_SV have their largest at 0; e_SV is exp of it."""
    least_S1 = _column(
        [math.log(s.params.min_p) if s.params.min_p > 0 and not s.greedy else -math.inf for s in samplers], x_SV
    )
    rows = [row for row, s in enumerate(samplers) if not s.greedy and (s.params.top_k > 0 or s.params.top_p < 1)]
    if rows:
        V = x_SV.shape[1]
        chosen = [samplers[row].params for row in rows]
        k = max(params.top_k for params in chosen)
        if any(params.top_p < 1 for params in chosen):
            k = max(k, V if x_SV.is_cuda else _CANDIDATES)
        row_N = torch.tensor(rows, device=x_SV.device)
        own = len(rows) == len(samplers)
        x_NV, e_NV = (x_SV, e_SV) if own else (x_SV[row_N], e_SV[row_N])
        least_N1, found_N = _top_k_top_p(x_NV, e_NV, chosen, min(k, V))
        if k < V:
            for place in (~found_N).nonzero().squeeze(1).tolist():
                least_N1[place] = _top_p_by_bins(x_NV[place], e_NV[place], chosen[place].top_p)
        least_S1[row_N] = torch.maximum(least_S1[row_N], least_N1)
    return least_S1


def _top_k_top_p(
    x_NV: Tensor, e_NV: Tensor, params: Sequence[SamplingParams], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """(N, 1) smallest logits kept, and (N,) whether the candidates were enough to find them."""
    V = x_NV.shape[1]
    x_NK = x_NV.topk(num_candidates, 1).values
    kth_N1 = torch.tensor([[min(p.top_k or V, num_candidates) - 1] for p in params], device=x_NV.device)
    limited_N1 = torch.tensor([[p.top_k > 0] for p in params], device=x_NV.device)
    least_k_N1 = x_NK.gather(1, kth_N1).masked_fill(~limited_N1, -math.inf)
    if all(p.top_p == 1 for p in params):
        return least_k_N1, torch.ones(len(params), dtype=torch.bool, device=x_NV.device)
    total_N1 = e_NV.masked_fill(x_NV < least_k_N1, 0).sum(1, keepdim=True).double()
    top_p_N1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=x_NV.device)
    mass_NK = x_NK.exp().double().cumsum(1)
    # what is strictly more likely has less than p of the mass: true of the first, then false for good
    inside_NK = torch.cat([torch.zeros_like(mass_NK[:, :1]), mass_NK[:, :-1]], 1) < top_p_N1 * total_N1
    last_N1 = inside_NK.sum(1, keepdim=True) - 1
    least_p_N1 = x_NK.gather(1, last_N1.clamp(min=0)).masked_fill(top_p_N1 == 1, -math.inf)
    found_N = ((mass_NK[:, -1:] >= top_p_N1 * total_N1) | limited_N1 | (top_p_N1 == 1)).squeeze(1)
    return torch.maximum(least_k_N1, least_p_N1), found_N


def _top_p_by_bins(x_V: Tensor, e_V: Tensor, top_p: float) -> Tensor:
    """The smallest logit kept, without a sort of all: only the bin in which the mass gets to p is sorted."""
    num_bins = 4096
    bin_V = (x_V * -128).nan_to_num(nan=0.0).clamp(max=num_bins - 1).long()
    mass_B = torch.bincount(bin_V, e_V.double(), minlength=num_bins).cumsum(0)
    wanted = top_p * mass_B[-1]
    which = int((mass_B < wanted).sum().clamp(max=num_bins - 1))
    inside = bin_V == which
    x_I, order_I = x_V[inside].sort(descending=True)
    mass_I = e_V[inside][order_I].double().cumsum(0) + (mass_B[which - 1] if which else 0)
    return x_I[(mass_I < wanted).sum().clamp(max=len(x_I) - 1)]


# -------------------------------------------------------------------------------------------------- from masses to ids


def _argmax(x_SCW: Tensor) -> Tensor:
    chunk_S = x_SCW.amax(2).argmax(1)
    x_SW = _take_chunk(x_SCW, chunk_S)
    return chunk_S * x_SCW.shape[2] + x_SW.argmax(1)


def _draw(e_SCW: Tensor, mass_SC: Tensor, uniform_S1: Tensor) -> Tensor:
    """The token at which the cumulative mass first exceeds uniform x total: never one without mass."""
    wanted_S1 = uniform_S1 * mass_SC[:, -1:]  # below the total even after rounding, as uniform <= 1 - 2**-53
    chunk_S = torch.searchsorted(mass_SC, wanted_S1, right=True).squeeze(1).clamp(max=mass_SC.shape[1] - 1)
    before_S1 = torch.nn.functional.pad(mass_SC, (1, 0)).gather(1, chunk_S[:, None])
    inner_SW = _take_chunk(e_SCW, chunk_S).double().cumsum(1)
    # the chunk's own sum may be a rounding smaller than its share of the cumulative one
    rest_S1 = torch.minimum(wanted_S1 - before_S1, inner_SW[:, -1:].nextafter(torch.zeros_like(before_S1)))
    place_S = torch.searchsorted(inner_SW, rest_S1, right=True).squeeze(1).clamp(max=e_SCW.shape[2] - 1)
    return chunk_S * e_SCW.shape[2] + place_S


def _take_chunk(SCW: Tensor, chunk_S: Tensor) -> Tensor:
    return SCW[torch.arange(len(SCW), device=SCW.device), chunk_S]


def _top(x_SV: Tensor, total_S: Tensor, samplers: Sequence[Sampler]) -> dict[int, TokenLogprobs]:
    rows = [row for row, sampler in enumerate(samplers) if sampler.params.top_logprobs]
    if not rows:
        return {}
    row_N = torch.tensor(rows, device=x_SV.device)
    most = min(max(samplers[row].params.top_logprobs for row in rows), x_SV.shape[1])
    x_NK, id_NK = x_SV[row_N].topk(most, 1)
    logprob_NK = x_NK.double() - total_S[row_N, None].log()

    def reported() -> Iterator[tuple[int, TokenLogprobs]]:
        for row, ids, logprobs in zip(rows, id_NK.tolist(), logprob_NK.tolist(), strict=True):
            # beyond what truncation, bans and the constraint left there is nothing to report
            count = min(samplers[row].params.top_logprobs, sum(value > -math.inf for value in logprobs))
            yield row, TokenLogprobs(tuple(ids[:count]), tuple(logprobs[:count]))

    return dict(reported())


@torch.no_grad()
def prompt_logprobs(logit_TV: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of token_ids[t] under row t, at temperature 1, nothing banned or truncated."""
    assert len(logit_TV) == len(token_ids)
    token_T = torch.tensor(token_ids, dtype=torch.long, device=logit_TV.device)
    parts = []
    for logit_CV, token_C in zip(logit_TV.split(256), token_T.split(256), strict=True):
        chosen_C = logit_CV.gather(1, token_C[:, None]).squeeze(1)
        parts.append(chosen_C.double() - logit_CV.logsumexp(1).double())
    return torch.cat(parts).tolist() if parts else []
