"""`data=jsonl`: files, held-out parts, and settings that contradict each other."""

import pytest

from data.conversation import Conversation, Message, Part
from data.dataset import ListDataset, jsonl_dataset
from data.encode import encode
from data.encoder import Encoder
from data.errors import DataError
from data.formats import messages
from data.loader import PackedStream
from data.records import write_jsonl
from ernie_model.images import MediaError


@pytest.fixture
def write(tmp_path, talk):
    def make(count, name="train.jsonl", prefix=""):
        return write_jsonl(tmp_path / name, [messages.write(talk(f"{prefix}{i}", "q", "x")) for i in range(count)])

    return make


def ids(dataset):
    return [conversation.id for conversation in dataset]


def test_all_is_trained_on_without_a_held_out_part(write):
    splits = jsonl_dataset(write(4))

    assert splits.heldout is None
    assert ids(splits.train) == ["0", "1", "2", "3"]


def test_a_fraction_is_held_out_by_seed(write):
    path = write(50)
    splits, again, other = (jsonl_dataset(path, eval_fraction=0.1, seed=seed) for seed in (0, 0, 1))

    assert len(splits.heldout) == 5
    assert sorted(ids(splits.train) + ids(splits.heldout), key=int) == [str(i) for i in range(50)]
    assert ids(again.heldout) == ids(splits.heldout) != ids(other.heldout)
    assert again.train.fingerprint == splits.train.fingerprint != other.train.fingerprint


@pytest.mark.parametrize(("records", "fraction", "heldout"), [(3, 0.001, 1), (3, 0.99, 2), (10, 0.5, 5)])
def test_both_parts_have_something(write, records, fraction, heldout):
    assert len(jsonl_dataset(write(records), eval_fraction=fraction).heldout) == heldout


def test_a_file_of_its_own_is_held_out(write):
    splits = jsonl_dataset(write(3), eval_path=write(2, "test.jsonl", "t"))

    assert (ids(splits.train), ids(splits.heldout)) == (["0", "1", "2"], ["t0", "t1"])


def test_contradictions_are_named(write, tmp_path):
    path = write(1)
    with pytest.raises(DataError, match=r"both data.eval_path .* and data.eval_fraction \(0.1\) are set. Keep one"):
        jsonl_dataset(path, eval_path=path, eval_fraction=0.1)
    with pytest.raises(DataError, match="data.eval_fraction is 1.5; it must be at least 0 and less than 1"):
        jsonl_dataset(path, eval_fraction=1.5)
    with pytest.raises(DataError, match="are the same file"):
        jsonl_dataset(path, eval_path=tmp_path / "." / "train.jsonl")
    with pytest.raises(DataError, match="a single record, which cannot be split"):
        jsonl_dataset(path, eval_fraction=0.5)
    with pytest.raises(DataError, match=r"data.media_root \(.*nowhere\) is not a folder"):
        jsonl_dataset(path, media_root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no conversation"):
        ListDataset("none", [])


@pytest.mark.parametrize("content", [None, ""])
def test_a_held_out_file_without_records_names_its_own_key(write, tmp_path, content):
    empty = tmp_path / "empty.jsonl"
    if content is not None:
        empty.write_text(content)
    with pytest.raises(DataError, match="data.eval_path") as caught:
        jsonl_dataset(write(3), eval_path=empty)
    assert "empty.jsonl" in str(caught.value) and "data.path" not in str(caught.value)


def test_media_are_looked_for_beside_the_file_or_in_media_root(tmp_path, png, processor):
    for place in ("data", "elsewhere"):
        (tmp_path / place).mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png)
    user = Message(role="user", parts=(Part.of_image("a.png"),))
    record = Conversation(id="0", messages=(user, Message(role="assistant", parts=(Part.of_text("x"),))))
    path = write_jsonl(tmp_path / "data" / "train.jsonl", [messages.write(record)])

    def encoded(**options):
        train = jsonl_dataset(path, **options).train
        return encode(train[0], processor, media=train.media)

    assert encoded(media_root=tmp_path / "elsewhere").num_patches == 16
    with pytest.raises(MediaError, match=r"a.png: no such file .*data.media_root.*train.jsonl:1"):
        encoded()


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_line_stops_the_run_at_that_record_with_its_line(tmp_path, talk, processor, workers):
    path = write_jsonl(tmp_path / "train.jsonl", [messages.write(talk(str(i), "q", "x")) for i in range(20)])
    lines = path.read_text().splitlines()
    lines[13] = lines[13][:20]
    path.write_text("\n".join(lines))
    stream = PackedStream(
        Encoder(jsonl_dataset(path).train, processor, max_tokens=10, workers=workers),
        seed=0,
        shuffle=False,
        lookahead=1,
    )

    seen = []
    with pytest.raises(DataError, match="train.jsonl:14: not readable as JSON"):
        while True:
            seen += [id for row in stream.next_step() for id in row.ids]
    stream.close()

    # Five tokens each, two to a row: the rows before are whole, and the packer looks one record ahead.
    assert seen == [str(index) for index in range(12)]
