"""The reference is the same on every layout, and a cache or an average that two ranks wrote opens on one."""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.equality import Alone
from tests.distributed.gloo import launch
from tests.distributed.references import CASES, Case, run
from train import checkpoint
from train.config import ParallelConfig
from train.parallel.layout import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    launch(2, "-m", "tests.distributed.references", str(folder), limit_s=280)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    @cache
    def one(case: Case):
        folder = tmp_path_factory.mktemp("alone")
        return folder, run(case, Alone(), Layout(), ParallelConfig(cpu=True), folder)

    return one


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_reference_of_one(ranks, alone, name):
    case = CASES[name]
    _, one = alone(case.alone)
    numbers: dict[str, list[float]] = {}
    for rank in ranks[: 1 if case.sequence > 1 else 2]:
        assert rank[name]["losses"] == pytest.approx(one.losses, rel=1e-5)
        for record, sums in rank[name]["numbers"].items():
            numbers.setdefault(record, []).extend(sums)
    assert one.losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert {record: sorted(sums) for record, sums in numbers.items()} == {
        record: pytest.approx(sorted(sums), rel=1e-5) for record, sums in one.numbers.items()
    }


def test_the_same_numbers_from_a_copy_and_from_disk(alone):
    (_, copy), (_, cached) = alone(Case()), alone(Case("cache"))
    assert cached.losses == pytest.approx(copy.losses, rel=1e-5)
    for record, sums in copy.numbers.items():
        assert cached.numbers[record] == pytest.approx(sums, rel=1e-5)


def test_an_average_saved_by_two_ranks_is_that_of_one(folder, alone):
    name = "average, experts and ZeRO-2"
    one_folder, _ = alone(CASES[name].alone)
    two, one = (
        checkpoint.folder_of(path / "checkpoints", 2) for path in (folder / name, one_folder)
    )  # fmt: skip
    state = checkpoint.read_state(two)
    assert state["reference"] == {"kind": "copy", "updates": 2}
    theirs, ours = checkpoint.pieces_of(two), checkpoint.pieces_of(one)
    averaged = [tensor for tensor in state["shapes"] if tensor.startswith("reference.")]
    assert len(averaged) > 20
    for tensor in averaged:
        size = torch.Size(state["shapes"][tensor]).numel()
        its, mine = (pieces.read(f"{tensor}/weight", 0, size) for pieces in (theirs, ours))
        torch.testing.assert_close(its, mine, rtol=0, atol=1e-5)
        policy = theirs.read(f"{tensor.removeprefix('reference.')}/weight", 0, size)
        assert "text.experts" not in tensor or not torch.equal(its, policy)
