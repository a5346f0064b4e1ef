"""Which prompts are asked: beliefs by hand, draws by a loop, states by going on, and what must hold in any case."""

import importlib.util
import json
import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from train.config import UserError
from train.reinforcement.difficulty import (
    LATE,
    SPANS,
    DifficultySampler,
    PromptInfo,
    Status,
    Verdict,
    expansion,
    mixed_probability,
)
from train.reinforcement.groups import Outcome, Ticket
from train.rl_config import SamplerConfig, SamplerKind

REFERENCE = [path for up in Path(__file__).parents if (path := up / "shared/reference/algorithms_check.py").exists()]
UNIFORM = SamplerKind.uniform


def sampler(prompts: int | list[PromptInfo], attempts: int = 8, seed: int = 0, **keys) -> DifficultySampler:
    if isinstance(prompts, int):
        prompts = [PromptInfo(str(number)) for number in range(prompts)]
    return DifficultySampler(prompts, SamplerConfig(**keys), attempts=attempts, seed=seed)


def outcome(ticket: Ticket, right: int, attempts: int = 8) -> Outcome:
    return Outcome(group=ticket.group, prompt=ticket.prompt, accuracies=(1.0,) * right + (0.0,) * (attempts - right))


def rollout(drawer: DifficultySampler, right: int, need: int = 1) -> list[Ticket]:
    """One whose groups all come out alike."""
    tickets = drawer.pick(need)
    drawer.update([outcome(ticket, right) for ticket in tickets])
    return tickets


def wait(drawer: DifficultySampler, rollouts: int) -> None:
    for _ in range(rollouts):
        drawer.update([])


def again(drawer: DifficultySampler) -> DifficultySampler:
    """Another one, from a state that went through a file."""
    fresh = DifficultySampler(drawer.prompts, drawer.config, attempts=drawer.attempts, seed=12345)
    fresh.load_state_dict(json.loads(json.dumps(drawer.state_dict())))
    return fresh


# ------------------------------------------------------------------------------------------------------------- beliefs


def test_beliefs_by_hand():
    drawer = sampler(1, decay=0.98, max_expansion=1)
    seen = []
    for step, right in ((1, 2), (11, 5), (31, 8)):
        wait(drawer, step - drawer.step)
        rollout(drawer, right)
        seen.append((drawer.successes[0], drawer.trials[0], (drawer.successes[0] + 1) / (drawer.trials[0] + 2)))
    expected = [(2, 8, 0.3), (6.634145614, 14.53658246, 0.4616519547), (12.4290085, 17.70473833, 0.6815116381)]
    np.testing.assert_allclose(seen, expected, rtol=1e-9)  # ten digits are given
    # One rollout later the same counts weigh 0.98 of what they did, and the prior still two attempts.
    assert drawer.means(np.array([0]))[0] == pytest.approx((0.98 * 12.4290085 + 1) / (0.98 * 17.70473833 + 2), rel=1e-9)


def test_weights_and_floor_by_hand():
    drawer = sampler(5, decay=1.0, floor=0.1, rest_after=3)
    tickets = drawer.pick(5)
    drawer.update([outcome(ticket, (0, 1, 4, 7, 8)[ticket.prompt]) for ticket in tickets])
    weights = mixed_probability(*drawer.beliefs(np.arange(5)), 8)
    np.testing.assert_allclose(weights, [0.4705471, 0.7349238996, 0.9592760181, 0.7349238996, 0.4705471], rtol=1e-9)
    probabilities = [0.1456572684, 0.216257781, 0.2761699011, 0.216257781, 0.1456572684]
    np.testing.assert_allclose(drawer.probabilities(np.arange(5)), probabilities, rtol=1e-9)


@given(a=st.fractions(Fraction(1, 100), 500), b=st.fractions(Fraction(1, 100), 500), attempts=st.integers(2, 32))
def test_the_probability_of_a_mixed_group_is_that_of_drawing_its_attempts_one_by_one(a, b, attempts):
    """All right: a / (a + b), then one more was right, (a + 1) / (a + b + 1), ... in exact fractions."""
    right, wrong = Fraction(1), Fraction(1)
    for n in range(attempts):
        right *= (a + n) / (a + b + n)
        wrong *= (b + n) / (a + b + n)
    ours = mixed_probability(np.array([float(a)]), np.array([float(b)]), attempts)[0]
    # betaln adds three terms of at most lgamma(1032) = 6000, each rounded to 2^-53 of itself, four times.
    assert ours == pytest.approx(float(1 - right - wrong), abs=12 * 6000 * 2**-53)


