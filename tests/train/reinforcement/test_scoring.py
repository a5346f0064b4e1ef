"""Rewards run in processes: what hangs, dies or takes too much costs its own attempt alone."""

import asyncio
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ernie_model.inference.agent import Episode, Status
from tests.programs import Program
from train.config import UserError
from train.reinforcement.groups import Scored, Scores
from train.reinforcement.scoring import RewardPool
from train.rewards import judging
from train.rewards.base import Attempt
from train.rl_config import RewardsConfig

MINE = "python:tests.train.reinforcement.own_rewards."
SEVEN = Attempt(answer="7", text="7")


def question(reward="exact", expected="7", thinking=False, **options):
    return SimpleNamespace(reward_name=reward, options=options, expected=expected, thinking=thinking)


def scores(pool: RewardPool, *jobs):
    async def together():
        return await asyncio.gather(*(pool.score(one, attempt) for one, attempt in jobs))

    return asyncio.run(together())


@pytest.fixture
def pool():
    made = []

    def make(questions=(), **settings) -> RewardPool:
        made.append(RewardPool(RewardsConfig(**({"time_s": 20.0, "memory_gib": 1.0} | settings)), questions))
        return made[-1]

    yield make
    for one in made:
        one.close()


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be counted by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def comes_true(holds, within_s=10.0) -> bool:
    end = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


BAD = {
    "dies": "ended its process",
    "leaves": "raised SystemExit",
    "eats": "too much memory (rewards.memory_gib)",
    "raises": "raised RuntimeError: broken (own_rewards.py:",
    "returns_two": "returned 2.0, which is not in [0, 1]",
    "returns_nan": "returned nan",
    "does_not_know": "cannot tell",
}


def test_no_score_is_none_and_others_are_judged(pool):
    jobs = [job for name in BAD for job in ((question(), SEVEN), (question(MINE + name), SEVEN))]
    results = scores(pool(), *jobs)
    for (name, why), right, bad in zip(BAD.items(), results[::2], results[1::2], strict=True):
        assert right.accuracy == right.total == 1.0 and right.problem is None, name
        assert bad.accuracy is None and bad.total is None, name
        assert why in bad.problem and name in bad.problem, bad.problem


def test_one_that_hangs_is_killed_with_all_it_started(pool, tmp_path):
    pids, pool = tmp_path / "pid", pool(time_s=1.0)
    begin = time.monotonic()
    bad, good = scores(pool, (question(MINE + "hangs", str(pids)), SEVEN), (question(), SEVEN))
    assert "took longer than 1 s (rewards.time_s)" in bad.problem and bad.accuracy is None
    assert good.accuracy == 1.0  # waiting did not count as its time
    assert time.monotonic() - begin < 15
    assert comes_true(lambda: gone(int(pids.read_text())))


def test_without_processes_the_same_but_limits(pool):
    names = [name for name in BAD if name not in ("dies", "eats")]
    results = scores(pool(workers=0), (question(), SEVEN), *((question(MINE + name), SEVEN) for name in names))
    assert results[0].accuracy == 1.0
    for name, bad in zip(names, results[1:], strict=True):
        assert bad.accuracy is None and BAD[name] in bad.problem


def test_what_it_prints_does_no_harm(pool):
    assert scores(pool(), (question(MINE + "prints"), SEVEN))[0].accuracy == 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_weighed(pool, workers):
    own = MINE + "halves"
    weights = {"accuracy": 0.5, "format": 0.1, own: 0.5, "cosine": 2.0}
    pool = pool(workers=workers, weights=weights, options={own: {"by": 4}, "cosine": {"length": 100}})
    good, bad, cut, thought, unknown = scores(
        pool,
        (question(), Attempt(answer="7", text="7", num_tokens=50)),
        (question(), Attempt(answer="8", text="<tool_call>8", num_tokens=100)),
        (question(), Attempt(answer="7", text="7", num_tokens=100, finished=False)),
        (question(thinking=True), Attempt(answer="7", text="hm</think>7")),
        (question(MINE + "does_not_know"), SEVEN),
    )
    assert good.parts == {"accuracy": 1.0, "format": 0.0, own: 0.25, "cosine": 0.75}
    assert good.total == pytest.approx(0.5 + 0.125 + 1.5)
    assert bad.parts == {"accuracy": 0.0, "format": -1.0, own: 0.0, "cosine": -0.5}
    assert bad.total == pytest.approx(-0.1 - 1)
    assert cut.accuracy == 0.0 and cut.parts["format"] == -1.0  # a limit cut it off
    assert thought.parts["format"] == 0.0 and scores(pool, (question(), SEVEN))[0].parts["format"] == 0.0
    assert unknown.total is None and unknown.parts["cosine"] is None


