"""Several datasets as one: shares, what is held out, and a stream of rows that knows neither workers nor ranks."""

import json

import pytest

from data.dataset import ListDataset, SetSpec
from data.encoder import Encoder
from data.errors import DataError
from data.fit import Rules
from data.formats import messages
from data.loader import BackgroundStream, PackedStream
from data.mixture import Mix, Mixture, MixtureSet, Modality, Share, Stop, open_mixture
from data.records import write_jsonl


@pytest.fixture
def write(tmp_path, talk):
    def make(name, count, letters=1):
        records = [messages.write(talk(f"{name}{i}", "q" * (letters + i % 3), "x")) for i in range(count)]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", records))

    return make


@pytest.fixture
def listed(talk):
    def make(name, count=3, **options):
        return MixtureSet(name, ListDataset(name, [talk(f"{name}{i}", "q", "x") for i in range(count)]), **options)

    return make


def test_weights_are_shares_of_the_draws(listed):
    mixture = Mixture([listed("a", weight=3.0), listed("b")])

    assert mixture.weights == [0.75, 0.25] and mixture.name == "a + b" and len(mixture) == 6


def test_a_ratio_scales_the_sets_of_each_modality_together(listed):
    text, image = Modality.TEXT, Modality.IMAGE
    sets = [listed("a", weight=3.0), listed("b"), listed("c", weight=5.0, modality=image)]  # a and b: by their records

    mixture = Mixture(sets, modality_ratio={text: 1, image: 3})
    assert mixture.weights == [0.25 * 3 / 4, 0.25 * 1 / 4, 0.75]
    assert Mixture(sets, modality_ratio={text: 1, image: 0}).weights == [0.75, 0.25, 0.0]
    with pytest.raises(DataError, match="says nothing of image, and c holds it"):
        Mixture(sets, modality_ratio={text: 1})
    with pytest.raises(DataError, match="asks for 2 parts of video, and no set holds it"):
        Mixture(sets, modality_ratio={text: 1, image: 1, Modality.VIDEO: 2})
    with pytest.raises(DataError, match="every weight of the mixture is 0"):
        Mixture(sets, modality_ratio={text: 0, image: 0})


def test_the_fingerprint_tells_mixtures_apart(listed):
    def print_of(*sets, **options):
        return Mixture(sets, **options).fingerprint

    base = print_of(listed("a"), listed("b"))
    assert base == print_of(listed("a"), listed("b"))
    others = [
        print_of(listed("a", weight=2.0), listed("b")),
        print_of(listed("a"), listed("b", 4)),
        print_of(listed("a"), listed("b"), stop=Stop.LAST),
        print_of(listed("a"), listed("b"), mix=Mix.CONCAT),
    ]
    assert len({base, *others}) == 5


def test_parts_are_opened_and_held_out_by_name(write):
    shares = {
        "a": Share(spec=SetSpec(path=write("a", 10)), weight=2.0),
        "b": Share(spec=SetSpec(path=write("b", 4))),
    }
    parts = open_mixture(shares, eval_fraction=0.5)

    assert [(one.name, len(one.dataset)) for one in parts.train.sets] == [("a", 5), ("b", 2)]
    assert [(one.name, len(one.dataset)) for one in parts.heldout.sets] == [("a", 5), ("b", 2)]
    seen = [parts.train[key].id for key in parts.train.keys()] + [parts.heldout[key].id for key in parts.heldout.keys()]
    assert sorted(seen) == sorted([f"a{i}" for i in range(10)] + [f"b{i}" for i in range(4)])


def test_a_stream_among_sets_has_limits_that_are_named(write):
    shares = {
        "a": Share(spec=SetSpec(path=write("a", 10), streaming=True)),
        "b": Share(spec=SetSpec(path=write("b", 4))),
    }
    with pytest.raises(DataError, match="data.mix is concat, but a is streaming"):
        open_mixture(shares, mix=Mix.CONCAT)
    train = open_mixture(shares).train
    assert train.num_records is None
    with pytest.raises(DataError, match=r"a \+ b is a stream, which has no length"):
        len(train)
    with pytest.raises(DataError, match="a is a stream, which has no end"):
        list(train.keys())


