"""Log-probabilities under what was sampled from: by definition, by their gradients, and by the engine's own."""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch

from data.batch import PackedBatch
from ernie_model.distribution import Distribution
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Prompt, RequestError, SamplingParams
from ernie_model.inference.sampling import Sampler, Vocabulary, distribution_of, sample
from ernie_model.model import ErnieModel
from tests.tiny import SPARSE, tiny_processor
from tests.train import sampled, small
from train.logprobs import token_logprobs
from train.policy import Policy, on_device

CASES = {
    "plain": Distribution(),
    "temperature": Distribution(temperature=0.7),
    "top_k": Distribution(temperature=0.7, top_k=6),
    "top_p": Distribution(temperature=1.3, top_p=0.8),
    "min_p": Distribution(min_p=0.1),
    "bans": Distribution(banned_ids=(0, 3, 17, 49)),
    "all": Distribution(temperature=1.6, top_k=20, top_p=0.9, min_p=0.02, banned_ids=(1, 2, 48)),
}
both = pytest.mark.parametrize("distribution", CASES.values(), ids=CASES.keys())


def problem(coarse: bool = False):
    """Hidden states and a head of 50 words; coarse ones give many equal logits."""
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    if coarse:
        hidden, head = hidden.round(), head.round()
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(50, (37,))


def kept_by_definition(logits: list[float], target: int, d: Distribution) -> list[int]:
    """Which tokens can be drawn, and the target."""
    x = {i: value / d.temperature for i, value in enumerate(logits) if i not in d.banned_ids or i == target}
    if d.top_k:
        kth = sorted(x.values(), reverse=True)[: d.top_k][-1]
        kept = {i for i in x if x[i] >= kth}
    else:
        kept = set(x)
    highest = max(x.values())
    mass = {i: math.exp(x[i] - highest) for i in kept}
    total = math.fsum(mass.values())
    if d.top_p < 1:
        kept = {i for i in kept if math.fsum(m for m in mass.values() if m > mass[i]) < d.top_p * total}
    kept = {i for i in kept if mass[i] >= d.min_p}
    return sorted(kept | {target})


def by_definition(hidden, head, target, d: Distribution):
    """(logprob_T, entropy_T, correct_T), of a softmax over what is kept; autograd does the rest."""
    logprobs, entropies, correct = [], [], []
    for h, t in zip(hidden, target.tolist(), strict=True):
        logit_V = head @ h
        kept = kept_by_definition(logit_V.tolist(), t, d)
        logp = (logit_V[kept] / d.temperature).log_softmax(0)
        logprobs.append(logp[kept.index(t)])
        entropies.append(-(logp.exp() * logp).sum())
        correct.append(kept[int(logp.argmax())] == t)
    return torch.stack(logprobs), torch.stack(entropies), torch.tensor(correct)


