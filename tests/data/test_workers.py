"""Threads that work ahead: who is slow is named, who is dead is replaced."""

import threading

import pytest

from data.encoder import Encoder
from data.errors import DataError
from data.fit import Rules
from data.loader import PackedStream
from data.workers import StuckError, Workers


@pytest.fixture
def gate():
    """Work that waits until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_results_and_errors_come_back():
    workers = Workers(2)
    good, bad = workers.submit(lambda: 7), workers.submit(lambda: int("x"))

    assert workers.result(good, lambda: "good") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        workers.result(bad, lambda: "bad")
    timed_out = workers.submit(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    with pytest.raises(TimeoutError, match="its own"):
        workers.result(timed_out, lambda: "late")
    workers.close()


def test_the_slow_are_named_once_and_waited_for(caplog, gate):
    workers = Workers(1, slow_s=0.05, dead_s=30)
    future = workers.submit(lambda: gate.wait(0.4))
    workers.result(future, lambda: "record 'clip-7' (clips.jsonl:7)")
    workers.close()

    (said,) = caplog.messages
    assert said.startswith("still working on record 'clip-7' (clips.jsonl:7) after")


def test_the_dead_are_given_up_and_replaced(gate):
    workers = Workers(1, slow_s=0.05, dead_s=0.2)
    stuck, next_one = workers.submit(gate.wait), workers.submit(lambda: "done")

    with pytest.raises(StuckError, match=r"record 'x': not finished after .* \(data.dead_s=0.2\)"):
        workers.result(stuck, lambda: "record 'x'")
    assert workers.result(next_one, lambda: "record 'y'") == "done"
    workers.close()  # does not wait for the dead


def test_a_record_waiting_for_its_turn_is_not_slow(caplog):
    """The clock starts when the work does."""
    workers = Workers(1, slow_s=0.3, dead_s=0.6)
    futures = [workers.submit(lambda: threading.Event().wait(0.15)) for _ in range(6)]
    for future in reversed(futures):
        workers.result(future, lambda: "it")
    workers.close()

    assert not caplog.messages


def test_a_record_that_never_gets_measured_ends_the_run_by_name(sized, processor, gate, monkeypatch):
    """All ranks must agree on the rows, so a size that is not known cannot be left out by one of them."""
    encode = processor.encode
    monkeypatch.setattr(processor, "encode", lambda *a, **k: gate.wait() if "qqq" in str(a) else encode(*a, **k))
    encoder = Encoder(sized(5, 5, 7, 5), processor, Rules(max_tokens=10), slow_s=0.05, dead_s=0.2)
    stream = PackedStream(encoder, seed=0, shuffle=False, lookahead=1)

    with pytest.raises(DataError, match="record '2': not finished after"):
        stream.next_step()
    stream.close()
