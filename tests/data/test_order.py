"""The order of records."""

import json

import pytest

from data.errors import DataError
from data.order import BlockOrder, ConcatOrder, SampledOrder, ShuffledOrder


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


# ---- streams


def blocks(num_records, size=4):
    def length(block):
        return max(0, min(size, num_records - block * size))

    return BlockOrder(length, size=size, seed=3)


def test_a_stream_is_shuffled_within_blocks():
    first, second = drawn(blocks(10), 10), drawn(blocks(10), 20)[10:]

    for epoch in (first, second):
        assert [sorted(epoch[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert first != second and first != list(range(10))


@pytest.mark.parametrize("num_records", [7, 8])  # the last block full, or not
@pytest.mark.parametrize("cut", range(17))
def test_a_stream_continues_in_the_middle_of_a_block(cut, num_records):
    whole = drawn(blocks(num_records), 25)
    order = blocks(num_records)
    drawn(order, cut)

    resumed = blocks(num_records)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))

    assert drawn(resumed, 25 - cut) == whole[cut:]
    assert order.epochs() == pytest.approx(
        0 if cut <= num_records else cut / num_records
    )  # a first epoch has no known end


def test_an_empty_stream_is_an_error():
    with pytest.raises(DataError, match="the stream holds no record"):
        blocks(0).draw()


# ---- mixtures


def sampled(*, weights=(3.0, 1.0), until_all=False, lengths=(6, 4)):
    orders = [ShuffledOrder(length, seed=5, salt=salt) for salt, length in enumerate(lengths)]
    return SampledOrder(orders, weights, seed=5, until_all=until_all)


def test_sets_are_drawn_by_weight_and_each_in_its_own_order():
    keys = drawn(sampled(), 8000)

    # binomial: the standard deviation of the share is sqrt(.75 * .25 / 8000) = 0.5 %
    assert sum(key.set == 0 for key in keys) / 8000 == pytest.approx(0.75, abs=0.02)
    for index, length in enumerate((6, 4)):
        numbers = [key.number for key in keys if key.set == index]
        assert numbers == drawn(ShuffledOrder(length, seed=5, salt=index), len(numbers))


def test_a_weight_of_0_is_never_drawn_and_ends_no_epoch():
    order = sampled(weights=(1.0, 0.0), until_all=True)

    assert {key.set for key in drawn(order, 5000)} == {0}
    assert order.epochs() == 5000 / 6


@pytest.mark.parametrize("until_all", [False, True])
def test_an_epoch_ends_with_the_first_set_or_the_last(until_all):
    order = sampled(until_all=until_all)
    counts = [0, 0]
    while order.epochs() < 1:
        counts[order.draw().set] += 1

    if until_all:
        assert counts[0] >= 6 and counts[1] >= 4 and (counts[0] == 6 or counts[1] == 4)
    else:
        assert counts[0] <= 6 and counts[1] <= 4 and (counts[0] == 6 or counts[1] == 4)


def test_waiting_draws_do_not_count():
    order = ConcatOrder([6, 4], seed=0)
    keys = drawn(order, 10)

    assert order.epochs() == 1 and order.epochs(keys[:5]) == 0.5
    other = sampled()
    keys = drawn(other, 12)
    assert other.epochs(keys) == 0


def test_concat_shows_every_record_once_per_epoch():
    keys = drawn(ConcatOrder([3, 0, 2], seed=1), 10)

    everything = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert sorted(keys[:5]) == sorted(keys[5:]) == everything
    assert keys[:5] != keys[5:]


@pytest.mark.parametrize("make", [sampled, lambda: ConcatOrder([6, 4], seed=5)])
@pytest.mark.parametrize("cut", [0, 1, 7, 4095, 4096, 4100])
def test_a_mixture_continues_where_it_was(make, cut):
    whole = drawn(make(), 4200)
    order = make()
    drawn(order, cut)

    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))

    assert drawn(resumed, 4200 - cut) == drawn(order.copy(), 4200 - cut) == whole[cut:]