def test_the_tier_of_a_record_is_what_is_expected_before_anybody_tried():
    prompts = [PromptInfo("easy", tier=0), PromptInfo("hard", tier=2), PromptInfo("unknown")]
    drawer = sampler(prompts, tier_prior=[0.9, 0.5, 0.2], prior=0.6)
    assert drawer.means(np.arange(3)).tolist() == pytest.approx([0.9, 0.2, 0.6])
    curriculum = sampler(prompts, tier_prior=[0.9, 0.5, 0.2], prior=0.6, tier_gain=[4.0, 1.0, 2.0], floor=0.0)
    plain = mixed_probability(*drawer.beliefs(np.arange(3)), 8)
    gained = plain * [4, 2, 1]
    np.testing.assert_allclose(curriculum.probabilities(np.arange(3)), gained / gained.sum(), rtol=1e-12)


def test_the_first_draw_has_the_probabilities_that_it_says():
    drawer = sampler(6, decay=1.0, floor=0.2, fresh=0.0, rest_after=100, max_expansion=1)
    drawer.update([outcome(ticket, (0, 1, 2, 4, 8, 8)[ticket.prompt]) for ticket in drawer.pick(6)])
    expected = drawer.probabilities(np.arange(6))
    assert expected.max() > 1.5 * expected.min()
    draws = 4000
    counts = Counter()
    for _ in range(draws):
        (ticket,) = drawer.pick(1)
        counts[ticket.prompt] += 1
        drawer.update([])
    for prompt, p in enumerate(expected):
        # Five standard deviations of a binomial count: one in 300,000 seeds would fail.
        assert abs(counts[prompt] - draws * p) < 5 * math.sqrt(draws * p * (1 - p))


# -------------------------------------------------------------------------------------------------------- oversampling


def test_more_are_asked_the_more_groups_were_useless():
    drawer = sampler(1000, fresh=1.0)
    for useless, z in ((0.5, 0.5), (0.5, 0.5), (0.25, 0.425)):
        tickets = drawer.pick(4)
        cut = round(useless * len(tickets))
        assert cut == useless * len(tickets)
        drawer.update([outcome(ticket, 8 if n < cut else 3) for n, ticket in enumerate(tickets)])
        assert drawer.z == [pytest.approx(z, abs=1e-15)]
    assert drawer.metrics()["sampler_expansion"] == pytest.approx(1.739130435, rel=1e-9)
    assert len(drawer.pick(32)) == 56


def test_margin_asks_a_standard_deviation_more_and_never_beyond_the_cap():
    for margin, cap, count in ((0.0, 3.0, 64), (1.0, 3.0, 68), (2.0, 3.0, 72), (2.0, 2.1, 68)):
        drawer = sampler(200, fresh=1.0, margin=margin, max_expansion=cap)
        drawer.z = [0.5]
        # 64 groups of which half are useless: sqrt(64 / 4) = 4
        assert len(drawer.pick(32)) == count


def test_expansion_is_capped():
    assert [expansion(z, 3.0) for z in (0.0, 0.5, 2 / 3, 0.9, 1.0)] == [1.0, 2.0, pytest.approx(3.0), 3.0, 3.0]


@pytest.mark.parametrize("right", [0, 8])
@pytest.mark.parametrize("count", [1, 5, 40, 500])
@pytest.mark.parametrize("kind", SamplerKind)
def test_a_stream_of_useless_groups_ends_at_the_cap_and_never_hangs(kind, count, right):
    drawer = sampler(count, kind=kind, retire_after=2, rest=3, max_rest=6)
    for _ in range(120):
        need = 8
        tickets = drawer.pick(need)
        assert need <= len(tickets) <= 3 * need
        told = [outcome(ticket, right) for ticket in tickets]
        for _ in range(3):
            tickets = drawer.top_up(need)
            assert need <= len(tickets) <= 3 * need
            told += [outcome(ticket, right) for ticket in tickets]
        drawer.update(told)
    assert drawer.z == [1.0]
    assert drawer.metrics()["sampler_expansion"] == 3.0
    if kind is SamplerKind.difficulty and right:
        assert drawer.metrics()["sampler_retired"] > 0
    if not right:
        assert drawer.metrics()["sampler_retired"] == 0


# --------------------------------------------------------------------------------------------- draws, by the definition


def right_of(ticket: Ticket, step: int, difficulty) -> int:
    """Right attempts of 8, of a policy whose ability grows. Depends on prompt, group and step alone."""
    p = 1 / (1 + math.exp(-(0.008 * step - difficulty[ticket.prompt])))
    return int((np.random.default_rng((11, ticket.group)).random(8) < p).sum())


