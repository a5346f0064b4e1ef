"""Advantages: the published numbers, TRL, and what is defined where there is nothing to compare."""

import inspect
import re
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from train.config import UserError
from train.reinforcement.advantage import advantages
from train.rl_config import AdvantageKind, RLObjectiveConfig

R = [1.0, 0.0, 0.0, 0.0]


def advantage(worth, kind="group_std", eps=0.0, per_domain=False, **others):
    eps_of = {} if kind in ("group_mean", "rloo") else {"advantage_eps": eps}  # they divide by no deviation
    config = RLObjectiveConfig(advantage=AdvantageKind(kind), per_domain=per_domain, **eps_of)
    return advantages(worth, config, **others)


@pytest.mark.parametrize(
    "kind, eps, first, others",
    [
        ("group_std", 0, 1.5, -0.5),
        ("group_std", 1e-4, 1.49970006, -0.49990002),
        ("group_std", 1e-6, 1.499997, -0.499999),
        ("group_mean", 0, 0.75, -0.25),
        ("rloo", 0, 1, -1 / 3),
        ("batch_std", 0, 1.5, -0.5),
    ],
)
def test_published_numbers(kind, eps, first, others):
    """Reference 10, "Advantage": printed to eight digits."""
    (out,) = advantage([R], kind, eps)
    assert out == pytest.approx([first, others, others, others], abs=5e-9)


PARTS = [{"accuracy": a, "format": f} for a, f in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))]
WEIGHTS = {"accuracy": 1.0, "format": 0.1}
SUMS = [1.1, 0.1, 1.0, 0.0]


def test_sum_first_or_normalise_first():
    assert advantage([SUMS])[0] == pytest.approx([0.9479002, -0.7755547, 0.7755547, -0.9479002], abs=5e-8)
    sums = [0.9526279, -0.7794229, 0.7794229, -0.9526279]
    (out,) = advantage([SUMS], "gdpo", parts=[PARTS], weights=WEIGHTS)
    assert out == pytest.approx([value / torch.tensor(sums).std().item() for value in sums], abs=1e-6)


@pytest.mark.parametrize("kind", [kind.value for kind in AdvantageKind])
def test_equal_worth_and_single_attempts_teach_nothing(kind):
    for group in ([0.1] * 3, [1.0] * 7, [0.3], [None, 0.7, None], [None, None], []):
        given = {"parts": [[{"accuracy": one} for one in group]], "weights": {"accuracy": 1.0}}
        for eps in (0.0, 1e-4):
            assert advantage([group], kind, eps, **given) == [[0.0] * len(group)], (group, eps)


@pytest.mark.parametrize("kind", [kind.value for kind in AdvantageKind])
def test_what_cannot_be_scored_is_as_if_it_had_not_been_tried(kind):
    groups, others = [[1.0, 0.0, 0.5], [0.0, 1.0]], [[None, 1.0, 0.0, None, 0.5], [0.0, None, 1.0]]
    parts = [[{"accuracy": one} for one in group] for group in groups]
    other_parts = [[{"accuracy": 1.0 if one is None else one} for one in group] for group in others]
    given = {"weights": {"accuracy": 1.0}}
    plain = advantage(groups, kind, parts=parts, **given)
    with_gaps = advantage(others, kind, parts=other_parts, **given)
    assert [
        [value for value, one in zip(got, group, strict=True) if one is not None]
        for got, group in zip(with_gaps, others, strict=True)
    ] == plain
    assert with_gaps[0][0] == with_gaps[0][3] == with_gaps[1][1] == 0.0


def test_a_part_that_is_not_known_adds_nothing():
    parts = [[{"accuracy": 1.0, "own": None}, {"accuracy": 0.0, "own": 1.0}, {"accuracy": 0.0, "own": 0.0}]]
    weights = {"accuracy": 1.0, "own": 1.0}
    (out,) = advantage([[1.0, 1.0, 0.0]], "gdpo", parts=parts, weights=weights)
    own, accuracy = 2**0.5 / 2, torch.tensor([1.0, 0.0, 0.0])
    sums = (accuracy - accuracy.mean()) / accuracy.std() + torch.tensor([0.0, own, -own])
    assert out == pytest.approx(((sums - sums.mean()) / sums.std()).tolist(), abs=1e-6)


