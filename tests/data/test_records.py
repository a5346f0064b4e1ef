"""Reading JSON: where each record stands, and what is said of those that cannot be read."""

import gc
import json
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.records import Broken, files, open_records, open_stream, write_jsonl
from tests.bench import streaming


@pytest.fixture
def file(tmp_path):
    def write(content: bytes, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_records_know_their_line(file):
    records = open_records(file(b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": "\xc3\xa4"}'))

    assert len(records) == 3
    assert [(record.value["a"], record.source.line) for record in records] == [(1, 1), (2, 4), ("ä", 5)]
    assert str(records[1].source).endswith("train.jsonl:4")


def test_any_order(file):
    records = open_records(file(b"".join(b'{"n": %d}\n' % number for number in range(100))))

    for index in (99, 0, 50, 50, 1):
        assert records[index].value == {"n": index}
    with pytest.raises(IndexError):
        records[100]


def test_a_byte_order_mark_is_skipped(file):
    assert open_records(file(b'\xef\xbb\xbf{"a": 1}\n'))[0].value == {"a": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xe4"}', r"train.jsonl:3: byte 8 of the line \(0xe4\) is not UTF-8.*iconv"),
        (b'{"a": 1', r"train.jsonl:3: not readable as JSON .*one whole JSON object"),
        (b'{"a": 1}{"b": 2}', r"train.jsonl:3: not readable as JSON"),
        (b'[{"a": 1}]', r"train.jsonl:3: the line holds \[{\"a\": 1}\], and each line must hold one JSON object"),
        (b"17", r"train.jsonl:3: the line holds 17, and each line must hold one JSON object"),
        (b"[" * 100_000, r"train.jsonl:3: not readable as JSON"),
        (b'{"a": "cut \\ud83d"}', r"train.jsonl:3: a string holds half of a surrogate pair \(\\ud83d\)"),
    ],
)
def test_a_bad_line_is_named_and_the_others_stay_readable(file, line, message):
    records = open_records(file(b'{"n": 0}\n{"n": 1}\n' + line + b'\n{"n": 3}\n'))

    with pytest.raises(DataError, match=message):
        records[2]
    assert [records[index].value["n"] for index in (0, 1, 3)] == [0, 1, 3]


def test_a_whole_surrogate_pair_is_a_character(file):
    assert open_records(file(b'{"a": "\\ud83d\\ude00"}'))[0].value == {"a": "\U0001f600"}


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(file, content):
    with pytest.raises(DataError, match="train.jsonl holds no record. Check data.path"):
        open_records(file(content))


def test_a_missing_file_and_an_unknown_ending(file, tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl.*does not exist"):
        open_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"ends in '\.csv'; this version reads \.jsonl"):
        open_records(file(b"a,b", "train.csv"))


def test_rewriting_the_file_under_a_run_is_noticed(file):
    records = open_records(file(b'{"a": 1}\n{"a": 2}\n'))
    file(b'{"a": 100}\n{"a": 2}\n')

    with pytest.raises(DataError, match="has changed its size since"):
        records[1]


def test_the_fingerprint_is_that_of_the_content(file):
    first = open_records(file(b'{"a": 1}\n')).fingerprint

    assert open_records(file(b'{"a": 1}\n', "copy.jsonl")).fingerprint == first
    assert open_records(file(b'{"a": 2}\n')).fingerprint != first


def test_written_records_read_back(tmp_path):
    values = [{"text": "zwei\nZeilen \u2028 ä"}, {"n": [1, 2.5, None]}]

    path = write_jsonl(tmp_path / "new" / "out.jsonl", values)

    assert [record.value for record in open_records(path)] == values
    assert path.read_text("utf-8").count("\n") == 2
    assert json.loads(path.read_text("utf-8").split("\n")[1]) == values[1]


# ----------------------------------------------------------------------------------------------------- one JSON array


def test_an_array_whatever_the_ending(file):
    """ERNIEKit's .jsonl is one array; so is LLaMA-Factory's .json. A record's line is where its element starts."""
    content = b'[\n  {"n": 0}, {"n": 1},\n\n  {"n":\n   2}\n]\n'
    for name in ("train.jsonl", "train.json"):
        records = open_records(file(content, name))
        assert [(record.value["n"], record.source.line) for record in records] == [(0, 2), (1, 2), (2, 4)]


def test_lines_in_a_file_called_json(file):
    assert [record.value for record in open_records(file(b'{"a": 1}\n{"a": 2}\n', "train.json"))] == [
        {"a": 1},
        {"a": 2},
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('"\\[]{},:\n\té€a', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\]}a', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    values=st.lists(st.dictionaries(st.text(max_size=2), JSON, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 1]),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    chunk=st.integers(4, 40),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_is_cut_where_its_elements_end(tmp_path, monkeypatch, values, indent, bom, chunk):
    """Wherever the chunks end: inside a string, after a backslash, between two brackets."""
    monkeypatch.setattr("data.records.json_files.CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_bytes(bom + json.dumps(values, indent=indent, ensure_ascii=False).encode())

    assert [record.value for record in open_records(path)] == values
    assert [item.value for item in open_stream(path).read_from()] == values


def test_a_broken_element_is_one_broken_record(file):
    records = open_records(
        file(b'[{"n": 0},\n {"n": 1,},\n {"n: 2,\n "m": 2}, {"n": 3}, 17, {"n": "\xe4"},\n {"n": 6}]')
    )

    for index, message in {
        1: "train.jsonl:2: not readable as JSON",
        2: "train.jsonl:3: not readable as JSON",
        4: "train.jsonl:4: the element of the array holds 17",
        5: "train.jsonl:4: byte 8 of the element of the array .* is not UTF-8",
    }.items():
        with pytest.raises(DataError, match=message):
            records[index]
    assert [records[index].value["n"] for index in (0, 3, 6)] == [0, 3, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"n": 0},\n {"n": 1', "array ends inside the element that starts in line 2"),
        (b'[{"n": 0},\n {"n": 1},\n', "array ends without its closing bracket"),
        (b'[{"n": 0}]\n{"n": 1}\n', ":2: something follows the end of the array"),
        (b'[{"n": 0}]\n[{"n": 1}]\n', ":2: something follows the end of the array"),
        (b'[\n{"n": 0},\n,\n{"n": 1}]', ":3: a comma with no element before it"),
        (b"[ ]", "holds no record"),
    ],
)
def test_an_array_that_does_not_end_well(file, content, message):
    with pytest.raises(DataError, match=message):
        open_records(file(content))


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_yields_a_broken_line_in_its_place(file):
    stream = open_stream(file(b'{"n": 0}\n{"n": 1\n\n{"n": 2}\n'))

    first, broken, last = stream.read_from()
    assert (first.value, last.value, last.source.line) == ({"n": 0}, {"n": 2}, 4)
    assert isinstance(broken, Broken)
    assert broken.source.line == 2 and "train.jsonl:2: not readable as JSON" in str(broken.error)


@pytest.mark.parametrize("array", [False, True])
def test_a_stream_starts_anywhere_and_equals_the_records(file, array):
    lines = [b'{"n": %d}' % number for number in range(7)]
    path = file(b"[" + b",\n".join(lines) + b"]" if array else b"\n".join(lines))
    records = list(open_records(path))

    for start in range(9):
        assert list(open_stream(path).read_from(start)) == records[start:]


def test_the_fingerprint_of_a_stream_notices_another_file(file):
    first = open_stream(file(b'{"a": 1}\n')).fingerprint

    assert open_stream(file(b'{"a": 1}\n', "copy.jsonl")).fingerprint == first
    assert open_stream(file(b'{"a": 2}\n')).fingerprint != first
    assert open_stream(file(b'{"a": 1}\n\n')).fingerprint != first


# ------------------------------------------------------------------------------------------------------- several files


@pytest.fixture
def shards(tmp_path):
    """7 records in s-08 (3), s-09 (1), s-10 (3)."""
    numbers = iter(range(7))
    for name, count in (("s-08", 3), ("s-09", 1), ("s-10", 3)):
        write_jsonl(tmp_path / "shards" / f"{name}.jsonl", [{"n": next(numbers)} for _ in range(count)])
    return tmp_path / "shards"


@pytest.mark.parametrize("pattern", [".", "s-{08..10}.jsonl", "s-{08,09,10}.jsonl"])
def test_a_folder_and_a_pattern_are_their_files_in_order(shards, pattern):
    records = open_records(shards / pattern)

    assert len(records) == 7
    assert [records[index].value["n"] for index in (6, 0, 3, 2, 4)] == [6, 0, 3, 2, 4]
    assert [Path(record.source.file).name[:4] for record in records] == ["s-08"] * 3 + ["s-09"] + ["s-10"] * 3
    for start in range(9):
        assert list(open_stream(shards / pattern).read_from(start)) == list(records)[start:]
    with pytest.raises(IndexError):
        records[7]


def test_a_fingerprint_of_several_files_is_that_of_their_contents_in_order(shards, tmp_path):
    first = open_records(shards).fingerprint, open_stream(shards).fingerprint
    moved = shards.rename(tmp_path / "elsewhere")
    assert (open_records(moved).fingerprint, open_stream(moved).fingerprint) == first

    write_jsonl(moved / "s-09.jsonl", [{"n": 9}])
    assert open_records(moved).fingerprint != first[0]
    assert open_stream(moved).fingerprint != first[1]


def test_files_that_are_missing_or_mixed(shards, tmp_path):
    with pytest.raises(DataError, match=r"means 4 files, and 1 of them do not exist, e.g. .*s-11.jsonl"):
        open_records(shards / "s-{08..11}.jsonl")
    with pytest.raises(DataError, match=r"{8-9} is neither a range of numbers"):
        open_records(shards / "s-{8-9}.jsonl")
    (shards / "more.json").write_text("[]")
    with pytest.raises(DataError, match=r"files of several kinds \(.json, .jsonl\)"):
        open_records(shards)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder without a file of the kinds .jsonl, .json"):
        open_records(tmp_path / "empty")


def test_files_have_no_split(shards):
    for key in ("split", "subset", "revision"):
        with pytest.raises(DataError, match=f"data.{key} is 'x', but .* files, which have no {key}"):
            open_records(shards, **{key: "x"})


def test_readers_can_be_sent_to_another_process(shards):
    for source in (shards, shards / "s-08.jsonl"):
        assert pickle.loads(pickle.dumps(open_records(source)))[1].value == {"n": 1}
        assert len(list(pickle.loads(pickle.dumps(open_stream(source))).read_from(1))) == (6 if source == shards else 2)


@pytest.mark.parametrize(
    ("kind", "buffers"),  # of `CHUNK` bytes, by number and front to back
    [
        ("jsonl", (2, 1)),
        ("json", (3, 3)),
        ("tar", (2, 1)),
        ("parquet", (None, 1)),
    ],  # by number: a group of 6 MB is kept
)
def test_memory_does_not_grow_with_the_records(tmp_path, kind, buffers):
    """4,000 records, 6 to 10 MB: what is kept is 24 bytes of each (twice that while an array grows) and the buffers."""
    count, slack = 4000, 400_000
    path = tmp_path / f"a.{kind}"
    streaming.write(kind, path, count, words=1500)

    def peak(use) -> int:
        gc.collect()
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        use()
        _, largest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return largest + pa.total_allocated_bytes() - before

    if buffers[0] is not None:
        assert peak(lambda: open_records(path)[count // 2]) < buffers[0] * files.CHUNK + 48 * count + slack
    assert peak(lambda: sum(1 for _ in open_stream(path).read_from())) < buffers[1] * files.CHUNK + slack