def run(drawer: DifficultySampler, steps: int, difficulty, need: int = 32, reverse: bool = False):
    """Prompts of every rollout, and how many of their groups were useful."""
    rollouts = []
    for _ in range(steps):
        tickets = drawer.pick(need)
        told = [outcome(ticket, right_of(ticket, drawer.step, difficulty)) for ticket in tickets]
        drawer.update(told[::-1] if reverse else told)
        rollouts.append(([ticket.prompt for ticket in tickets], sum(one.trainable for one in told)))
    return rollouts


def by_definition(drawer: DifficultySampler, need: int) -> list[int]:
    """What one domain's first round draws, prompt by prompt, from the sampler's counts and a copy of its chance."""
    config, step = drawer.config, drawer.step
    chance = np.random.Generator(np.random.PCG64())
    chance.bit_generator.state = drawer.state_dict()["chance"]
    z = drawer.z[0] or 0.0
    count = math.ceil(need * min(config.max_expansion, 1 / (1 - z) if z < 1 else math.inf))
    resting = (Status.RESTING_RIGHT, Status.RESTING_WRONG, Status.RESTING_UNSCORED)
    active = []
    for i, status in enumerate(drawer.status):
        if status == Status.ACTIVE or (status in resting and drawer.wake[i] <= step):
            active.append(i)
    queue = drawer._queues[0]
    fresh = queue.order[queue.cursor :].tolist()
    fresh = fresh[: max(math.ceil(config.fresh * count), count - len(active))]
    weights = []
    for i in active:
        left = config.decay ** (step - int(drawer.last[i]))
        s, n = drawer.successes[i] * left, drawer.trials[i] * left
        a, b = s + config.prior_attempts * config.prior, n - s + config.prior_attempts * (1 - config.prior)
        beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
        right = math.exp(beta(a + drawer.attempts, b) - beta(a, b))
        weights.append(1 - right - math.exp(beta(a, b + drawer.attempts) - beta(a, b)))
    drawn = []
    for i, weight in zip(active, weights, strict=True):
        p = (1 - config.floor) * weight / math.fsum(weights) + config.floor / len(active)
        drawn.append((math.log(chance.random()) / p, i))
    best = sorted(drawn, reverse=True)[: count - len(fresh)]
    return fresh + [i for _, i in best]


def test_draws_are_those_of_the_definition():
    drawer = sampler(300, rest=5, max_rest=20, decay=0.97)
    difficulty = np.random.default_rng(3).normal(0, 3, 300)
    for step in range(60):
        expected = by_definition(drawer, 8)
        tickets = drawer.pick(8)
        assert [ticket.prompt for ticket in tickets] == expected
        drawer.update([outcome(ticket, right_of(ticket, step, difficulty)) for ticket in tickets])
    assert (drawer.rests > 1).any()