def test_domains_have_their_own_spread():
    worth = [[1.0, 0.0], [100.0, 0.0], [2.0, 0.0]]
    together = advantage(worth, "batch_std")
    apart = advantage(worth, "batch_std", per_domain=True, domains=["a", "b", "a"])
    assert apart[1] == pytest.approx([2**-0.5, -(2**-0.5)])
    std = torch.tensor([1.0, 0.0, 2.0, 0.0]).std().item()
    assert apart[0] == pytest.approx([0.5 / std, -0.5 / std]) and apart[2] == pytest.approx([1 / std, -1 / std])
    assert abs(together[0][0]) < 0.02  # drowned


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="group 1 is worth nan"):
        advantage([[1.0], [float("nan")]])
    with pytest.raises(ValueError, match="needs the parts"):
        advantage([[1.0]], "gdpo")
    with pytest.raises(ValueError, match="the domain of each of 1 groups; there are 0"):
        advantage([[1.0]], "batch_std", per_domain=True)
    with pytest.raises(UserError, match="objective.per_domain is true, but objective.advantage=rloo"):
        RLObjectiveConfig(advantage=AdvantageKind.rloo, per_domain=True)
    with pytest.raises(UserError, match="objective.advantage_eps is -1"):
        RLObjectiveConfig(advantage_eps=-1)


# ---------------------------------------------------------------------------------------------------------------- TRL


def trls(rewards_GA: torch.Tensor, how: str, scale: str, parts_GAP: torch.Tensor, weights: torch.Tensor):
    """The lines of `GRPOTrainer` that turn rewards into advantages, run as they stand there."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    (lines,) = re.findall(r"( +if self\.multi_objective_aggregation == .*?)\n\n +# Slice to keep", source, re.DOTALL)

    class Self:
        multi_objective_aggregation, scale_rewards, reward_weights = how, scale, weights
        reward_funcs = [None] * parts_GAP.shape[-1]
        num_generations = num_generations_eval = rewards_GA.shape[1]

    parts = parts_GAP.flatten(0, 1)
    names = {
        "self": Self,
        "torch": torch,
        "nanstd": nanstd,
        "rewards_per_func": parts,
        "unscorable_mask": torch.isnan(parts).all(dim=1),
        "num_generations": rewards_GA.shape[1],
        "device": "cpu",
        "mode": "train",
    }
    exec(textwrap.dedent(lines), names)
    return names["advantages"].view_as(rewards_GA)


@pytest.mark.parametrize(
    "kind, how, scale",
    [
        ("group_std", "sum_then_normalize", "group"),
        ("group_mean", "sum_then_normalize", "none"),
        ("batch_std", "sum_then_normalize", "batch"),
        ("gdpo", "normalize_then_sum", "group"),
    ],
)
@pytest.mark.parametrize("gaps", [False, True])
def test_equals_trl(kind, how, scale, gaps):
    generator = torch.Generator().manual_seed(3)
    parts_GAP = torch.rand(3, 5, 2, generator=generator)
    parts_GAP[1, :, 0] = 0.5  # a part that does not differ
    if gaps:
        parts_GAP[0, 2] = parts_GAP[2, 0] = parts_GAP[2, 4] = torch.nan
    weights = torch.tensor([1.0, 0.25])
    sums_GA = (parts_GAP * weights).sum(-1)
    worth = [[None if one != one else one for one in group] for group in sums_GA.tolist()]
    parts = [
        [{"a": None if a != a else a, "b": None if b != b else b} for a, b in group] for group in parts_GAP.tolist()
    ]
    ours = advantage(worth, kind, 1e-4, parts=parts, weights={"a": 1.0, "b": 0.25})
    theirs = trls(sums_GA, how, scale, parts_GAP, weights)
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-5)  # theirs are float32


# --------------------------------------------------------------------------------------------------------- properties

WORTH = st.lists(st.one_of(st.none(), st.integers(-8, 8).map(lambda n: n / 8)), min_size=0, max_size=6)


@given(worth=st.lists(WORTH, max_size=4), kind=st.sampled_from(["group_std", "group_mean", "rloo", "batch_std"]))
def test_means_are_zero_and_a_shift_changes_nothing(worth, kind):
    out = advantage(worth, kind, 1e-4)
    for group, got in zip(worth, out, strict=True):
        assert len(got) == len(group) and abs(sum(got)) < 1e-9
        assert all(value == 0 for value, one in zip(got, group, strict=True) if one is None)
    if kind != "batch_std":  # whose deviation is over all groups together
        shifted = [[None if one is None else one + 2 for one in group] for group in worth]
        for group, again in zip(out, advantage(shifted, kind, 1e-4), strict=True):
            assert again == pytest.approx(group, abs=1e-9)
        scaled = [[None if one is None else one * 4 for one in group] for group in worth]
        factor = 1 if kind == "group_std" else 4
        for group, again in zip(advantage(worth, kind), advantage(scaled, kind), strict=True):
            assert again == pytest.approx([factor * value for value in group], abs=1e-9)
