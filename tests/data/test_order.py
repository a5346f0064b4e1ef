"""The order of records."""

import pytest

from data.order import ShuffledOrder


def drawn(order, count):
    return [order.draw() for _ in range(count)]


def test_every_epoch_has_every_record_once_in_its_own_order():
    order = ShuffledOrder(50, seed=0)

    first, second = drawn(order, 50), drawn(order, 50)

    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert (order.epoch, order.position, order.num_drawn) == (2, 0, 100)


def test_the_seed_decides():
    assert drawn(ShuffledOrder(50, seed=1), 50) == drawn(ShuffledOrder(50, seed=1), 50)
    assert drawn(ShuffledOrder(50, seed=1), 50) != drawn(ShuffledOrder(50, seed=2), 50)


def test_unshuffled():
    assert drawn(ShuffledOrder(3, seed=0, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("cut", range(11))
def test_it_continues_where_it_was(cut):
    whole = drawn(ShuffledOrder(5, seed=3), 15)
    order = ShuffledOrder(5, seed=3)
    drawn(order, cut)

    resumed = ShuffledOrder(5, seed=3)
    resumed.load_state_dict(order.state_dict())

    assert drawn(resumed, 15 - cut) == whole[cut:]
    assert order.copy().num_drawn == cut
