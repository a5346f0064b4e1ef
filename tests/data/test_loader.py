"""The stream of batches: the same whatever the ranks, the threads, the cache and the interruptions."""

import json

import pytest
import torch

from data.encoder import Encoder
from data.errors import DataError
from data.fit import Rules
from data.loader import BackgroundStream, PackedStream, eval_batches
from data.quarantine import Quarantine, TooManyBadError

LENGTHS = (6, 9, 4, 12, 7, 5, 8, 10, 4, 11, 6)


@pytest.fixture
def stream(sized, processor):
    def make(lengths=LENGTHS, *, max_tokens=20, max_bad=0.001, cache_bytes=2**20, workers=0, **options):
        encoder = Encoder(
            sized(*lengths),
            processor,
            Rules(max_tokens=max_tokens),
            quarantine=Quarantine(max_bad=max_bad),
            cache_bytes=cache_bytes,
            workers=workers,
        )
        return PackedStream(encoder, **{"seed": 0, "lookahead": 4, **options})

    return make


def ids(steps):
    """[[ids of row, ...] per step, ...]"""
    return [[row.ids for row in step] for step in steps]


def steps_of(stream, count):
    return [stream.next_step() for _ in range(count)]


def test_one_rank_without_accumulation_by_hand(stream):
    steps = steps_of(stream((6, 9, 4, 12), shuffle=False), 3)

    #       0:6 1:9 2:4 3:12 | 0:6 1:9 2:4 3:12 | ...          20 tokens a row, buffer of 4
    # row   0 1 2 (19)   waiting 3 0 1 2        then 3:12 0:6 (18)   waiting 1 2 3 0     then 1:9 2:4 0:6 (19)
    assert ids(steps) == [[("0", "1", "2")], [("3", "0")], [("1", "2", "0")]]


def test_ranks_share_the_rows_of_one(stream):
    """Accumulation 4 on one rank, 2 on two, 1 on four: step for step the same rows."""
    alone = ids(steps_of(stream(accumulation=4), 6))

    for world in (2, 4):
        shares = [ids(steps_of(stream(accumulation=4 // world, rank=rank, world=world), 6)) for rank in range(world)]
        for step, rows in enumerate(alone):
            assert all(len(share[step]) == 4 // world for share in shares)  # nobody waits alone
            assert sorted(row for share in shares for row in share[step]) == sorted(rows)


def test_every_record_once_per_epoch(stream):
    """A row runs over the border of an epoch, so look at the first draws: 3 epochs, less what still waits."""
    source = stream()
    seen = []
    while source.report.epoch < 3:
        seen += [id for row in source.next_step() for id in row.ids]

    counts = [seen.count(str(index)) for index in range(len(LENGTHS))]
    assert min(counts) >= 2 and max(counts) <= 4
    assert source.report.epoch == len(seen) / len(LENGTHS)


def equal(steps, others):
    for step, other in zip(steps, others, strict=True):
        for row, same in zip(step, other, strict=True):
            assert row.ids == same.ids
            assert row.lengths == same.lengths
            for name in ("token_T", "target_T", "weight_T", "position_3T"):
                assert torch.equal(getattr(row, name), getattr(same, name))


@pytest.mark.parametrize("cut", range(8))
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_is_never_stopping(stream, cut, workers):
    whole = steps_of(stream(accumulation=2), 12)
    first = stream(accumulation=2, workers=workers)
    first = BackgroundStream(first) if workers else first
    equal(steps_of(first, cut), whole[:cut])
    state = json.loads(json.dumps(first.state_dict()))
    report = first.report
    first.close()

    second = stream(accumulation=2, workers=workers)
    second = BackgroundStream(second) if workers else second
    second.load_state_dict(state)

    assert second.report == report
    equal(steps_of(second, 12 - cut), whole[cut:])
    second.close()


def test_another_number_of_ranks_may_continue(stream):
    whole = ids(steps_of(stream(accumulation=2), 8))
    first = stream(accumulation=1, rank=1, world=2)
    steps_of(first, 3)

    second = stream(accumulation=2)
    second.load_state_dict(first.state_dict())

    assert ids(steps_of(second, 5)) == whole[3:]


@pytest.mark.parametrize("cache_bytes", [0, 900])
def test_a_small_cache_only_costs_time(stream, cache_bytes):
    equal(steps_of(stream(cache_bytes=cache_bytes), 12), steps_of(stream(), 12))


def test_the_cache_encodes_each_record_once(stream, processor):
    source = stream()
    steps_of(source, 20)

    assert source.report.epoch > 3
    assert len(processor.encoded) == len(LENGTHS)


def test_the_cache_stays_within_its_bytes(stream):
    source = stream(cache_bytes=2000)
    for _ in range(10):
        source.next_step()
        kept = sum(example.num_bytes for example in source.encoder._kept.values())
        assert kept == source.encoder._kept_bytes <= 2000


def test_a_rank_encodes_only_its_rows_once_all_are_measured(stream, processor):
    source = stream(rank=0, world=2, cache_bytes=0, workers=1)
    while source.report.epoch < 2:
        source.next_step()
    before, rows = len(processor.encoded), 0
    for _ in range(5):
        rows += sum(len(row.ids) for row in source.next_step())
    source.close()

    assert len(processor.encoded) - before == rows
    assert not source.encoder._measuring


@pytest.mark.parametrize("workers", [0, 2])
def test_too_long_is_quarantined_and_counted(stream, workers):
    source = stream((6, 21, 4), workers=workers)
    seen = {id for step in steps_of(source, 6) for row in step for id in row.ids}
    source.close()

    assert seen == {"0", "2"}
    (refusal,) = source.encoder.quarantine.refusals
    assert (refusal.id, refusal.dataset, refusal.stage.value) == ("1", "test", "size")
    assert "record '1': 21 tokens, more than a row holds (data.max_tokens=20)" in refusal.reason
    assert source.report.num_refused >= 3


def test_nothing_but_too_long_is_an_error_not_an_endless_search(stream):
    with pytest.raises(DataError, match="none of 2 records of test can be used"):
        stream((21, 22)).next_step()


def test_fill_is_tokens_per_place(stream):
    source = stream((8, 8), max_tokens=20)  # two of 8 in every row of 20
    steps_of(source, 3)

    assert source.report.fill == pytest.approx(16 / 20)
    assert source.report.num_rows == 3


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (2, 1), (1, 3)])
def test_count_steps_is_when_the_epochs_are_packed(stream, accumulation, world):
    source = stream(accumulation=accumulation, world=world)
    count = source.count_steps(2)

    sources = [stream(accumulation=accumulation, rank=rank, world=world) for rank in range(world)]
    seen = []
    for _ in range(count):
        seen += [id for each in sources for row in each.next_step() for id in row.ids]
    # The endless stream fills the last rows with the third epoch, so it may lag by what waits in the buffer.
    assert len(seen) + 4 >= 2 * len(LENGTHS)
    assert len(seen) <= 2 * len(LENGTHS) + 3 * accumulation * world
    equal(steps_of(source, 3), steps_of(stream(accumulation=accumulation, world=world), 3))  # counting moved nothing


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"seed": 1}, r"data.seed was 0 .* and is 1 now"),
        ({"max_tokens": 24}, "data.max_tokens was 20 .* and is 24 now"),
        ({"lookahead": 5}, "data.lookahead was 4 .* and is 5 now"),
        ({"lengths": (6, 9, 4, 12, 7, 5, 8, 10, 4, 11, 7)}, "content of the records"),
    ],
)
def test_resuming_on_something_else_is_refused(stream, changed, key):
    state = stream().state_dict()

    with pytest.raises(DataError, match=f"cannot resume: .*{key}"):
        stream(**changed).load_state_dict(state)


