"""A rollout that is sampled ahead, when the run ends before it."""

import asyncio
import signal
import threading
import time

import pytest

from ernie_model.inference.agent import Agent
from train.reinforcement.groups import Ticket
from train.reinforcement.source import _Flight

LONG_S = 60.0


def flight() -> _Flight:
    agents: dict[tuple[str, ...], Agent] = {}
    return _Flight(need=1, tickets=[Ticket(group=0, prompt=0)], version=0, agents=agents)


async def long():
    await asyncio.sleep(LONG_S)
    return []


def test_one_that_is_given_up_ends_at_once_and_so_does_its_loop():
    """Whether it was asleep, or had not begun."""
    for wait_s in (0.0, 0.2):
        runner, one, begin = asyncio.Runner(), flight(), time.monotonic()
        one.depart(long, runner, ahead=True)
        time.sleep(wait_s)
        one.give_up()
        runner.close()  # RuntimeError while it runs
        assert time.monotonic() - begin < LONG_S / 2


def test_ctrl_c_while_it_is_waited_for_leaves_nothing_behind():
    runner, one, begin = asyncio.Runner(), flight(), time.monotonic()
    one.depart(long, runner, ahead=True)
    interrupt = threading.Timer(1.0, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        one.land()
    one.give_up()
    runner.close()
    assert time.monotonic() - begin < LONG_S / 2


def test_one_that_has_landed_can_be_given_up():
    async def short():
        return []

    runner, one = asyncio.Runner(), flight()
    one.depart(short, runner, ahead=True)
    assert one.land() == []
    one.give_up()
    runner.close()