@pytest.mark.skipif(not REFERENCE, reason="compares with a reference that lies beside the checkout, where there is one")
def test_draws_are_those_of_the_reference():
    spec = importlib.util.spec_from_file_location("algorithms_check", REFERENCE[0])
    module = sys.modules["algorithms_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference, ours = module.Sampler(2000), sampler(2000)
    difficulty = np.random.default_rng(7).normal(0, 3.0, 2000)
    for step in range(150):
        tickets = ours.pick(32)
        assert [ticket.prompt for ticket in tickets] == reference.pick(32)
        right = [right_of(ticket, step, difficulty) for ticket in tickets]
        reference.update([(ticket.group, ticket.prompt, k) for ticket, k in zip(tickets, right, strict=True)])
        ours.update([outcome(ticket, k) for ticket, k in zip(tickets, right, strict=True)])
        assert ours.z == [reference.z]


@pytest.mark.parametrize(
    ("rest_after", "shares"), [(2, (0.7945205479, 0.7189862161, 0.61668589)), (1, (0.87, 0.82, 0.73))]
)
def test_shares_of_useful_groups_are_those_of_the_reference(rest_after, shares):
    """2,000 prompts, 300 rollouts. Uniform draws give 0.57, 0.56, 0.44. The same world and the same draws as there, so
    the same shares, to the digits that are known of them."""
    difficulty = np.random.default_rng(7).normal(0, 3.0, 2000)
    rollouts = run(sampler(2000, rest_after=rest_after), 300, difficulty)
    for (first, last), share in zip(((0, 50), (100, 150), (250, 300)), shares, strict=True):
        useful, asked = (sum(f(one) for one in rollouts[first:last]) for f in (lambda r: r[1], lambda r: len(r[0])))
        assert useful / asked == pytest.approx(share, abs=1e-9 if rest_after == 2 else 0.005)


# ---------------------------------------------------------------------------------------------------- rests and returns


def only(**keys) -> DifficultySampler:
    """Asks one prompt, which is the only one."""
    return sampler(1, max_expansion=1, **keys)


def test_rests_double_and_a_prompt_that_is_always_right_retires():
    drawer, starts, lengths = only(), [], []
    while drawer.status[0] != Status.RETIRED:
        if drawer.status[0] == Status.RESTING_RIGHT:
            starts.append(drawer.step - 1)
            lengths.append(int(drawer.wake[0]) - starts[-1])
            wait(drawer, int(drawer.wake[0]) - drawer.step)
        rollout(drawer, 8)
    assert lengths == [50, 100, 200, 400]
    assert drawer.visits[0] == 10


def test_the_longest_rest_is_the_limit_and_wrong_prompts_never_retire():
    drawer, lengths = only(rest=10, max_rest=25, retire_after=1), []
    for _ in range(5):
        rollout(drawer, 0)
        rollout(drawer, 0)
        assert drawer.status[0] == Status.RESTING_WRONG
        lengths.append(int(drawer.wake[0]) - (drawer.step - 1))
        wait(drawer, int(drawer.wake[0]) - drawer.step)
    assert lengths == [10, 20, 25, 25, 25]


def test_a_streak_is_broken_by_any_other_group():
    drawer = only()
    for right in (8, 7, 8, 0, 8, 0, 3, 0, 8, 4):
        rollout(drawer, right)
        assert drawer.status[0] == Status.ACTIVE
    rollout(drawer, 8)
    rollout(drawer, 8)
    assert drawer.status[0] == Status.RESTING_RIGHT


def test_a_resting_prompt_is_not_asked_before_it_wakes():
    drawer = sampler(40, fresh=0.0, floor=1.0, max_expansion=1, rest=5)
    drawer.update([outcome(ticket, 4) for ticket in drawer.pick(40)])
    asked = []
    for _ in range(100):
        tickets = drawer.pick(10)
        asked.append({ticket.prompt for ticket in tickets})
        drawer.update([outcome(ticket, 8 if ticket.prompt == 0 else 4) for ticket in tickets])
        if drawer.status[0] == Status.RESTING_RIGHT:
            break
    wakes = int(drawer.wake[0])
    assert wakes == drawer.step - 1 + 5
    while drawer.step < wakes:
        assert 0 not in {ticket.prompt for ticket in rollout(drawer, 4, 10)}
    for _ in range(60):  # one in 3 * 10^7 seeds would draw it in none of 60 rollouts
        if 0 in {ticket.prompt for ticket in rollout(drawer, 4, 10)}:
            break
    else:
        pytest.fail("it never came back")


def test_retired_prompts_are_audited_and_come_back_when_they_are_no_longer_right():
    drawer = sampler(50, audit=0.25, retire_after=1, rest=1, max_rest=1, max_expansion=1, fresh=0.0)
    drawer.update([outcome(ticket, 4) for ticket in drawer.pick(50)])
    drawer.status[:20], drawer.rests_right[:20] = Status.RETIRED, 2
    audits = 0
    for _ in range(100):
        tickets = drawer.pick(8)
        audits += sum(ticket.prompt < 20 for ticket in tickets)
        drawer.update([outcome(ticket, 8 if ticket.prompt < 20 else 4) for ticket in tickets])
    assert (drawer.status[:20] == Status.RETIRED).all()
    assert abs(audits - 200) < 5 * math.sqrt(800 * 0.25 * 0.75)
    wait(drawer, 1)
    for _ in range(20):
        rollout(drawer, 5, 8)
    assert (drawer.status[:20] == Status.ACTIVE).any()


def test_attempts_that_cannot_be_scored_count_for_nothing():
    drawer = only()
    (ticket,) = drawer.pick(1)
    drawer.update([Outcome(group=ticket.group, prompt=0, accuracies=(1.0, None, 0.0, 0.5, None, 1.0, 1.0, None))])
    assert (drawer.successes[0], drawer.trials[0], drawer.z) == (3.5, 5.0, [0.0])
    (ticket,) = drawer.pick(1)
    drawer.update([Outcome(group=ticket.group, prompt=0, accuracies=(1.0, None, None, None, None, None, None, None))])
    # One that could be told is knowledge; a group of it is none that can be trained on, and no streak of right ones.
    assert drawer.trials[0] == pytest.approx(5 * 0.99 + 1)
    assert drawer.z == [pytest.approx(0.3)]
    assert (drawer.verdict[0], drawer.streak[0]) == (Verdict.UNSCORED, 1)


@pytest.mark.parametrize(
    ("accuracy", "verdict", "rests"),
    [
        (None, Verdict.UNSCORED, Status.RESTING_UNSCORED),
        (0.5, Verdict.EQUAL, Status.RESTING_EQUAL),
        (0.0, Verdict.WRONG, Status.RESTING_WRONG),
        (1.0, Verdict.RIGHT, Status.RESTING_RIGHT),
        (1 - 1e-7, Verdict.RIGHT, Status.RESTING_RIGHT),
    ],
)
def test_whatever_is_useless_twice_in_a_row_rests(accuracy, verdict, rests):
    """A belief of one half makes a prompt the likeliest to be mixed; if its attempts are always worth one half it is
    not, and would be asked for ever."""
    drawer = only()
    for _ in range(2):
        (ticket,) = drawer.pick(1)
        assert drawer.status[0] != rests
        drawer.update([Outcome(group=ticket.group, prompt=0, accuracies=(accuracy,) * 8)])
    assert drawer.status[0] == rests
    assert drawer.trials[0] == (0 if accuracy is None else pytest.approx(8 * 1.99))
    assert drawer.history[-1].verdicts[verdict] == 1


# ----------------------------------------------------------------------------------------------- what must always hold


OUTCOMES = st.sampled_from([0, 8, 8, 3, 5, "half", "none", "few"])


def told_of(ticket: Ticket, what) -> Outcome:
    if isinstance(what, int):
        return outcome(ticket, what)
    accuracies = {
        "half": (0.5,) * 8,
        "none": (None,) * 8,
        "few": (1.0, 0.0, *(None,) * 6),
    }[what]
    return Outcome(group=ticket.group, prompt=ticket.prompt, accuracies=accuracies)


@st.composite
def worlds(draw):
    count = draw(st.integers(1, 30))
    domains = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=count, max_size=count))
    prompts = [PromptInfo(str(n), domain) for n, domain in enumerate(domains)]
    quotas = {}
    if draw(st.booleans()):
        names = sorted(set(domains))
        quotas = {name: draw(st.sampled_from([0.0, 1.0, 2.5])) for name in names}
        quotas[names[0]] = quotas[names[0]] or 1.0
    keys = {
        "kind": draw(st.sampled_from(SamplerKind)),
        "quotas": quotas,
        "fresh": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "floor": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "rest": draw(st.sampled_from([1, 3])),
        "max_rest": 4,
        "rest_after": draw(st.integers(1, 2)),
        "retire_after": draw(st.sampled_from([None, 1])),
        "audit": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "margin": draw(st.sampled_from([0.0, 1.0])),
    }
    rollouts = draw(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 2)), min_size=1, max_size=8))
    return prompts, keys, rollouts, draw(st.integers(0, 2**32))