@both
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [16, 1000])
def test_values_and_gradients_by_definition(distribution, coarse, rows_per_chunk):
    hidden, head, target = problem(coarse)
    up, bend = torch.randn(2, 37, dtype=torch.float64)
    expected = by_definition(hidden, head, target, distribution)
    theirs = torch.autograd.grad((expected[0] * up + expected[1] * bend).sum(), (hidden, head))

    out = token_logprobs(
        hidden, head, target, distribution=distribution, entropy=True, chunk_bytes=rows_per_chunk * 50 * 8
    )
    torch.testing.assert_close(out.logprob_T, expected[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.entropy_T, expected[1], rtol=1e-11, atol=1e-11)
    assert torch.equal(out.correct_T, expected[2]) and out.entropy_T is not None
    ours = torch.autograd.grad((out.logprob_T * up + out.entropy_T * bend).sum(), (hidden, head))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradients_made_early_are_those_of_the_distribution(distribution, frozen_head, monkeypatch):
    """With a slope that holds, or a head that is frozen: nothing is multiplied out again."""
    hidden, head, target = problem()
    up = torch.randn(37, dtype=torch.float64)
    learned = (hidden,) if frozen_head else (hidden, head)
    theirs = torch.autograd.grad((by_definition(hidden, head, target, distribution)[0] * up).sum(), learned)
    slope = None if frozen_head else -2 * up
    given = head.detach() if frozen_head else head
    for entropy in (False, True):  # asked for, but of no consequence to the loss
        with monkeypatch.context() as patched:
            out = token_logprobs(
                hidden, given, target, distribution=distribution, entropy=entropy, slope_T=slope, chunk_bytes=6400
            )
            patched.setattr("train.logprobs._logits", lambda *_: pytest.fail("recomputed"))
            ours = torch.autograd.grad((out.logprob_T * up).sum(), learned)
        for mine, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_slope_does_not_hide_the_entropy_from_the_gradient(frozen_head):
    hidden, head, target = problem()
    up, distribution = torch.randn(37, dtype=torch.float64), CASES["all"]
    learned = (hidden,) if frozen_head else (hidden, head)
    expected = by_definition(hidden, head, target, distribution)
    given = head.detach() if frozen_head else head
    out = token_logprobs(hidden, given, target, distribution=distribution, entropy=True, slope_T=up)
    assert out.entropy_T is not None
    for weight in (0.0, 1.0):  # the entropy beside the log-probability, and alone
        theirs = torch.autograd.grad((weight * expected[0] * up).sum() + expected[1].sum(), learned, retain_graph=True)
        ours = torch.autograd.grad(
            (weight * out.logprob_T * up).sum() + out.entropy_T.sum(), learned, retain_graph=True
        )
        for mine, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
    (alone,) = torch.autograd.grad(out.entropy_T.sum(), hidden)
    (expected_alone,) = torch.autograd.grad(expected[1].sum(), hidden)
    torch.testing.assert_close(alone, expected_alone, rtol=1e-10, atol=1e-10)


@both
def test_the_rows_beside_it_change_no_bit_of_a_row(distribution):
    """The head is the identity: whatever kernel multiplies, logits are these."""
    torch.manual_seed(0)
    logits, head, target = 3 * torch.randn(70, 1024), torch.eye(1024), torch.randint(50, 1024, (70,))
    whole = token_logprobs(logits, head, target, distribution=distribution, entropy=True)
    for rows in (slice(0, 1), slice(0, 3), slice(5, 70)):
        some = token_logprobs(logits[rows], head, target[rows], distribution=distribution, entropy=True)
        assert whole.entropy_T is not None and some.entropy_T is not None
        assert torch.equal(some.logprob_T, whole.logprob_T[rows])
        assert torch.equal(some.entropy_T, whole.entropy_T[rows])


def test_entropy_by_hand():
    """Logits (0, log 3), and (0, 0): 2 log 2 - 3/4 log 3, and log 2. A ban of one leaves no choice."""
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    head = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    target = torch.tensor([1, 1])
    out = token_logprobs(hidden, head, target, entropy=True)
    expected = torch.tensor([2 * math.log(2) - 0.75 * math.log(3), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(out.entropy_T, expected)
    banned = token_logprobs(hidden, head, target, distribution=Distribution(banned_ids=(0,)), entropy=True)
    assert banned.entropy_T is not None
    assert banned.entropy_T.tolist() == banned.logprob_T.tolist() == [0.0, 0.0]
    assert token_logprobs(hidden, head, target).entropy_T is None


def test_a_target_outside_of_the_nucleus_keeps_a_log_probability_and_a_gradient():
    """Probabilities .6, .3, .1; top_p=.5 keeps the first. The last joins it: .1 / (.6 + .1)."""
    hidden = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.6], [0.3], [0.1]], dtype=torch.float64).log()
    out = token_logprobs(hidden, head, torch.tensor([0, 2]), distribution=Distribution(top_p=0.5))
    torch.testing.assert_close(out.logprob_T.exp(), torch.tensor([1.0, 1 / 7], dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.logprob_T.sum(), hidden)
    # (onehot - p) . head over the two that are kept
    expected = [0.0, (6 / 7) * (math.log(0.1) - math.log(0.6))]
    torch.testing.assert_close(grad[:, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}])
def test_there_is_no_such_distribution(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        Distribution(**bad)


# ---------------------------------------------------------------------------------------------------------- the engine

SAMPLED = {
    "T 1": {},
    "T 0.7": {"temperature": 0.7},
    "T 0.7, top_k 20": {"temperature": 0.7, "top_k": 20},
    "T 1.3, top_p 0.8": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.1, "min_p": 0.2},
    "bans": {"banned_ids": tuple(range(300, 700))},
}


