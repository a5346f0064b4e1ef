"""The next token of each request, from its row of logits.

    logits ─► penalties ─► bias, bans ─► constraint ─┬─► argmax                                      temperature 0
                                                     └─► / temperature ─► top-k ─► top-p ─► min-p ─► draw

Rows with different parameters are sampled in one go. Work over the whole vocabulary that only some rows need is done
for those rows, and penalties, bias and bans touch only the tokens they name.

From the temperature on, what happens to a row is its `Distribution` (distribution.py), which training computes too.

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

from ernie_model.config import ErnieConfig
from ernie_model.distribution import Distribution, column, masses, temper_, thresholds
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


class Vocabulary:
    """What sampling must know of the tokenizer; `of` makes that of a model.

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

    @staticmethod
    def of(tokenizer: Tokenizer, config: ErnieConfig) -> "Vocabulary":
        return Vocabulary(tokenizer, config.vocab_size, never=config.vision_pool_token_ids)

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


_PLAIN = Distribution()


def distribution_of(params: SamplingParams, vocabulary: Vocabulary) -> Distribution:
    """What tokens are drawn from, as far as it does not depend on what was written: without penalties, bias and
    constraint.

    Raises:
        RequestError: the temperature is 0: the likeliest token is taken, none is drawn.
    """
    if params.temperature == 0:
        raise RequestError("temperature is 0; no token is drawn then. It must be positive.")
    banned = vocabulary.banned_ids
    return Distribution(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        banned_ids=tuple(sorted({*banned, *params.banned_ids})) if params.banned_ids else banned,
    )


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
        self.distribution = _PLAIN if self.greedy else distribution_of(params, vocabulary)
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

    highest_S1 = x_SV.amax(1, keepdim=True)
    distributions = [sampler.distribution for sampler in samplers]
    temper_(x_SV, highest_S1, distributions)
    e_SV = x_SV.exp()
    least_S1 = thresholds(x_SV, e_SV, distributions)
    if least_S1 is not None:
        cut_SV = x_SV < least_S1
        x_SV.masked_fill_(cut_SV, -math.inf)
        e_SV.masked_fill_(cut_SV, 0)

    e_SCW, mass_SC = masses(e_SV)
    W, total_S = e_SCW.shape[2], mass_SC[:, -1]
    greedy = [sampler.greedy for sampler in samplers]
    if all(greedy):
        token_S = _argmax(x_SV.unflatten(1, (-1, W)))
    else:
        token_S = _draw(e_SCW, mass_SC, column([sampler.uniform() for sampler in samplers], mass_SC))
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
