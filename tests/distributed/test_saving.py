"""What one rank cannot write, none has written."""

import json

import pytest

from tests.distributed.gloo import launch
from tests.distributed.saving import FAULTS
from train import checkpoint

SAID = {
    "rank 1 has no room": "the disk is full: ",
    "rank 0 has no room": "the disk is full: ",
    "rank 0 cannot seal": "step-000002 cannot be written ([Errno 5] Input/output error). Nothing was changed",
    "rank 1 sees another disk": "which rank 0 has just made. run.folder must be on a disk that all machines share.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    launch(2, "-m", "tests.distributed.saving", str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("fault", FAULTS)
def test_both_refuse_with_the_same_words_and_nothing_is_left(ranks, fault):
    assert SAID[fault] in ranks[0][fault] and ranks[0][fault] == ranks[1][fault]
    assert ranks[0][f"left by: {fault}"] == ["step-000001"]


def test_a_mistake_in_the_program_is_raised_where_it_is_and_told_elsewhere(ranks):
    assert ranks[1]["a mistake"] == "ValueError: a mistake in the program"
    assert ranks[0]["a mistake"].startswith("UserError: ")
    assert "step-000002: rank 1 failed. ValueError: a mistake in the program" in ranks[0]["a mistake"]


def test_ranks_that_look_at_different_disks(ranks):
    said = ranks[0]["looks elsewhere"], ranks[1]["looks elsewhere"]
    assert all(
        "rank 0 sees 2, rank 1 sees 0 checkpoints. run.folder must be on a disk that all" in text for text in said
    )


@pytest.mark.parametrize("shard", [0, 1])
def test_damage_is_found_by_whoever_reads_it_and_known_to_all(ranks, shard):
    problem = f"{checkpoint.shard_name(shard)} does not have the checksum it was written with"
    assert ranks[0][f"damage {shard}"] == ranks[1][f"damage {shard}"] == ["step-000001", {"step-000002": problem}]


def test_what_was_written_in_the_end_is_whole(folder):
    newest, problems = checkpoint.newest_undamaged(folder / "checkpoints")
    assert newest == folder / "checkpoints" / "step-000002" and not problems
    assert {path.name for path in newest.iterdir()} == {
        checkpoint.shard_name(0), checkpoint.shard_name(1), checkpoint.RANDOM, checkpoint.STATE
    }  # fmt: skip
