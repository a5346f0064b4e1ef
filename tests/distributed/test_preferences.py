"""`ernie dpo` on every kind of layout computes what one process computes, and sees the same pairs in every update."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.gloo import launch
from tests.distributed.preferences import CASES, MIDDLE, RESUMED, STEPS, Case, middle, run
from tests.preferences import write_preferences

pytestmark = pytest.mark.timeout(1200)  # 13 runs in one start of two processes
TOLERANCE = 1e-5
"""Of float32 sums in another order through four updates; log-ratios are differences of numbers ten times as large."""
NUMBERS = ("loss", "kl", "eval_loss", "eval_margin", "eval_reward_chosen", "reward_margin", "reward_chosen")
COUNTS = ("tokens", "units", "patches", "skipped", "eval_total", "eval_accuracy", "degenerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    write_preferences(folder := tmp_path_factory.mktemp("data"))
    return folder


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(2, "-m", "tests.distributed.preferences", str(data), str(folder), limit_s=800)
    return folder


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")

    @cache
    def get(case: Case) -> Path:
        place = folder / str(get.cache_info().misses)
        run(case, data, place, 1)
        return place

    return get


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path, ranks: int) -> dict[int, list[str]]:
    """Of every update."""
    seen: dict[int, list[str]] = {}
    for rank in range(ranks):
        for line in lines(folder / "data" / f"rank-{rank}.jsonl"):
            seen.setdefault(line["step"], []).extend(name for row in line["rows"] for name in row)
    return {step: sorted(names) for step, names in seen.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (path for name in ("export", "adapter") for path in (folder / name).glob("*.safetensors"))
    return load_file(file)


def check_metrics(here: Path, alone: Path, since: int = 0) -> None:
    mine, its = ([one for one in lines(folder / "metrics.jsonl") if one["step"] > since] for folder in (here, alone))
    for a, b in zip(mine, its, strict=True):
        assert {key for key in a.keys() ^ b.keys() if not key.startswith("expert_")} == set()
        for key in COUNTS:
            assert a.get(key) == b.get(key), (a["step"], key)
        for key in NUMBERS:
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=TOLERANCE, abs=TOLERANCE), (a["step"], key)
        assert a.get("grad_norm", 0.0) == pytest.approx(b.get("grad_norm", 0.0), rel=1e-4)  # see QUICK


def check_weights(here: Path, alone: Path) -> None:
    mine, its = weights(here), weights(alone)
    assert mine.keys() == its.keys()
    for tensor, value in its.items():
        torch.testing.assert_close(mine[tensor], value, rtol=0, atol=1e-5, msg=tensor)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(two, one, name):
    case = CASES[name]
    check_metrics(two / name, one(case.alone))
    check_weights(two / name, one(case.alone))
    seen = records(two / name, 1 if case.sequence > 1 else 2)
    assert seen == records(one(case.alone), 1) and [*seen] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_layout(two, one, name):
    _, case = RESUMED[name]
    check_metrics(two / name, one(case.alone), since=MIDDLE)
    check_weights(two / name, one(case.alone))
    whole = records(one(case.alone), 1)
    assert records(two / name, 2) == {step: names for step, names in whole.items() if step > MIDDLE}


@pytest.mark.parametrize("name", ["copy, DDP", "average, ZeRO-1"])
def test_a_run_of_two_ranks_goes_on_with_one(two, one, data, tmp_path, name):
    case = CASES[name].alone
    run(case, data, tmp_path / "on", 1, f"run.resume='{middle(two / name)}'")
    check_metrics(tmp_path / "on", one(case), since=MIDDLE)
    check_weights(tmp_path / "on", one(case))
    whole = records(one(case), 1)
    assert records(tmp_path / "on", 1) == {step: names for step, names in whole.items() if step > MIDDLE}