def play(drawer: DifficultySampler, rollouts, seed: int, *, stop: tuple[int, int] | None = None, mix: bool = False):
    """All tickets, rollout by rollout. What a group comes to is decided by its number.

    Args:
        stop: rollout and round behind which the sampler is saved, thrown away and loaded again.
        mix: outcomes come in another order, and some of them again with the next rollout.
    """
    tickets, before = [], []
    for number, (need, rounds) in enumerate(rollouts):
        for attempt in range(2):
            own = [drawer.pick(need)]
            for at in range(rounds):
                if stop == (number, at) and attempt == 0:
                    break
                own.append(drawer.top_up(need))
            if stop is None or stop[0] != number or attempt == 1:
                break
            drawer = again(drawer)
        told = [
            told_of(ticket, [0, 8, 8, 3, 5, "half", "none", "few"][hash((seed, ticket.group)) % 8])
            for some in own
            for ticket in some
        ]
        if mix:
            np.random.default_rng(number).shuffle(told)
        drawer.update(before + told)
        before = told if mix else []
        tickets.append(own)
    return tickets, drawer


@settings(max_examples=150, deadline=None)
@given(worlds(), st.integers(0, 7), st.integers(0, 2))
def test_a_run_that_was_interrupted_anywhere_is_the_run_that_was_not(world, number, at):
    prompts, keys, rollouts, seed = world
    whole, first = play(sampler(prompts, seed=seed, **keys), rollouts, seed)
    number %= len(rollouts)
    parts, second = play(
        sampler(prompts, seed=seed, **keys), rollouts, seed, stop=(number, min(at, rollouts[number][1]))
    )
    assert parts == whole
    assert second.state_dict() == first.state_dict()


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_neither_the_order_in_which_groups_finish_counts_nor_how_often_they_are_told(world):
    prompts, keys, rollouts, seed = world
    whole, first = play(sampler(prompts, seed=seed, **keys), rollouts, seed)
    other, second = play(sampler(prompts, seed=seed, **keys), rollouts, seed, mix=True)
    assert other == whole
    assert second.state_dict() == first.state_dict()


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_what_must_hold_of_every_rollout(world):
    prompts, keys, rollouts, seed = world
    drawer = sampler(prompts, seed=seed, **keys)
    allowed = {n for n, prompt in enumerate(prompts) if keys["quotas"].get(prompt.domain, 1.0) > 0}
    groups = 0
    for need, rounds in rollouts:
        asked: Counter[int] = Counter()
        told = []
        for number in range(rounds + 1):
            tickets = drawer.top_up(need) if number else drawer.pick(need)
            assert [ticket.group for ticket in tickets] == list(range(groups, groups + len(tickets)))
            groups += len(tickets)
            # Enough whatever happens, and never more than the cap (rounded up).
            assert need <= len(tickets) <= math.ceil(3 * need)
            for ticket in tickets:
                assert ticket.prompt in allowed
                assert asked[ticket.prompt] == 0 or len(asked) == len(allowed), "asked again though there were others"
                asked[ticket.prompt] += 1
            told += [told_of(ticket, [0, 8, 3, "half", "few"][hash((seed, ticket.group)) % 5]) for ticket in tickets]
        drawer.update(told)
        active = np.flatnonzero(drawer.status == Status.ACTIVE)
        if len(active):
            p = drawer.probabilities(active)
            assert p.sum() == pytest.approx(1, abs=len(active) * 2**-50)
            assert (p >= keys["floor"] / len(active) * (1 - 1e-12)).all()
        assert sum(drawer.history[-1].statuses) == len(prompts)
        assert all(z is None or 0 <= z <= 1 for z in drawer.z)


