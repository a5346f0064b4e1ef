"""Rewards run in processes: what hangs, dies or takes too much costs its own attempt alone."""

import asyncio
from types import SimpleNamespace

import pytest

from train.config import UserError
from train.reinforcement.scoring import RewardPool
from train.rewards.base import Attempt
from train.rl_config import RewardsConfig

MINE = "python:tests.train.reinforcement.own_rewards."


def question(reward, expected="7"):
    return SimpleNamespace(reward_name=reward, options={}, expected=expected)


def scores(pool: RewardPool, *jobs):
    async def together():
        return await asyncio.gather(*(pool.score(one, attempt) for one, attempt in jobs))

    return asyncio.run(together())


@pytest.fixture
def pool():
    made = []

    def make(**settings) -> RewardPool:
        made.append(RewardPool(RewardsConfig(**({"time_s": 2.0, "memory_gib": 2.0} | settings)), []))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    "reward, problem", [("hangs", "longer than 2 s"), ("dies", "ended the process"), ("eats", None), ("raises", None)]
)
def test_no_score_is_none_and_the_next_attempt_is_judged(pool, reward, problem):
    right, pool = (question("exact"), Attempt(answer="7")), pool()
    before, broken, after = scores(pool, right, (question(MINE + reward), Attempt(answer="7")), right)
    assert before.accuracy == after.accuracy == 1.0
    assert broken.accuracy is None and broken.total is None
    assert (problem or "") in (broken.problem or "")


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_weighed(pool, workers):
    own = MINE + "halves"
    weights = {"accuracy": 1.0, "format": 0.1, own: 0.5}
    pool = pool(workers=workers, weights=weights, options={own: {"by": 4}})
    right = Attempt(answer="7", text="7</think>7")
    good, bad, cut = scores(
        pool,
        (question("exact"), right),
        (question("exact"), Attempt(answer="8", text="<tool_call>8")),
        (question("exact"), Attempt(answer="7", text="7", finished=False)),
    )
    assert good.parts == {"accuracy": 1.0, "format": 0.0, own: 0.25} and good.total == pytest.approx(1.125)
    assert bad.total == pytest.approx(-0.1)
    assert cut.accuracy == 0.0  # a limit cut it off


def test_nothing_outlives_the_pool(pool):
    pool = pool()
    scores(pool, (question("exact"), Attempt(answer="7")))
    process = pool._free.queue[0]._popen
    pool.close()
    assert process.poll() is not None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"weights": {"format": 1.0}}, "rewards.weights.accuracy is None"),
        ({"weights": {"accuracy": 1.0, "formt": 1.0}}, "did you mean format"),
        ({"weights": {"accuracy": 1.0, "overlong": 1.0}}, "rewards.options.overlong={length"),
        ({"options": {"format": {"longest": 5}}}, "part without a weight"),
        ({"weights": {"accuracy": 1.0, "format": 1.0}, "options": {"format": {"longst": 5}}}, "did you mean longest"),
        ({"time_s": 0}, "rewards.time_s is 0"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(settings, said):
    with pytest.raises(UserError) as error:
        RewardsConfig(**settings)
    assert said in str(error.value)


def test_a_function_that_is_not_there_is_told_of_before_anything_is_asked(pool):
    with pytest.raises(UserError, match="has no nothing"):
        pool(weights={"accuracy": 1.0, MINE + "nothing": 1.0})
