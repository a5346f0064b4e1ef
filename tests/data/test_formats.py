"""The registry: a format by name or by the shape of a record, and columns under other names."""

import pytest

from data import formats
from data.conversation import Source
from data.errors import DataError
from data.records import Record

HERE = Source("train.jsonl", 7)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def record(**value):
    return Record(value, HERE)


def test_by_name():
    assert formats.by_name("messages").name == "messages"
    with pytest.raises(DataError, match="data.format is 'mesages'; it must be one of messages"):
        formats.by_name("mesages")


def test_an_unknown_record_is_told_its_keys_and_the_way_out():
    with pytest.raises(DataError, match=r"train.jsonl:7: no format fits a record with 'a', 'b'\. .*format= \(mess"):
        formats.recognise(record(a=1, b=2))


def test_columns_are_renamed_before_anything_else():
    columns = {"messages": "dialogue", "id": "key"}
    read = formats.recognise(record(dialogue=TURNS, key=5), columns).read(record(dialogue=TURNS, key=5), columns)

    assert (read.id, len(read.messages)) == ("5", 2)


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="data.columns says that messages is 'dialog', but the record has 'dialogue'."):
        formats.recognise(record(dialogue=TURNS), {"messages": "dialog"})


def test_media_may_be_absent():
    assert formats.renamed(record(messages=TURNS), {"images": "pictures"}).value == {"messages": TURNS, "images": []}


def test_a_name_that_is_taken_is_refused():
    taken = record(dialogue=TURNS, messages=[])
    with pytest.raises(DataError, match="has a column 'messages' of its own.*data.columns.old_messages=messages"):
        formats.renamed(taken, {"messages": "dialogue"})
    both = formats.renamed(taken, {"messages": "dialogue", "old_messages": "messages"})
    assert both.value == {"messages": TURNS, "old_messages": []}