# ------------------------------------------------------------------------------------------------------------- domains


def three_domains(counts=(60, 30, 10)) -> list[PromptInfo]:
    return [PromptInfo(f"{name}{n}", name) for name, count in zip("abc", counts, strict=True) for n in range(count)]


@pytest.mark.parametrize("kind", SamplerKind)
def test_every_stretch_of_a_rollout_has_its_share_of_each_domain(kind):
    drawer = sampler(three_domains((200, 200, 200)), kind=kind, quotas={"a": 5, "b": 3, "c": 2}, max_expansion=1)
    seen = []
    for _ in range(20):
        tickets = drawer.pick(7)  # of which no domain has a whole number
        seen += [drawer.lanes[drawer._lane[ticket.prompt]] for ticket in tickets]
        drawer.update([outcome(ticket, 4) for ticket in tickets])
        for stop in range(len(seen)):
            counts = Counter(seen[:stop])
            assert all(abs(counts[name] - stop * share) < 1.01 for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))


def test_a_domain_of_useless_groups_is_asked_more_so_that_as_many_can_be_trained_on():
    drawer = sampler(three_domains((100, 100, 100)), quotas={"a": 1, "b": 1, "c": 0}, smoothing=1.0)
    tickets = drawer.pick(10)
    told = [
        outcome(ticket, 4 if prompt_domain(drawer, ticket) == "a" or n < 5 else 8) for n, ticket in enumerate(tickets)
    ]
    drawer.update(told)
    useless = sum(not one.trainable for one in told) / sum(prompt_domain(drawer, ticket) == "b" for ticket in tickets)
    assert drawer.z[:2] == [0.0, pytest.approx(useless)]
    counts = Counter(prompt_domain(drawer, ticket) for ticket in drawer.pick(20))
    assert counts["a"] == pytest.approx(10, abs=1)
    assert counts["b"] == pytest.approx(10 * expansion(useless, 3.0), abs=1)


def prompt_domain(drawer: DifficultySampler, ticket: Ticket) -> str:
    return drawer.lanes[drawer._lane[ticket.prompt]]


def test_without_quotas_domains_share_by_prompts_that_do_not_rest():
    drawer = sampler(three_domains(), max_expansion=1)
    drawer.status[:40], drawer.wake[:40] = Status.RESTING_RIGHT, 1000
    for queue in drawer._queues:
        queue.cursor = len(queue.order)
    drawer.status[40:] = Status.ACTIVE
    counts = Counter(prompt_domain(drawer, ticket) for ticket in drawer.pick(30))
    assert counts == {"a": 10, "b": 15, "c": 5}


def test_what_one_domain_cannot_give_others_do():
    drawer = sampler(three_domains((50, 50, 3)), quotas={"a": 1, "b": 1, "c": 8}, max_expansion=1)
    counts = Counter(prompt_domain(drawer, ticket) for ticket in drawer.pick(40))
    assert counts["c"] == 3 and counts["a"] + counts["b"] == 37
    assert abs(counts["a"] - counts["b"]) <= 1


# -------------------------------------------------------------------------------------------------------- uniform draws


