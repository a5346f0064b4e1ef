"""`ernie rl` on every kind of layout asks, judges and learns what one process does. Ranks end their attempts at
different times, and some have pictures and others none."""

from functools import cache
from pathlib import Path

import pytest

from tests.distributed.gloo import launch
from tests.distributed.rollouts import CASES, MIDDLE, RESUMED, Case, middle, run
from tests.distributed.test_preferences import check_weights, lines
from tests.rollouts import write_prompts

pytestmark = pytest.mark.timeout(1200)  # 8 runs in one start of two processes
TOLERANCE = 1e-5
"""Of float32 sums in another order."""
NUMBERS = ("loss", "reward", "accuracy", "tokens_mean", "eval_accuracy", "ratio_mean")
COUNTS = ("groups_asked", "groups_learned", "rollout_queue", "rollout_rounds", "tokens", "units", "patches", "skipped")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    write_prompts(folder := tmp_path_factory.mktemp("data"))
    return folder


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(2, "-m", "tests.distributed.rollouts", str(data), str(folder), limit_s=800)
    return folder


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")

    @cache
    def get(case: Case) -> Path:
        place = folder / str(get.cache_info().misses)
        run(case, data, place)
        return place

    return get


def check_metrics(here: Path, alone: Path, since: int = 0) -> None:
    mine, its = ([one for one in lines(folder / "metrics.jsonl") if one["step"] > since] for folder in (here, alone))
    for a, b in zip(mine, its, strict=True):
        for key in COUNTS:
            assert a.get(key) == b.get(key), (a["step"], key)
        for key in NUMBERS:
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=TOLERANCE, abs=TOLERANCE), (a["step"], key)
        assert a.get("grad_norm", 0.0) == pytest.approx(b.get("grad_norm", 0.0), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_process_learns(two, one, name):
    alone = one(CASES[name].alone)
    assert any(line.get("groups_learned", 0) > 2 for line in lines(alone / "metrics.jsonl"))
    check_metrics(two / name, alone)
    check_weights(two / name, alone)


@pytest.mark.parametrize("name", RESUMED)
def test_a_rollout_goes_on_elsewhere(two, one, name):
    source, case = RESUMED[name]
    alone = one(CASES[source].alone)
    assert middle(alone).exists()
    check_metrics(two / name, alone, since=MIDDLE)
    check_weights(two / name, alone)
