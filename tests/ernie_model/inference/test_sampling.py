"""Which token comes next: by definition in float64, by transformers' processors, and by counting."""

import math
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ernie_model import distribution
from ernie_model.distribution import Distribution
from ernie_model.inference.request import Regex, RequestError, SamplingParams
from ernie_model.inference.sampling import NEVER_WRITTEN, Sampler, Vocabulary, prompt_logprobs, sample
from ernie_model.tokenizer import END_OF_SENTENCE, STOP, load_tiny_tokenizer

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
        total, cumulative, strictly_above = math.fsum(mass.values()), 0.0, {}
        for i in sorted(kept, key=lambda i: -x[i]):
            strictly_above.setdefault(x[i], cumulative)
            cumulative += mass[i]
        kept = {i for i in kept if params.top_p == 1 or strictly_above[x[i]] < params.top_p * total}
        kept = {i for i in kept if mass[i] >= params.min_p}
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


@settings(max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, 1, 7, 500, 5000]),
            "top_p": st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
            "min_p": st.sampled_from([0.0, 0.01, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-20, 20), max_size=4),
            "banned_ids": st.lists(st.integers(0, V - 1), max_size=4).map(tuple),
        },
    ),
    st.lists(st.integers(0, V - 1), max_size=8),
    st.lists(st.integers(0, V - 1), max_size=90),
    st.integers(0, 1000),
    st.booleans(),
)
def test_any_parameters_by_definition(params, prompt, answer, seed, coarse):
    logits = random_logits(1, seed)
    if coarse:  # many equal logits
        logits = logits.round()
    s = sampler(prompt, answer, seed=seed, top_logprobs=V, **params)
    expected = expected_logprobs(logits[0].tolist(), s.params, prompt, answer)
    (sampled,) = sample(logits.clone(), [s])
    assert sampled.top is not None
    reported = dict(zip(sampled.top.token_ids, sampled.top.logprobs, strict=True))
    assert reported.keys() == {i for i in range(V) if expected[i] > -math.inf}
    assert max(abs(value - expected[i]) for i, value in reported.items()) < 1e-9
    assert sampled.token_id in reported
    if s.greedy:
        assert sampled.token_id == expected.index(max(expected))  # the first of equals


def test_float32_is_as_good_as_float32_can_be():
    """x - log(sum): a rounding of x (at most 40 here), and sums of 1024 terms in pairs, 10 roundings: 6e-8 x 50."""
    logits = random_logits(4, scale=8.0)
    for dtype, tolerance in ((torch.float32, 50 * 2**-24), (torch.bfloat16, 50 * 2**-24)):
        rounded = logits.to(dtype)
        exact = sample(rounded.double(), [sampler(seed=i, temperature=1.3, top_p=0.9) for i in range(4)])
        ours = sample(rounded.clone(), [sampler(seed=i, temperature=1.3, top_p=0.9) for i in range(4)])
        for a, b in zip(ours, exact, strict=True):
            assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < tolerance