@pytest.mark.parametrize("need", [1, 3, 7, 10])
def test_uniform_draws_ask_each_prompt_once_an_epoch(need):
    drawer = sampler(21, kind=UNIFORM, max_expansion=1)
    seen, orders = [], []
    while len(seen) < 5 * 21:
        tickets = rollout(drawer, 8, need)
        assert len({ticket.prompt for ticket in tickets}) == need
        seen += [ticket.prompt for ticket in tickets]
        ahead = Counter(seen)
        # Nobody is two epochs ahead; within one rollout over the border of two, places may be changed.
        assert max(ahead.values()) - min(ahead[prompt] for prompt in range(21)) <= 1 + (need > 1)
    for epoch in range(5):
        orders.append(seen[epoch * 21 : (epoch + 1) * 21])
    assert len({tuple(order) for order in orders}) == 5
    if need in (1, 3, 7):  # these divide 21, so rollouts end with epochs
        assert all(sorted(order) == list(range(21)) for order in orders)


def test_uniform_draws_learn_what_they_see_and_never_let_a_prompt_rest():
    drawer = sampler(4, kind=UNIFORM)
    for _ in range(10):
        rollout(drawer, 8, 4)
    assert (drawer.status == Status.ACTIVE).all()
    assert drawer.means(np.arange(4)).min() > 0.95
    assert drawer.metrics()["sampler_useless"] == 1.0


# ------------------------------------------------------------------------------------------------------------- tickets


def test_groups_that_come_late_count_once_and_those_that_never_come_are_asked_again():
    drawer = sampler(30, fresh=1.0, max_expansion=1)
    late, lost, *others = drawer.pick(10)
    drawer.update([outcome(ticket, 4) for ticket in others])
    assert drawer.visits[late.prompt] == 0
    assert drawer.metrics()["sampler_late"] == 2
    drawer = again(drawer)
    drawer.update([outcome(late, 4), outcome(others[0], 4)])
    assert (drawer.visits[late.prompt], drawer.visits[others[0].prompt]) == (1, 1)
    drawer.update([outcome(late, 4)])
    assert drawer.visits[late.prompt] == 1
    wait(drawer, LATE)
    assert drawer.metrics()["sampler_late"] == 0
    assert drawer.pick(5)[0].prompt == lost.prompt


def test_what_was_never_asked_cannot_come_out():
    drawer = sampler(5)
    ticket = drawer.pick(2)[0]
    with pytest.raises(ValueError, match="group 7 was never asked; the last was 1"):
        drawer.update([Outcome(group=7, prompt=0, accuracies=(1.0,) * 8)])
    with pytest.raises(ValueError, match=f"asked prompt {ticket.prompt}, not {ticket.prompt + 1}"):
        drawer.update([Outcome(group=ticket.group, prompt=ticket.prompt + 1, accuracies=(1.0,) * 8)])


def test_rounds_have_an_order():
    drawer = sampler(5)
    with pytest.raises(RuntimeError, match="pick begins it"):
        drawer.top_up(1)
    drawer.pick(1)
    with pytest.raises(RuntimeError, match="update ends it"):
        drawer.pick(1)