def test_the_length_of_a_run_on_a_stream_must_be_given(write, processor):
    train = open_mixture({"a": Share(spec=SetSpec(path=write("a", 10), streaming=True))}).train
    source = PackedStream(Encoder(train, processor, Rules(max_tokens=20)), seed=0)

    with pytest.raises(DataError, match="run.epochs cannot be counted in updates. Set run.steps"):
        source.count_steps(1)
    source.close()


# ---- the stream of rows


@pytest.fixture
def source(write, processor):
    """Two files, of which the larger may be streamed in blocks of 8."""
    paths = write("a", 29), write("b", 11, letters=5)

    def make(*, streaming, workers=0, background=False, **options):
        shares = {
            "a": Share(spec=SetSpec(path=paths[0], streaming=streaming), weight=2.0),
            "b": Share(spec=SetSpec(path=paths[1])),
        }
        mixture = open_mixture(shares, block_size=8).train
        encoder = Encoder(mixture, processor, Rules(max_tokens=24), workers=workers, cache_bytes=4000)
        stream = PackedStream(encoder, **{"seed": 3, "lookahead": 5, **options})
        return BackgroundStream(stream) if background else stream

    return make


def taken(stream, steps):
    return [[(row.ids, row.datasets) for row in stream.next_step()] for _ in range(steps)]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(source, streaming):
    runs = []
    for workers in (0, 1, 4):
        stream = source(streaming=streaming, workers=workers, background=workers == 4)
        runs.append(taken(stream, 30))
        stream.close()

    assert runs[0] == runs[1] == runs[2]
    assert {name for step in runs[0] for _, names in step for name in names} == {"a", "b"}
    for ids, names in (row for step in runs[0] for row in step):
        assert all(id.startswith(name) for id, name in zip(ids, names, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_change_nothing(source, streaming):
    alone = source(streaming=streaming, accumulation=3)
    ranks = [source(streaming=streaming, rank=rank, world=3) for rank in range(3)]

    for _ in range(15):
        (one,) = taken(alone, 1)
        assert sorted(one) == sorted(row for rank in ranks for (step,) in [taken(rank, 1)] for row in step)
    for rank in ranks:
        assert rank.report == ranks[0].report and not rank.encoder._fitted.keys() - {
            item.item for item in rank._packer.buffer
        }  # what other ranks train on is forgotten
        rank.close()
    alone.close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 3, 7, 12, 20])  # in the middle of blocks and epochs
def test_resuming_anywhere_is_never_stopping(source, streaming, cut):
    whole = source(streaming=streaming)
    expected = taken(whole, 30)
    first = source(streaming=streaming, workers=2, background=True)
    assert taken(first, cut) == expected[:cut]
    state = json.dumps(first.state_dict())
    report = first.report
    first.close()

    second = source(streaming=streaming)
    second.load_state_dict(json.loads(state))

    assert second.report == report
    assert taken(second, 30 - cut) == expected[cut:]
    assert len(state) < 2000
    for stream in (whole, second):
        stream.close()


def test_what_is_tolerated_of_a_stream_grows_with_what_was_seen_and_is_resumed(source):
    first = source(streaming=True)
    taken(first, 10)
    seen = first.encoder.quarantine.num_records

    second = source(streaming=True)
    second.load_state_dict(first.state_dict())

    assert second.encoder.quarantine.num_records == seen > 10


def test_a_record_of_a_stream_that_is_measured_again_is_kept_once(source, monkeypatch):
    monkeypatch.setattr("data.encoder.STREAM_SIZES_KEPT", 4)
    stream = source(streaming=True)
    stream.encoder._cache_bytes = 2**20  # all of it would fit
    taken(stream, 60)

    assert stream.report.epoch > 2
    assert stream.encoder._kept_bytes == sum(example.num_bytes for example in stream.encoder._kept.values())