def test_a_part_that_fails_leaves_the_accuracy_and_no_total(pool):
    own = MINE + "minus_nine"
    (one,) = scores(pool(weights={"accuracy": 1.0, own: 0.1}), (question(), SEVEN))
    assert one.accuracy == 1.0 and one.total is None and one.parts[own] is None
    assert "returned -9, which is not in [-1, 1]" in one.problem


def test_parts_that_compare_attempts_come_last(pool):
    def scored(tokens: int, right: float | None) -> Scored:
        episode = Episode([1] * tokens, [], [], sampled=[True] * tokens, status=Status.ANSWERED, answer="7")
        return Scored(episode=episode, scores=Scores(parts={"accuracy": right}, accuracy=right, total=right))

    group = [scored(1, 1.0), scored(3, 1.0), scored(3, None)]
    done = pool(weights={"accuracy": 1.0, "shorter": 0.5}).compared(group)
    assert [one.scores.total for one in done] == [1.25, 0.75, None]
    assert [one.scores.parts["shorter"] for one in done] == [0.5, -0.5, None]
    assert pool().compared(group) == tuple(group)


def test_an_attempt_that_the_engine_could_not_make_has_no_score(pool):
    (one,) = scores(pool(), (question(), Attempt(answer="", finished=False, problem="no memory left")))
    assert one.accuracy is None and one.problem == "no memory left"


def test_an_answer_that_says_everything_is_wrong(pool):
    """Reference 4.4: more than 1,000 characters, but not where the right one is long itself."""
    long, right = "7" + " " * 1000, "7" * 300
    pool = pool(weights={"accuracy": 1.0, "format": 0.1})
    spoken, allowed, beyond = scores(
        pool,
        (question("number"), Attempt(answer=long, text=long)),
        (question("edit_distance", right), Attempt(answer="7" * 1200, text="7" * 1200)),
        (question("edit_distance", right), Attempt(answer="7" * 1201, text="7" * 1201)),
    )
    assert spoken.parts == {"accuracy": 0.0, "format": -1.0}
    assert allowed.parts == {"accuracy": 0.25, "format": 0.0}
    assert beyond.parts == {"accuracy": 0.0, "format": -1.0}


def test_endless_mathematics_has_no_score(pool):
    """Neither verifier nor signal ends it; the process is killed. 0 would teach that it is wrong (reference 4.4)."""
    ask = question("math")
    pool = pool([ask], time_s=3.0)
    endless, right = scores(pool, (ask, Attempt(answer="\\boxed{9^{9^{9}}}")), (ask, Attempt(answer="\\boxed{7}")))
    assert endless.accuracy is None and "took longer" in endless.problem and right.accuracy == 1.0


def test_the_same_whichever_process_judges(pool):
    jobs = [(question("edit_distance", "abcdefgh"), Attempt(answer="abcdefgh"[:n], text="x")) for n in range(9)] * 3
    one, two = scores(pool(), *jobs), scores(pool(workers=2), *jobs)
    assert one == two and len({each.accuracy for each in one}) == 9


# ------------------------------------------------------------------------------------------------------------- the end