def test_the_chance_of_an_attempt_depends_on_seed_group_and_number_alone():
    first, second = sampler(3, seed=1), sampler(50, seed=1)
    seeds = [first.attempt_seed(group, attempt) for group in range(50) for attempt in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [second.attempt_seed(group, attempt) for group in range(50) for attempt in range(16)]
    assert sampler(3, seed=2).attempt_seed(0, 0) != seeds[0]
    assert sampler(3, seed=11).attempt_seed(1, 0) != sampler(3, seed=1).attempt_seed(11, 0)


# --------------------------------------------------------------------------------------------------------------- states


def test_a_state_goes_on_with_its_own_seed():
    difficulty = np.random.default_rng(7).normal(0, 3.0, 300)
    whole = run(sampler(300), 60, difficulty)
    first = sampler(300)
    before = run(first, 30, difficulty, reverse=True)
    second = sampler(300, seed=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, 30, difficulty) == whole


def test_a_state_is_small():
    drawer = sampler(100_000)
    chance = np.random.default_rng(0)
    # As after a long run: counts that decayed at different times, which nothing can compress.
    drawer.trials[:] = 8 * chance.integers(1, 5, 100_000) * 0.99 ** chance.integers(0, 300, 100_000)
    drawer.successes[:] = drawer.trials * chance.random(100_000)
    drawer.last[:], drawer.visits[:] = chance.integers(0, 300, 100_000), chance.integers(1, 9, 100_000)
    drawer.status[:] = Status.ACTIVE
    assert len(json.dumps(drawer.state_dict())) < 2_500_000


def test_other_prompts_are_refused_with_what_differs():
    state = sampler(1000).state_dict()
    with pytest.raises(DataError, match="had 1000 prompts and there are 999 now"):
        sampler(999).load_state_dict(state)
    prompts = [PromptInfo(str(number)) for number in range(1000)]
    prompts[500] = PromptInfo("new")
    with pytest.raises(DataError, match=r"first among prompts 496 to 511 \(now '496' to '511'\)"):
        sampler(prompts).load_state_dict(state)
    prompts[500] = PromptInfo("500", tier=1)
    with pytest.raises(DataError, match="tiers differ"):
        sampler(prompts).load_state_dict(state)


def test_another_kind_of_draws_is_refused():
    with pytest.raises(UserError, match="began with uniform.*Set sampler.kind=uniform"):
        sampler(5).load_state_dict(sampler(5, kind=UNIFORM).state_dict())
    domains = three_domains()
    with pytest.raises(UserError, match="sampler.quotas was set when this run began"):
        state = sampler(domains, kind=UNIFORM, quotas={"a": 1, "b": 1, "c": 1}).state_dict()
        sampler(domains, kind=UNIFORM).load_state_dict(state)
    state = sampler(5).state_dict()
    with pytest.raises(UserError, match="has version 0"):
        sampler(5).load_state_dict(state | {"version": 0})


def test_the_history_stays_small_and_loses_nothing():
    drawer = sampler(20)
    rollouts, right = 3 * SPANS + 5, 0
    for number in range(rollouts):
        tickets = drawer.pick(2)
        told = [outcome(ticket, (number + ticket.prompt) % 9) for ticket in tickets]
        right += sum(sum(one.scored) / 8 for one in told)
        drawer.update(told, trained=1)
    history = drawer.history
    assert len(history) <= SPANS
    assert history[0].step == 0
    assert all(a.step + a.rollouts == b.step for a, b in zip(history, history[1:], strict=False))
    assert history[-1].step + history[-1].rollouts == rollouts
    assert sum(span.trained for span in history) == rollouts
    assert sum(span.asked for span in history) == drawer.next_group == sum(sum(span.rates) for span in history)
    assert sum(span.accuracy for span in history) == pytest.approx(right)
    assert again(drawer).history == history


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prompts", "keys", "error", "message"),
    [
        ([], {}, DataError, "no prompts to ask"),
        ([PromptInfo("a"), PromptInfo("a")], {}, DataError, "two prompts have the id 'a'"),
        ([PromptInfo("a", tier=5)], {}, DataError, "'a' has tier 5; sampler.tier_prior knows tiers 0 to 4"),
        ([PromptInfo("a", tier=-1)], {}, DataError, "'a' has tier -1"),
        ([PromptInfo("a", "math")], {"quotas": {"maths": 1}}, UserError, "names the domain maths.*Did you mean math"),
        (three_domains(), {"quotas": {"a": 1, "b": 1}}, UserError, "says nothing of the domain 'c'"),
    ],
)
def test_what_cannot_be_drawn_from_is_said(prompts, keys, error, message):
    with pytest.raises(error, match=message):
        sampler(prompts, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prior": 1.0}, "sampler.prior is 1.0; it must lie between 0 and 1"),
        ({"tier_prior": [0.5, 0.0]}, "sampler.tier_prior has 0.0 for tier 1"),
        ({"tier_gain": [1.0]}, "sampler.tier_gain has 1 factors and sampler.tier_prior 5"),
        ({"tier_gain": [1.0, 1.0, 0.0, 1.0, 1.0]}, "sampler.tier_gain has 0.0 for tier 2"),
        ({"prior_attempts": 0.0}, "sampler.prior_attempts is 0.0"),
        ({"decay": 0.0}, "sampler.decay is 0.0"),
        ({"decay": 1.1}, "sampler.decay is 1.1"),
        ({"smoothing": math.nan}, "sampler.smoothing is nan"),
        ({"floor": -0.1}, "sampler.floor is -0.1"),
        ({"fresh": 1.5}, "sampler.fresh is 1.5"),
        ({"audit": 2.0}, "sampler.audit is 2.0"),
        ({"quotas": {"a": -1.0}}, "sampler.quotas gives a -1.0"),
        ({"quotas": {"a": 0.0}}, "sampler.quotas leaves all domains out"),
        ({"max_expansion": 0.5}, "sampler.max_expansion is 0.5"),
        ({"max_expansion": math.inf}, "sampler.max_expansion is inf"),
        ({"margin": -1.0}, "sampler.margin is -1.0"),
        ({"rest_after": 0}, "sampler.rest_after is 0"),
        ({"rest": 0}, "sampler.rest is 0"),
        ({"rest": 50, "max_rest": 40}, "sampler.max_rest is 40 and sampler.rest 50"),
        ({"retire_after": 0}, "sampler.retire_after is 0"),
    ],
)
def test_settings_that_make_no_sense_are_said(keys, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**keys)