def test_workers_measure_like_the_calling_thread(stream):
    """Through a window of records that spans epochs and meets some of them twice."""
    sources = [stream(LENGTHS[:3], workers=workers) for workers in (0, 2)]

    assert len({source.count_steps(4) for source in sources}) == 1
    assert not sources[1].encoder._measuring
    for source in sources:
        source.close()


def test_an_error_in_the_background_comes_at_its_step(stream):
    lengths = (*[6] * 12, 21)  # unshuffled: three rows' worth of records, and then one too long
    foreground = stream(lengths, shuffle=False, max_bad=0)
    good = 0
    with pytest.raises(TooManyBadError):
        while True:
            foreground.next_step()
            good += 1

    background = BackgroundStream(stream(lengths, shuffle=False, max_bad=0, workers=2))
    steps_of(background, good)
    for _ in range(2):
        with pytest.raises(TooManyBadError, match="record '12'"):
            background.next_step()
    background.close()


@pytest.mark.parametrize("options", [{"accumulation": 0}, {"rank": 2, "world": 2}])
def test_impossible_settings(stream, options):
    with pytest.raises(DataError, match=next(iter(options))):
        stream(**options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_shows_every_record_once(sized, processor, world, workers):
    encoders = [Encoder(sized(*LENGTHS), processor, Rules(max_tokens=20), workers=workers) for _ in range(world)]
    shares = [list(eval_batches(encoder, rank=rank, world=world)) for rank, encoder in enumerate(encoders)]
    for encoder in encoders:
        assert not encoder._measuring
        encoder.close()

    assert len({len(share) for share in shares}) == 1  # every rank loops equally often
    seen = [id for share in shares for row in share if row is not None for id in row.ids]
    assert sorted(map(int, seen)) == list(range(len(LENGTHS)))


def test_evaluation_gives_the_same_rows_with_workers(sized, processor):
    rows = []
    for workers in (0, 2):
        encoder = Encoder(sized(*LENGTHS), processor, Rules(max_tokens=20), workers=workers)
        rows.append([row.ids for row in eval_batches(encoder, lookahead=1)])
        encoder.close()

    assert rows[0] == rows[1]
    assert [id for row in rows[0] for id in row] == [str(index) for index in range(len(LENGTHS))]


def test_evaluation_leaves_out_what_is_too_long(sized, processor):
    encoder = Encoder(sized(6, 21, 7), processor, Rules(max_tokens=20))

    assert [row.ids for row in eval_batches(encoder) if row] == [("0", "2")]
    assert [refusal.id for refusal in encoder.quarantine.refusals] == ["1"]
