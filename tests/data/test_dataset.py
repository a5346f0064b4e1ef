"""`data=files`: files, held-out parts, and settings that contradict each other."""

import json

import pytest

from data.conversation import Conversation, Message, Part
from data.dataset import ListDataset, SetSpec, open_set
from data.encode import encode
from data.encoder import Encoder
from data.errors import DataError, RefusedError
from data.fit import Rules
from data.formats import messages
from data.loader import PackedStream
from data.mixture import Share, open_mixture
from data.order import Key
from data.quarantine import Quarantine, TooManyBadError
from data.records import write_jsonl
from ernie_model.images import MediaError


@pytest.fixture
def write(tmp_path, talk):
    def make(count, name="train.jsonl", prefix=""):
        return write_jsonl(tmp_path / name, [messages.write(talk(f"{prefix}{i}", "q", "x")) for i in range(count)])

    return make


def ids(mixture):
    return [mixture[key].id for key in mixture.keys()]


def opened(path, **settings):
    eval_path = settings.pop("eval_path", None)
    seed, fraction = settings.pop("seed", 0), settings.pop("eval_fraction", 0.0)
    return open_mixture(
        {"set": Share(spec=SetSpec(path=str(path), **settings))},
        eval_set=None
        if eval_path is None
        else SetSpec(path=str(eval_path), keys={"path": "data.eval_path"}, **settings),
        eval_fraction=fraction,
        seed=seed,
    )


def test_all_is_trained_on_without_a_held_out_part(write):
    parts = opened(write(4))

    assert parts.heldout is None
    assert ids(parts.train) == ["0", "1", "2", "3"]


def test_a_fraction_is_held_out_by_seed(write):
    path = write(50)
    parts, again, other = (opened(path, eval_fraction=0.1, seed=seed) for seed in (0, 0, 1))

    assert len(parts.heldout) == 5
    assert sorted(ids(parts.train) + ids(parts.heldout), key=int) == [str(i) for i in range(50)]
    assert ids(again.heldout) == ids(parts.heldout) != ids(other.heldout)
    assert again.train.fingerprint == parts.train.fingerprint != other.train.fingerprint


@pytest.mark.parametrize(("records", "fraction", "heldout"), [(3, 0.001, 1), (3, 0.99, 2), (10, 0.5, 5)])
def test_both_parts_have_something(write, records, fraction, heldout):
    assert len(opened(write(records), eval_fraction=fraction).heldout) == heldout


def test_a_file_of_its_own_is_held_out(write):
    parts = opened(write(3), eval_path=write(2, "test.jsonl", "t"))

    assert (ids(parts.train), ids(parts.heldout)) == (["0", "1", "2"], ["t0", "t1"])


def test_contradictions_are_named(write, tmp_path):
    path = write(1)
    with pytest.raises(DataError, match=r"both data.eval_path .* and data.eval_fraction \(0.1\) are set. Keep one"):
        opened(path, eval_path=path, eval_fraction=0.1)
    with pytest.raises(DataError, match="data.eval_fraction is 1.5; it must be at least 0 and less than 1"):
        opened(path, eval_fraction=1.5)
    with pytest.raises(DataError, match="are the same file"):
        opened(path, eval_path=tmp_path / "." / "train.jsonl")
    with pytest.raises(DataError, match="a single record, which cannot be split"):
        opened(path, eval_fraction=0.5)
    with pytest.raises(DataError, match=r"data.media_root \(.*nowhere\) is not a folder"):
        opened(path, media_root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="set is streaming: .* no share of it can be held out"):
        opened(path, streaming=True, eval_fraction=0.5)
    with pytest.raises(DataError, match="the task of it is 'letters'; it must be one of digits"):
        open_set("it", SetSpec(task="letters"))
    with pytest.raises(DataError, match="holds no conversation"):
        ListDataset("none", [])


@pytest.mark.parametrize("content", [None, ""])
def test_a_held_out_file_without_records_names_its_own_key(write, tmp_path, content):
    empty = tmp_path / "empty.jsonl"
    if content is not None:
        empty.write_text(content)
    with pytest.raises(DataError, match="data.eval_path") as caught:
        opened(write(3), eval_path=empty)
    assert "empty.jsonl" in str(caught.value) and "data.path" not in str(caught.value)


def test_media_are_looked_for_beside_the_file_or_in_media_root(tmp_path, png, processor):
    for place in ("data", "elsewhere"):
        (tmp_path / place).mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png)
    user = Message(role="user", parts=(Part.of_image("a.png"),))
    record = Conversation(id="0", messages=(user, Message(role="assistant", parts=(Part.of_text("x"),))))
    path = write_jsonl(tmp_path / "data" / "train.jsonl", [messages.write(record)])

    def encoded(**options):
        train = opened(path, **options).train
        return encode(train[Key(0, 0)], processor, media=train.media(Key(0, 0)))

    assert encoded(media_root=str(tmp_path / "elsewhere")).num_patches == 16
    with pytest.raises(MediaError, match=r"a.png: no such file .*data.media_root.*train.jsonl:1"):
        encoded()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_line_among_good_ones_is_left_out_and_written_down(tmp_path, talk, processor, workers, streaming):
    path = write_jsonl(tmp_path / "train.jsonl", [messages.write(talk(str(i), "q", "x")) for i in range(20)])
    lines = path.read_text().splitlines()
    lines[13] = lines[13][:20]
    path.write_text("\n".join(lines))

    def seen(max_bad):
        train = opened(path, streaming=streaming).train
        quarantine = Quarantine(tmp_path, max_bad=max_bad, num_records=20)
        encoder = Encoder(train, processor, Rules(max_tokens=10), quarantine=quarantine, workers=workers)
        stream = PackedStream(encoder, seed=0, shuffle=False, lookahead=1)
        try:
            return [id for _ in range(10) for row in stream.next_step() for id in row.ids]
        finally:
            stream.close()

    assert seen(0.001)[:19] == [str(index) for index in range(20) if index != 13]
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert entry["file"] == str(path) and entry["line"] == 14 and entry["stage"] == "read"
    assert "train.jsonl:14: not readable as JSON" in entry["reason"] and entry["dataset"] == "set"
    Quarantine.start_anew(tmp_path)
    with pytest.raises(TooManyBadError, match="train.jsonl:14: not readable as JSON"):
        seen(0)


@pytest.mark.parametrize("heldout", [0.0, 0.4])
def test_the_second_record_of_an_id_is_refused_with_both_places(tmp_path, talk, heldout):
    """Also when one of the two is trained on and the other held out."""
    values = [messages.write(talk(id, "q", "x")) for id in ("a", "b", "a", "c", "b", "a")]
    del values[3]["id"]
    path = write_jsonl(tmp_path / "train.jsonl", values)
    parts = opened(path, eval_fraction=heldout)

    found, refused = [], {}
    for mixture in parts:
        for key in () if mixture is None else mixture.keys():
            try:
                found.append(mixture[key].id)
            except RefusedError as error:
                refused[error.refusal.line] = error.refusal.reason

    assert set(found) == {"a", "b", f"{path}:4"} and len(found) == 3
    assert refused.keys() == {3, 5, 6}
    assert "train.jsonl:5: the id 'b' is already that of" in refused[5] and "train.jsonl:2. Give each" in refused[5]
    assert "train.jsonl:1." in refused[3] and "train.jsonl:1." in refused[6]
