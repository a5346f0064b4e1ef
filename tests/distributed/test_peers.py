"""A rank that dies, in whatever way, ends the others soon; what happened is said once and first."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.gloo import ROOT
from tests.distributed.peers_cases import CASES, SOON, TIMEOUT_S
from train.peers import BEAT_S, LEAVE_S, SILENT_S, Process

HOST = socket.gethostname()


class Outcome(NamedTuple):
    codes: list[int | None]
    seconds: float
    """From the first end to the last."""
    said: list[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    folder: Path = tmp_path_factory.mktemp("peers")
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.peers_cases", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=TIMEOUT_S + 60,
    )
    ends = json.loads((folder / "ends.json").read_text())
    out = {}
    for name in CASES:
        ranks = range(len(CASES[name].ranks))
        ended = [ends[f"{name}.{rank}"] or (None, TIMEOUT_S) for rank in ranks]
        first, *_, last = sorted(seconds for _, seconds in ended)
        said = [(folder / f"{name}.{rank}").read_text() for rank in ranks]
        out[name] = Outcome([code for code, _ in ended], last - first, said)
    return out


# The tests shorten the times; a real run ends within a minute by its own.
assert SILENT_S + 2 * BEAT_S + LEAVE_S < 60
SOON_ENOUGH_S = SOON["silent_s"] + 15  # room for a machine that has other things to do
LOST = "has ended without a word"


@pytest.mark.parametrize(
    "case, dead", [("raise", 1), ("raise, unnoticed", 1), ("raise on the one that keeps the store, unnoticed", 0)]
)
def test_a_rank_that_raises_ends_the_other_and_its_traceback_is_all_that_is_said(outcomes, case, dead):
    outcome = outcomes[case]
    assert outcome.codes == [1, 1] and outcome.seconds < SOON_ENOUGH_S
    said = outcome.said[dead] + outcome.said[1 - dead]
    assert said.startswith(f"rank {dead} on {HOST} failed:\nTraceback")
    assert said.rstrip().endswith("ZeroDivisionError: the reason")
    assert said.count("Traceback") == 1  # not what gloo says of a partner that has gone


@pytest.mark.parametrize("case, dead", [("kill", 1), ("kill, unnoticed", 1), ("kill the one that keeps the store", 0)])
def test_a_rank_that_is_killed_is_named(outcomes, case, dead):
    outcome = outcomes[case]
    assert outcome.codes[dead] == -9 and outcome.codes[1 - dead] == 1 and outcome.seconds < SOON_ENOUGH_S
    said = outcome.said[1 - dead]
    assert f"rank {dead} on {HOST} (process" in said and said.count(LOST) == 1
    assert "Traceback" not in said


def test_a_machine_tells_the_others_which_of_its_ranks_has_ended(outcomes):
    """They would know it by the silence only; every machine says it once."""
    outcome = outcomes["kill on another machine"]
    assert outcome.codes == [1, 1, -9] and outcome.seconds < SOON["silent_s"]
    assert all(said.startswith("rank 2 on host-b (process") and said.count(LOST) == 1 for said in outcome.said[:2])


def test_a_rank_that_gives_no_sign_of_life_is_named(outcomes):
    """It may lie on another machine, so only its silence tells."""
    outcome = outcomes["a machine has gone"]
    assert outcome.codes[0] == 1 and outcome.seconds < SOON_ENOUGH_S
    assert outcome.said[0].startswith(f"rank 1 on {HOST} has given no sign of life for 6 seconds")


def test_a_store_that_does_not_answer_does_not_hold_the_watch(outcomes):
    outcome = outcomes["the machine of the store has gone"]
    assert outcome.codes[1] == 1 and outcome.seconds < SOON_ENOUGH_S
    assert outcome.said[1].startswith(f"rank 1 on {HOST} cannot reach the store at 127.0.0.1")


def test_after_parallel_timeout_s_all_ranks_say_where_they_stand(outcomes):
    outcome = outcomes["wait for too long"]
    assert outcome.codes == [1, 1] and outcome.seconds < SOON_ENOUGH_S
    waiting, late = outcome.said
    first = waiting if waiting.startswith("rank 0 on") else late  # whoever of the machine is quicker says the reason
    assert first.startswith("rank 0 on") and "Timed out" in first
    assert "in all_reduce" in first and "in does_not_notice" in late and "Thread 0x" in waiting


def test_a_good_end_says_nothing(outcomes):
    """Rank 0, which keeps the store, is done first."""
    assert outcomes["a good end"] == Outcome([0, 0], outcomes["a good end"].seconds, ["", ""])


def test_the_same_error_of_several_ranks_is_said_once(outcomes):
    outcome = outcomes["both raise the same"]
    assert outcome.codes == [1, 1]
    assert "".join(outcome.said).count("Traceback") == 1


def test_a_process_that_nobody_waited_for_has_ended():
    me = Process.this()
    assert not me.has_ended(seen_from=me)
    child = subprocess.Popen([sys.executable, "-c", ""])
    other = me._replace(pid=str(child.pid), began=Path(f"/proc/{child.pid}/stat").read_text().split()[21])
    assert not other.has_ended(seen_from=me) or child.poll() is not None
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and the kernel still keeps it
    assert other.has_ended(seen_from=me)
    child.wait()
    assert other.has_ended(seen_from=me)
    assert me._replace(began="1").has_ended(seen_from=me)  # another process has its number now
    assert not other.has_ended(seen_from=me._replace(machine="another"))  # not for this machine to say
