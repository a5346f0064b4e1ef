"""Ranks that die in every way; test_peers.py reads what they said.

python -m tests.distributed.peers_cases FOLDER

The ranks of every case are forks of this process, which imports PyTorch once, and all cases run at the same time.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from tests.distributed.gloo import environments
from train.peers import Peers

SOON = {"beat_s": 0.2, "silent_s": 6.0, "leave_s": 1.0}
LONG_S = 600.0
TIMEOUT_S = 60.0  # of the whole file


def collective() -> None:
    dist.all_reduce(torch.ones(1))


def waits_in_a_collective(rank: int) -> None:
    collective()


def does_not_notice(rank: int) -> None:
    """As a rank in an NCCL kernel, which waits whatever became of the others."""
    time.sleep(LONG_S)


def raises(rank: int) -> None:
    time.sleep(0.5)  # the other one is in its collective by then
    raise ZeroDivisionError("the reason")


def is_killed(rank: int) -> None:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def stands_still(rank: int) -> None:
    """As a rank on a machine that has gone: its connections stay open, and nothing comes."""
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGSTOP)


def waits_too_long(rank: int) -> None:
    dist.all_reduce(torch.ones(1), group=dist.new_group(timeout=timedelta(seconds=2)))


def comes_too_late(rank: int) -> None:
    dist.new_group(timeout=timedelta(seconds=2))
    does_not_notice(rank)


def ends_first(rank: int) -> None:
    collective()


def ends_later(rank: int) -> None:
    collective()
    time.sleep(0.3)


class Case(NamedTuple):
    ranks: tuple[Callable[[int], None], ...]
    machines: tuple[str, ...] = ()
    """Names of machines that the ranks believe to be on; () is the one they are on."""


CASES = {
    "raise": Case((waits_in_a_collective, raises)),
    "raise, unnoticed": Case((does_not_notice, raises)),
    "raise on the one that keeps the store, unnoticed": Case((raises, does_not_notice)),
    "both raise the same": Case((raises, raises)),
    "kill": Case((waits_in_a_collective, is_killed)),
    "kill, unnoticed": Case((does_not_notice, is_killed)),
    "kill the one that keeps the store": Case((is_killed, waits_in_a_collective)),
    "kill on another machine": Case((does_not_notice, does_not_notice, is_killed), machines=("a", "b", "b")),
    "a machine has gone": Case((waits_in_a_collective, stands_still)),
    "the machine of the store has gone": Case((stands_still, waits_in_a_collective)),
    "wait for too long": Case((waits_too_long, comes_too_late)),
    "a good end": Case((ends_first, ends_later)),
}


def rank(case: Case, environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment)
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    me = int(environment["RANK"])
    with Peers(**SOON) as peers:
        if case.machines:
            peers.me = peers.me._replace(machine=case.machines[me], host=f"host-{case.machines[me]}")
        dist.init_process_group("gloo", timeout=timedelta(seconds=LONG_S))
        peers.watch()
        dist.barrier()  # nobody dies before all are watched; until then only the launcher looks after them
        case.ranks[me](me)


def fork(case: Case, environment: dict[str, str], output: Path) -> int:
    """The process number of one rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        rank(case, environment, output)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder: Path) -> None:
    begin = time.monotonic()
    pids = {
        f"{name}.{number}": fork(case, environment, folder / f"{name}.{number}")
        for name, case in CASES.items()
        for number, environment in enumerate(environments(len(case.ranks)))
    }
    stopped = {
        pids[f"{name}.{number}"]
        for name, case in CASES.items()
        for number, act in enumerate(case.ranks)
        if act is stands_still
    }
    ends: dict[int, tuple[int, float]] = {}
    while len(ends) < len(pids) and time.monotonic() - begin < TIMEOUT_S:
        for pid in set(pids.values()) - set(ends):
            if set(pids.values()) - set(ends) <= stopped:
                os.kill(pid, signal.SIGKILL)  # nobody else would
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
        time.sleep(0.05)
    for pid in set(pids.values()) - set(ends):
        os.kill(pid, signal.SIGKILL)
    (folder / "ends.json").write_text(json.dumps({name: ends.get(pid) for name, pid in pids.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