def test_nothing_outlives_the_pool_even_while_it_hangs(pool, tmp_path):
    pids, pool = tmp_path / "pid", pool(workers=2, time_s=60.0)

    async def hang_and_close():
        tasks = [asyncio.ensure_future(pool.score(question(MINE + "hangs", str(pids)), SEVEN)) for _ in range(4)]
        while not pids.exists() or not pids.read_text():
            await asyncio.sleep(0.05)
        await asyncio.to_thread(pool.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    begin = time.monotonic()
    workers = [worker._popen for worker in pool.judges._workers]
    assert len(workers) == 2 and all(process.returncode is None for process in workers)
    assert all(isinstance(one, BaseException) for one in asyncio.run(hang_and_close()))
    assert time.monotonic() - begin < 30
    assert all(process.returncode is not None for process in workers)
    assert comes_true(lambda: gone(int(pids.read_text())))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_program_that_is_killed(tmp_path, how):
    pids = tmp_path / "pid"
    program = f"""
        import asyncio
        from types import SimpleNamespace
        from train.reinforcement.scoring import RewardPool
        from train.rewards.base import Attempt
        from train.rl_config import RewardsConfig
        pool = RewardPool(RewardsConfig(time_s=60.0))
        print(pool.judges._workers[0]._popen.pid, flush=True)
        asked = SimpleNamespace(reward_name="{MINE}hangs", options={{}}, expected="{pids}", thinking=False)
        asyncio.run(pool.score(asked, Attempt(answer="7")))
    """
    running = Program(["-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None
        worker = int(running.stdout.readline())
        assert comes_true(lambda: pids.exists() and pids.read_text() != "") and not gone(worker)
        running.send_signal(how)
        running.wait(10)
        assert comes_true(lambda: gone(worker) and gone(int(pids.read_text())))
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


# ---------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"weights": {"format": 1.0}}, "rewards.weights.accuracy is None"),
        ({"weights": {"accuracy": 1.0, "formt": 1.0}}, "did you mean format"),
        ({"weights": {"accuracy": 1.0, "format": float("nan")}}, "rewards.weights.format is nan"),
        ({"weights": {"accuracy": 1.0, "overlong": 1.0}}, "needs rewards.options.overlong.length"),
        (
            {"weights": {"accuracy": 1.0, "overlong": 1.0}, "options": {"overlong": {"length": 5, "cache": 9}}},
            "cache is 9 and length 5",
        ),
        (
            {"weights": {"accuracy": 1.0, "overlong": 1.0}, "options": {"overlong": {"length": "a", "cache": 9}}},
            "rewards.options.overlong is",
        ),
        ({"weights": {"accuracy": 1.0, "cosine": 1.0}}, "needs rewards.options.cosine.length"),
        ({"options": {"repetition": {"size": 5}}}, "part without a weight"),
        ({"weights": {"accuracy": 1.0, "repetition": 1.0}, "options": {"repetition": {"siz": 5}}}, "did you mean size"),
        ({"weights": {"accuracy": 1.0, "repetition": 1.0}, "options": {"repetition": 5}}, "it must be like"),
        ({"options": {"accuracy": {"a": 1}}}, "`reward_options`"),
        ({"workers": -1}, "rewards.workers is -1"),
        ({"time_s": 0}, "rewards.time_s is 0"),
        ({"memory_gib": 0}, "rewards.memory_gib is 0"),
        ({"longest_answer": 0}, "rewards.longest_answer is 0"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(settings, said):
    with pytest.raises(UserError) as error:
        RewardsConfig(**settings)
    assert said in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_cannot_be_used_is_told_of_before_anything_is_asked(pool, workers):
    with pytest.raises(UserError, match="has no nothing"):
        pool(workers=workers, weights={"accuracy": 1.0, MINE + "nothing": 1.0})
    with pytest.raises(UserError, match="has no nothing"):
        pool([question(MINE + "nothing")], workers=workers)
    with pytest.raises(UserError, match="has no option 'bi'; it has by"):
        own = MINE + "halves"
        pool(workers=workers, weights={"accuracy": 1.0, own: 1.0}, options={own: {"bi": 3}})


def test_a_process_that_does_not_start_is_told_of(pool, monkeypatch):
    monkeypatch.setattr(judging, "START_S", 0.0)
    with pytest.raises(UserError, match="did not start within 0 s"):
        pool()