def test_as_the_processors_of_transformers():
    """Which know the same penalties and truncations, one row at a time, in the same order."""
    prompt, answer, logits = [260, 261, 300], [300, 310, 310], random_logits(1, seed=5)
    banned = transformers.SuppressTokensLogitsProcessor(list(BANNED))
    settings = [(0.7, 20, 1.0, 0.0, 1.0), (1.3, 0, 0.8, 0.0, 1.2), (1.0, 50, 0.9, 0.1, 1.1)]
    for temperature, top_k, top_p, min_p, penalty in settings:
        steps = [
            transformers.RepetitionPenaltyLogitsProcessor(penalty),
            banned,
            transformers.TemperatureLogitsWarper(temperature),
            *([transformers.TopKLogitsWarper(top_k)] if top_k else []),
            transformers.TopPLogitsWarper(top_p),
            transformers.MinPLogitsWarper(min_p),
        ]
        theirs = logits.clone()
        for step in steps:
            theirs = step(torch.tensor([prompt + answer]), theirs)
        theirs = theirs.log_softmax(1)[0]
        params = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
        (sampled,) = sample(logits.clone(), [sampler(prompt, answer, top_logprobs=V, **params)])
        assert sampled.top is not None
        ours = torch.full((V,), -math.inf, dtype=torch.float64)
        ours[list(sampled.top.token_ids)] = torch.tensor(sampled.top.logprobs, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_nucleus_without_a_sort_is_that_with_one():
    for seed in range(20):
        x_V = torch.randn(5000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (0.1 + seed % 7)
        x_V = x_V.round(decimals=1) if seed % 2 else x_V
        x_V -= x_V.max()
        for top_p in (0.001, 0.3, 0.9, 0.9999):
            rows = [Distribution(top_p=top_p)]
            least, found = distribution._top_k_top_p(x_V[None], x_V[None].exp(), rows, 5000)
            assert found.item() and distribution._top_p_by_bins(x_V, x_V.exp(), top_p) == least.item()


# -------------------------------------------------------------------------------------------------------------- chance


def test_tokens_come_as_often_as_they_should():
    """Chi-square over 20,000 draws; one in a million correct samplers would fail, and the seed is fixed."""
    logits, draws = random_logits(1, seed=2), 20_000
    params = dict(temperature=1.5, top_k=12)
    expected = expected_logprobs(logits[0].tolist(), SamplingParams(**params))
    kept = [i for i in range(V) if expected[i] > -math.inf]
    counts = dict.fromkeys(kept, 0)
    for start in range(0, draws, 500):
        samplers = [sampler(seed=seed, **params) for seed in range(start, start + 500)]
        for sampled in sample(logits.repeat(500, 1), samplers):
            counts[sampled.token_id] += 1
    chi2 = sum((counts[i] - draws * math.exp(expected[i])) ** 2 / (draws * math.exp(expected[i])) for i in kept)
    assert chi2 < stats.chi2.isf(1e-6, len(kept) - 1)


def test_random_numbers_are_uniform_and_know_only_seed_and_step():
    along, across = sampler(seed=7), []
    steps = []
    for _ in range(4000):
        steps.append(along.uniform())
        along.accept(300)
    for seed in range(4000):
        across.append(sampler(seed=seed).uniform())
    for numbers in (steps, across):
        assert min(numbers) >= 0 and max(numbers) < 1
        assert stats.kstest(numbers, "uniform").pvalue > 1e-6
    assert abs(stats.pearsonr(steps[:-1], steps[1:]).statistic) < 5 / math.sqrt(4000)
    again = sampler((1, 2, 3), (300,) * 17, seed=7, temperature=0.3)
    assert again.uniform() == steps[17]
    assert sampler().seed != sampler().seed


def test_the_same_seed_gives_the_same_tokens_in_any_company():
    def text(company: int, place: int) -> list[int]:
        ours = sampler(seed=11, temperature=1.2, top_p=0.95, presence_penalty=0.5)
        others = [sampler(seed=i, temperature=(0.0, 1.0, 0.4)[i % 3], top_k=i % 5) for i in range(company)]
        ids = []
        for step in range(30):
            logits = random_logits(company + 1, seed=1000 * step + company).float()
            logits[place] = random_logits(1, seed=step).float()
            rows = [*others[:place], ours, *others[place:]]
            ids.append(sample(logits, rows)[place].token_id)
            ours.accept(ids[-1])
        return ids

    assert text(0, 0) == text(7, 3) == text(40, 40)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_draw_meets_a_token_without_mass(monkeypatch, uniform, dtype):
    """Also where rounding carries the draw to the end of the mass: the last tokens are placeholders."""
    monkeypatch.setattr(Sampler, "uniform", lambda self: uniform)
    for seed in range(50):
        logits = random_logits(1, seed).to(dtype)
        if seed % 2:
            logits[:, 1000:] -= 100  # nothing in the last chunk
        (sampled,) = sample(logits, [sampler(top_k=3, temperature=0.5)])
        assert sampled.logprob > -math.inf and sampled.token_id not in BANNED


# --------------------------------------------------------------------------------------------------- edges and errors


def test_a_row_that_is_not_finite_fails_alone():
    logits = random_logits(5).float()
    logits[1, 400] = math.nan
    logits[2, 400] = math.inf
    logits[3] = -math.inf
    samplers = [sampler(seed=0, temperature=t, top_p=p) for t, p in ((0, 1), (1, 0.9), (0, 1), (1, 0.5), (1, 0.9))]
    alone = [sample(logits[i : i + 1].clone(), [samplers[i]])[0] for i in (0, 4)]
    sampled = sample(logits, samplers)
    assert [sampled[0], sampled[4]] == alone and alone[0].error is None
    assert all("not finite" in str(sampled[i].error) for i in (1, 2))
    assert "No token may be sampled" in str(sampled[3].error)


def test_all_tokens_banned_is_the_requests_own_error():
    rows = [sampler(), sampler(banned_ids=tuple(range(V))), sampler(temperature=0)]
    assert [row.error is None for row in sample(random_logits(3), rows)] == [True, False, True]


def test_what_only_an_input_may_hold_is_never_sampled():
    assert {TINY.require(string) for string in NEVER_WRITTEN} == BANNED
    assert VOCABULARY.terminators == {TINY.require(END_OF_SENTENCE), TINY.require(STOP)}
    logits = random_logits(2)
    logits[:, VOCABULARY.banned_ids] = 100.0
    logits[:, 500] = 50.0
    bias = dict.fromkeys(VOCABULARY.banned_ids, 100.0)
    assert [s.token_id for s in sample(logits, [sampler(temperature=0), sampler(logit_bias=bias)])] == [500, 500]


def test_rows_of_the_embedding_without_a_token_are_never_sampled():
    """Models are often padded; 2053 is a prime, too, so no chunk divides it."""
    vocabulary = Vocabulary(TINY, 2053)
    assert set(vocabulary.banned_ids) == BANNED | set(range(2048, 2053))
    logits = torch.randn(3, 2053, dtype=torch.float64)
    logits[:, 2050] = 50.0
    best = [i for i in logits[0].argsort(descending=True).tolist() if i not in vocabulary.banned_ids][0]
    rows = [sampler(vocabulary=vocabulary, temperature=t, seed=1) for t in (0, 1, 1)]
    sampled = sample(logits.clone(), rows)
    assert sampled[0].token_id == best
    assert all(row.error is None and row.token_id < 2048 for row in sampled)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    (sampled,) = sample(random_logits(1).float(), [sampler(temperature=temperature, seed=3)])
    assert sampled.error is None
    greedy = sample(random_logits(1).float(), [sampler(temperature=0)])[0].token_id
    if temperature < 1:
        assert sampled.token_id == greedy and sampled.logprob == 0
    else:
        assert sampled.logprob == pytest.approx(-math.log(V - len(BANNED)), abs=1e-5)


def test_equal_logits_are_kept_or_dropped_together():
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, [300, 400, 500]] = 2.0
    for params in (dict(top_k=2), dict(top_p=0.001), dict(min_p=1.0)):
        (sampled,) = sample(logits.clone(), [sampler(top_logprobs=V, **params)])
        assert sampled.top is not None and set(sampled.top.token_ids) == {300, 400, 500}


def test_top_logprobs_are_what_was_asked_for_and_no_more():
    rows = [sampler(seed=1), sampler(seed=1, top_logprobs=2), sampler(seed=1, top_k=3, top_logprobs=9)]
    none, two, three = sample(random_logits(3), rows)
    assert none.top is None and two.top is not None and three.top is not None
    assert len(two.top.token_ids) == len(two.top.logprobs) == 2 and len(three.top.token_ids) == 3
    assert math.fsum(math.exp(x) for x in three.top.logprobs) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(logit_bias={V: 1.0}), "logit_bias names token 2048; ids go from 0 to 2047"),
        (dict(banned_ids=(-1,)), "banned_ids names token -1"),
        (dict(stop_ids=(9999,)), "stop_ids names token 9999"),
        (dict(logit_bias={5: math.nan}), r"logit_bias\[5\] is nan; it must be finite"),
    ],
)
def test_parameters_that_no_vocabulary_fits(params, message):
    with pytest.raises(RequestError, match=message):
        sampler(**params)


def test_prompt_logprobs_by_definition():
    logits, ids = random_logits(600, scale=5.0), [random.Random(0).randrange(V) for _ in range(600)]
    expected = logits.log_softmax(1)[torch.arange(600), ids]
    assert prompt_logprobs(logits, ids) == pytest.approx(expected.tolist(), abs=1e-12)
    assert prompt_logprobs(logits[:0], []) == []


def test_nothing_to_sample():
    assert sample(torch.empty(0, V), []) == []


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    """In float64, where no rounding tips a draw; the nucleus is found by a sort there."""
    logits, constraint = random_logits(len(PARAMS) + 1), Regex(pattern="[a-z ]+")
    params = [*PARAMS, dict(constraint=constraint)]
    cpu, gpu = (
        sample(logits.to(device, copy=True), [sampler((260, 300), (300,), seed=3, top_logprobs=5, **p) for p in params])
        for device in ("cpu", "cuda")
    )
    for a, b in zip(cpu, gpu, strict=True):
        assert a.token_id == b.token_id and a.error is None is b.error and a.top is not None and b.top is not None
        assert a.logprob == pytest.approx(b.logprob, abs=1e-12)
        assert a.top.logprobs == pytest.approx(b.top.logprobs, abs=1e-12)
