"""Writing and reading back loses nothing: by hypothesis, over everything a conversation or a pair may carry."""

import json

from hypothesis import given

from data import formats
from data.errors import DataError
from data.records import Record
from tests.data.any_record import HERE, ITEMS, ernie_conversations


def through_a_file(value):
    return Record(json.loads(json.dumps(value)), HERE)


@given(ITEMS)
def test_messages(item):
    record = through_a_file(formats.by_name("messages").write(item))

    assert formats.by_name("messages").read(record) == item
    assert formats.recognise(record).read(record) == item


def joined(item):
    """The same with neighbouring texts as one, and without empty ones: the model sees no difference."""
    value = formats.by_name("messages").write(item)
    for message in [m for key in ("messages", "prompt", "chosen", "rejected") for m in value.get(key, [])]:
        if isinstance(message["content"], str):
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]
            elif part != {"type": "text", "text": ""}:
                parts.append(dict(part))
        message["content"] = parts
    return formats.by_name("messages").read(through_a_file(value))


@given(ITEMS)
def test_erniekit_keeps_or_refuses(item):
    try:
        value = formats.by_name("erniekit").write(item)
    except DataError as error:
        assert "cannot be written for ERNIEKit" in str(error)
        return
    assert formats.by_name("erniekit").read(through_a_file(value)) == joined(item)


@given(ernie_conversations())
def test_erniekit_keeps_what_it_can_express(item):
    record = through_a_file(formats.by_name("erniekit").write(item))

    assert formats.by_name("erniekit").read(record) == item
    assert "messages" in record.value or formats.recognise(record).name == "erniekit"
