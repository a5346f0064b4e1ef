"""Which token comes next: by definition in float64, by transformers' processors, and by counting."""

import math

import pytest
import torch

from ernie_model.inference.request import Regex, SamplingParams
from ernie_model.inference.sampling import Sampler, Vocabulary, sample
from ernie_model.tokenizer import load_tiny_tokenizer

TINY = load_tiny_tokenizer()
VOCABULARY = Vocabulary(TINY)
V = VOCABULARY.size
BANNED = set(VOCABULARY.banned_ids)


def sampler(prompt=(), answer=(), vocabulary=VOCABULARY, **params) -> Sampler:
    made = Sampler(SamplingParams(**params), prompt, vocabulary)
    for token_id in answer:
        made.accept(token_id)
    return made


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def expected_logprobs(logits: list[float], params: SamplingParams, prompt=(), answer=()) -> list[float]:
    """The documented order, one token at a time."""
    x = list(logits)
    for i in {*prompt, *answer} if params.repetition_penalty != 1 else ():
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in set(answer):
        x[i] -= params.presence_penalty + params.frequency_penalty * list(answer).count(i)
    for i, bias in params.logit_bias.items():
        x[i] += bias
    for i in {*BANNED, *params.banned_ids}:
        x[i] = -math.inf
    kept = {i for i in range(len(x)) if x[i] > -math.inf}
    if params.temperature > 0:
        x = [value / params.temperature for value in x]
        if params.top_k:
            kth = sorted((x[i] for i in kept), reverse=True)[: params.top_k][-1]
            kept = {i for i in kept if x[i] >= kth}
        highest = max(x)
        mass = {i: math.exp(x[i] - highest) for i in kept}
        total, nucleus, cumulative = math.fsum(mass.values()), set(), 0.0
        for i in sorted(kept, key=lambda i: -x[i]):
            if cumulative < params.top_p * total:
                nucleus.add(i)
            cumulative += mass[i]
        kept = {i for i in nucleus if mass[i] >= params.min_p}
    total = math.log(math.fsum(math.exp(x[i]) for i in kept))
    return [x[i] - total if i in kept else -math.inf for i in range(len(x))]


PARAMS = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4),
    dict(temperature=0.0, top_k=3, top_p=0.5),  # truncation means nothing here
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.7, top_k=5),
    dict(top_p=0.9),
    dict(top_p=0.01),
    dict(min_p=0.2),
    dict(temperature=1.2, top_k=40, top_p=0.8, min_p=0.05),
    dict(top_k=40, top_p=0.95, repetition_penalty=0.8, logit_bias={300: 9.0, 301: -4.0}, banned_ids=(302, 303)),
    dict(temperature=5.0, top_p=0.999),  # more than the first candidates
]


def test_a_batch_of_everything_is_what_the_definition_says():
    logits = random_logits(len(PARAMS))
    prompt, answer = (260, 261, 300, 261), (300, 300, 305)
    samplers = [sampler(prompt, answer, seed=3, top_logprobs=V, **params) for params in PARAMS]
    for row, (sampled, s) in enumerate(zip(sample(logits.clone(), samplers), samplers, strict=True)):
        expected = expected_logprobs(logits[row].tolist(), s.params, prompt, answer)
        assert sampled.error is None and sampled.top is not None
        reported = dict(zip(sampled.top.token_ids, sampled.top.logprobs, strict=True))
        assert reported.keys() == {i for i in range(V) if expected[i] > -math.inf}, s.params
        assert all(math.isclose(value, expected[i], rel_tol=0, abs_tol=1e-9) for i, value in reported.items())
        assert list(sampled.top.logprobs) == sorted(sampled.top.logprobs, reverse=True)
        assert sampled.logprob == reported[sampled.token_id]
        if s.greedy:
            assert sampled.token_id == expected.index(max(expected))
