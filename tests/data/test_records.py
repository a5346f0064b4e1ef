"""Reading JSON lines: where each record stands, and what is said of those that cannot be read."""

import json

import pytest

from data.errors import DataError
from data.records import JsonlRecords, open_records, write_jsonl


@pytest.fixture
def file(tmp_path):
    def write(content: bytes, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_records_know_their_line(file):
    records = JsonlRecords(file(b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": "\xc3\xa4"}'))

    assert len(records) == 3
    assert [(record.value["a"], record.source.line) for record in records] == [(1, 1), (2, 4), ("ä", 5)]
    assert str(records[1].source).endswith("train.jsonl:4")


def test_any_order(file):
    records = JsonlRecords(file(b"".join(b'{"n": %d}\n' % number for number in range(100))))

    for index in (99, 0, 50, 50, 1):
        assert records[index].value == {"n": index}
    with pytest.raises(IndexError):
        records[100]


def test_a_byte_order_mark_is_skipped(file):
    assert JsonlRecords(file(b'\xef\xbb\xbf{"a": 1}\n'))[0].value == {"a": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xe4"}', r"train.jsonl:3: byte 8 of the line \(0xe4\) is not UTF-8.*iconv"),
        (b'{"a": 1', r"train.jsonl:3: not readable as JSON .*one whole JSON object"),
        (b'{"a": 1}{"b": 2}', r"train.jsonl:3: not readable as JSON"),
        (b'[{"a": 1}]', r"train.jsonl:3: the line holds a JSON array.*jq"),
        (b"17", r"train.jsonl:3: the line holds 17, and each line must hold one JSON object"),
        (b"[" * 100_000, r"train.jsonl:3: not readable as JSON"),
        (b'{"a": "cut \\ud83d"}', r"train.jsonl:3: a string holds half of a surrogate pair \(\\ud83d\)"),
    ],
)
def test_a_bad_line_is_named_and_the_others_stay_readable(file, line, message):
    records = JsonlRecords(file(b'{"n": 0}\n{"n": 1}\n' + line + b'\n{"n": 3}\n'))

    with pytest.raises(DataError, match=message):
        records[2]
    assert [records[index].value["n"] for index in (0, 1, 3)] == [0, 1, 3]


def test_a_whole_surrogate_pair_is_a_character(file):
    assert JsonlRecords(file(b'{"a": "\\ud83d\\ude00"}'))[0].value == {"a": "\U0001f600"}


def test_a_file_that_is_one_array_over_many_lines(file):
    with pytest.raises(DataError, match="train.jsonl:1: not readable as JSON"):
        JsonlRecords(file(b'[\n{"a": 1},\n{"a": 2}\n]'))[0]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(file, content):
    with pytest.raises(DataError, match="train.jsonl holds no record. Check data.path"):
        open_records(file(content))


def test_a_missing_file_a_folder_and_an_unknown_ending(file, tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl.*does not exist"):
        open_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder. Name the file inside it"):
        open_records(tmp_path)
    with pytest.raises(DataError, match=r"ends in '\.csv'; this version reads \.jsonl"):
        open_records(file(b"a,b", "train.csv"))


def test_rewriting_the_file_under_a_run_is_noticed(file):
    records = JsonlRecords(file(b'{"a": 1}\n{"a": 2}\n'))
    file(b'{"a": 100}\n{"a": 2}\n')

    with pytest.raises(DataError, match="has changed its size since"):
        records[1]


def test_the_fingerprint_is_that_of_the_content(file):
    first = JsonlRecords(file(b'{"a": 1}\n')).fingerprint

    assert JsonlRecords(file(b'{"a": 1}\n', "copy.jsonl")).fingerprint == first
    assert JsonlRecords(file(b'{"a": 2}\n')).fingerprint != first


def test_written_records_read_back(tmp_path):
    values = [{"text": "zwei\nZeilen \u2028 ä"}, {"n": [1, 2.5, None]}]

    path = write_jsonl(tmp_path / "new" / "out.jsonl", values)

    assert [record.value for record in JsonlRecords(path)] == values
    assert path.read_text("utf-8").count("\n") == 2
    assert json.loads(path.read_text("utf-8").split("\n")[1]) == values[1]
