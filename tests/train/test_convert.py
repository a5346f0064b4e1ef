"""`ernie convert`: there and back, what it says, and what it leaves alone."""

import json
from pathlib import Path

import pytest

from data import formats
from data.errors import DataError
from data.records import open_records, write_jsonl
from tests import programs
from train.config import (
    ConvertConfig,
    ConvertMedia,
    Keep,
    UserError,
)
from train.convert import convert, in_own_words

ROOT = Path(__file__).resolve().parents[2]
HUMAN, GPT = {"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "y"}
TALK = {"conversations": [HUMAN, GPT], "images": ["img/a.png"], "split": "x"}
PAIR = {"prompt": "q", "chosen": "y", "rejected": "n"}


def items(path):
    records = open_records(path)
    return [formats.recognise(records[0]).read(records[index]) for index in range(len(records))]


def written(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture
def source(tmp_path):
    """An array of ShareGPT records, the second of which has no picture for its marker."""
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"\x89PNG a")
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([TALK, {**TALK, "images": []}, TALK], indent=1))
    return path


def settings(source, output, **changes):
    return ConvertConfig(input=str(source), output=str(output), **{"to": "messages", **changes})


def test_there_and_back(source, tmp_path, capsys):
    assert convert(settings(source, tmp_path / "a.jsonl")) == 1
    told = capsys.readouterr()
    assert f"refused: {source}:" in told.err and "the text has 1 <image> markers and `images` has 0" in told.err
    assert told.out == (
        f"format    sharegpt (recognised)\nwritten   {tmp_path}/a.jsonl: 2 conversations\n"
        "refused   1 records, each named above\n"
    )
    assert convert(settings(tmp_path / "a.jsonl", tmp_path / "b.jsonl", to="erniekit")) == 0
    assert convert(settings(tmp_path / "b.jsonl", tmp_path / "c.jsonl")) == 0
    assert written(tmp_path / "a.jsonl") == written(tmp_path / "c.jsonl")
    assert written(tmp_path / "b.jsonl")[0]["image_info"] == [{"matched_text_index": 0, "image_url": "img/a.png"}]
    assert items(tmp_path / "c.jsonl")[0].extra == {"split": "x"}


def test_media_come_along(source, tmp_path, capsys):
    convert(settings(source, tmp_path / "kit" / "talk.jsonl", media=ConvertMedia.copy))

    (image, _) = items(tmp_path / "kit" / "talk.jsonl")[0].messages[0].parts
    assert image.media == "talk_media/img/a.png"
    assert (tmp_path / "kit" / image.media).read_bytes() == b"\x89PNG a"
    assert "\nmedia" not in capsys.readouterr().out


def test_bytes_become_files(source, tmp_path):
    data = {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,iVBO"}]}]}
    convert(settings(write_jsonl(tmp_path / "in.jsonl", [data]), tmp_path / "out.jsonl", media=ConvertMedia.copy))

    media = items(tmp_path / "out.jsonl")[0].messages[0].parts[0].media
    assert media.startswith("out_media/") and media.endswith(".png")
    assert (tmp_path / media).read_bytes() == b"\x89PN"


def test_media_left_behind_are_told(source, tmp_path, capsys):
    convert(settings(source, tmp_path / "kit" / "talk.jsonl"))
    assert f"media     2 paths are still relative to {tmp_path}: use media=copy" in capsys.readouterr().out


def test_media_outside_are_refused(source, tmp_path, capsys):
    outside = write_jsonl(tmp_path / "in" / "a.jsonl", [{**TALK, "images": ["../img/a.png"]}])
    assert convert(settings(outside, tmp_path / "a.jsonl", media=ConvertMedia.copy)) == 1
    assert "a.jsonl:1: ../img/a.png: lies outside the media folder" in capsys.readouterr().err


def test_wanted_answers(tmp_path, capsys):
    values = [
        PAIR,
        {"prompt": "q", "completion": "y", "label": True},
        {"prompt": "q", "completion": "n", "label": False},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", values)

    assert convert(settings(path, tmp_path / "all.jsonl")) == 0
    assert convert(settings(path, tmp_path / "wanted.jsonl", keep=Keep.wanted)) == 0

    assert "1 conversations, 1 pairs" not in capsys.readouterr().out
    answers = [[message.text for message in item.messages] for item in items(tmp_path / "wanted.jsonl")]
    assert answers == [["q", "y"], ["q", "y"]]
    assert all(item.label is None for item in items(tmp_path / "wanted.jsonl"))


def test_scores_of_a_pair_come_along(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", **PAIR, "chosen_score": 9, "rejected_score": 1.5}])
    for source, output, to in (("in", "a", "messages"), ("a", "b", "erniekit"), ("b", "c", "messages")):
        assert convert(settings(tmp_path / f"{source}.jsonl", tmp_path / f"{output}.jsonl", to=to)) == 0
    assert written(tmp_path / "b.jsonl")[0]["sort"] == [9.0, 1.5]
    assert items(tmp_path / "c.jsonl")[0].scores == items(path)[0].scores == (9.0, 1.5)


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(UserError, match="a.jsonl exists, and nothing is overwritten"):
        convert(settings(source, tmp_path / "a.jsonl"))
    (tmp_path / "b_media").mkdir()
    with pytest.raises(UserError, match="b_media exists"):
        convert(settings(source, tmp_path / "b.jsonl", media=ConvertMedia.copy))
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"\n')
    assert convert(settings(path, tmp_path / "out.jsonl")) == 2
    told = capsys.readouterr()
    assert "in.jsonl:1: no format fits a record with 'a'. Name one with format= (" in told.err
    assert "in.jsonl:2: not readable as JSON" in told.err
    assert told.out == "written   nothing\nrefused   2 records, each named above\n"
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_settings_are_named_as_this_program_calls_them(source, tmp_path):
    assert in_own_words("Check data.path or data.columns in data.json") == "Check input or columns in data.json"
    with pytest.raises(UserError, match="to is sharegpt; it must be messages or erniekit"):
        ConvertConfig(input="a", output="b.jsonl", to="sharegpt")
    with pytest.raises(UserError, match="output is b.json; it must end in .jsonl"):
        ConvertConfig(input="a", output="b.json", to="messages")
    with pytest.raises(DataError, match="data.format is 'xml'"):
        convert(settings(source, tmp_path / "b.jsonl", format="xml"))


def test_the_command(source, tmp_path):
    def ernie(*arguments):
        return programs.run(["-m", "train.cli", "convert", *arguments], cwd=ROOT, timeout=120)

    run = ernie(
        f"input={source}", f"output={tmp_path}/a.jsonl", "to=erniekit", "columns={conversations: conversations}"
    )
    assert run.returncode == 1 and "written" in run.stdout and run.stderr.startswith("refused: ")
    run = ernie(f"input={tmp_path}/none.json", f"output={tmp_path}/b.jsonl", "to=erniekit")
    assert run.returncode == 1 and run.stderr.startswith(f"error: input ({tmp_path}/none.json) does not exist")