class Side(NamedTuple):
    model: ErnieModel
    engine: Engine
    vocabulary: Vocabulary


@pytest.fixture(scope="module")
def sides():
    """By dtype; weights are larger than initial ones, so that distributions are far from uniform."""

    @cache
    def side(dtype: torch.dtype) -> Side:
        torch.manual_seed(0)
        model, tokenizer = ErnieModel(SPARSE).set_dtype(dtype).requires_grad_(False).eval(), tiny_processor().tokenizer
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return Side(model, Engine(model, tokenizer, EngineSettings(cache_gib=0.01)), Vocabulary.of(tokenizer, SPARSE))

    return side


def scored(model: ErnieModel, batch: PackedBatch, distribution: Distribution) -> torch.Tensor:
    policy = Policy(model, distribution=distribution).eval()
    return policy(*on_device(batch, torch.device("cpu"))).logprob_T.double()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("settings", SAMPLED.values(), ids=SAMPLED.keys())
def test_the_policy_scores_what_the_engine_sampled_as_the_engine_does(sides, dtype, tolerance, settings):
    side = sides(dtype)
    params = SamplingParams(max_new_tokens=24, ignore_end=True, seed=1, **settings)
    prompts = [Prompt(tuple(range(260 + i, 270 + 2 * i))) for i in range(4)]
    batch = sampled.row(side.engine, prompts, params)
    assert batch.engine_logprob_T is not None
    engine_T = batch.engine_logprob_T.double()
    distribution = distribution_of(params, side.vocabulary)
    torch.testing.assert_close(scored(side.model, batch, distribution), engine_T, rtol=0, atol=tolerance)

    # Whatever is forgotten shows, far above rounding.
    for forgotten in {*settings, "banned_ids"}:
        without = replace(distribution, **{forgotten: getattr(Distribution(), forgotten)})
        far = (scored(side.model, batch, without) - engine_T).abs().max()
        assert far > 1e-3, forgotten


def test_greedy_answers_are_drawn_from_nothing():
    with pytest.raises(RequestError, match="temperature is 0"):
        distribution_of(SamplingParams(temperature=0), Vocabulary(tiny_processor().tokenizer))


@pytest.mark.parametrize("settings", SAMPLED.values(), ids=SAMPLED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_the_same_logits_both_sides_get_the_same_bits(dtype, settings):
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(tiny_processor().tokenizer, SPARSE)
    hidden, head = torch.randn(64, 32).to(dtype), torch.randn(vocabulary.size, 32).to(dtype)
    params = SamplingParams(seed=1, **settings)
    drawn = sample((hidden @ head.T).float(), [Sampler(params, (), vocabulary) for _ in hidden])
    target = torch.tensor([one.token_id for one in drawn])
    out = token_logprobs(hidden, head, target, distribution=distribution_of(params, vocabulary))
    assert torch.equal(out.logprob_T, torch.tensor([one.logprob for one in drawn], dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------------- the policy


def test_a_policy_tells_the_entropy_where_targets_are_learned():
    batch = small.row(small.example(0, 9), small.example(1, 7, image=True))
    policy, distribution = small.policy(), Distribution(temperature=0.8, banned_ids=(40, 41))
    plain = policy(*on_device(batch, torch.device("cpu")))
    assert plain.entropy_T is None
    policy.distribution, policy.wants_entropy = distribution, True
    output = policy(*on_device(batch, torch.device("cpu")))
    assert output.entropy_T is not None and output.entropy_T.dtype == torch.float32
    assert torch.equal(output.entropy_T > 0, batch.weight_T > 0)
    assert not torch.allclose(output.logprob_T, plain.logprob_T)
    with torch.no_grad():
        hidden_TD = policy.model(
            batch.token_T, batch.position_3T, policy.context(batch), patch_PX=batch.patch_PX, grids=batch.grids
        ).hidden_TD
    learned = batch.weight_T > 0
    expected = by_definition(hidden_TD[learned], policy.model.head_VD, batch.target_T[learned], distribution)
    torch.testing.assert_close(output.entropy_T[learned], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logprob_T[learned], expected[0], rtol=1e-5, atol=1e-5)
    output.entropy_T.sum().backward()
    assert policy.model.head_VD.grad is not None and policy.model.head_VD.grad.abs().sum() > 0
