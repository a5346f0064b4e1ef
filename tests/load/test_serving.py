"""The storm of serving.py, small enough for every day."""

from tests.load import serving


def test_everybody_gets_their_own_and_nothing_is_left():
    found = serving.storm(40, tokens=24)
    assert found["wrong"] == [] and found["left"] == {}
    assert found["distinct answers"] == found["answered"] == 28
    outcomes = found["outcomes"]
    assert outcomes["refused"] >= 4 and outcomes["gone"] >= 1 and outcomes["lagging"] >= 1
    assert outcomes["failed"] == outcomes["timeout"] == outcomes["busy"] == 0
    assert sum(outcomes.values()) >= 36, "who leaves before the head is read is not counted"
