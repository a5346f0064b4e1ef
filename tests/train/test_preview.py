"""`ernie preview`: the page shows what the batches hold, whatever the data holds."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from data.batch import Role
from data.tasks import digits
from train import preview
from train.preview_page import Page, write_page
from train.samples import Medium, Row, Sample, Section, Stretch

HOSTILE = "</script><script>alert('1')</script>&\"<img src=http://evil.example/x>"


def run(monkeypatch, *settings: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ernie preview", "tracker=none", *settings])
    try:
        preview.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


class Elements(HTMLParser):
    """Counts what a page holds, and collects the addresses it names."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.tokens = 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [given[name] for name in ("src", "href") if given.get(name)]
        if tag == "i" and "data-kind" not in given and "k-" in (given.get("class") or ""):
            self.tokens += int(given.get("data-tokens", 1))


def data_of(page: str) -> list[dict]:
    return json.loads(re.search(r"const DATA=(.*?);</script>", page)[1])


def test_the_page_of_the_demo(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert run(monkeypatch, "experiment=digits", f"run.folder={folder}", "preview.examples=5", "preview.ranks=2") == 0
    said = capsys.readouterr().out
    assert "shown     5 conversations" in said and f"page      {folder / 'preview.html'}" in said
    page = (folder / "preview.html").read_text()
    samples = data_of(page)
    assert len(samples) == 5
    elements = Elements(page)
    legend = 5 + 1  # template, user, image, answer, end of turn; trained
    assert elements.tokens == sum(len(sample["ids"]) for sample in samples) + legend
    assert elements.tags.count("figure") == 5
    # nothing outside the page
    assert elements.addresses and all(address.startswith("data:image/") for address in elements.addresses)
    # both ranks have two rows
    assert page.count("rank 1</span>") == page.count("rank 2</span>") + 2 == 2
    assert page.count("update 1 ·") == 2
    with Image.open(folder / "preview.png") as sheet:
        assert sheet.width > 100
    assert not (folder / "metrics.jsonl").exists()  # a run that starts here later is a new one


def test_a_tracker_gets_the_pictures(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = ["experiment=digits", f"run.folder={folder}", "preview.examples=1", "preview.rows=1"]
    assert run(monkeypatch, *settings, "tracker=tensorboard") == 0
    assert list((folder / "tensorboard").rglob("events*"))


def test_small_data_is_shown_once(tmp_path, monkeypatch, capsys):
    paths = digits.write_jsonl(tmp_path / "digits")
    lines = paths["train"].read_text().splitlines()[:3]
    few = paths["train"].with_name("few.jsonl")
    few.write_text("\n".join(lines))
    data = ["data=files", f"data.path={few}", "data.max_tokens=256"]
    assert run(monkeypatch, *data, f"run.folder={tmp_path / 'run'}") == 0
    assert "shown     3 conversations" in capsys.readouterr().out


def test_a_bad_record_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    data = ["data=files", f"data.path={tmp_path / 'bad.jsonl'}", f"run.folder={tmp_path / 'run'}"]
    assert run(monkeypatch, *data) == 1
    assert "bad.jsonl:1" in capsys.readouterr().err


def test_records_that_were_mended_are_not_held_against_the_next_look(tmp_path, monkeypatch, capsys):
    good = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    bad = {"messages": good["messages"][:1]}
    file = tmp_path / "chats.jsonl"
    data = ["data=files", f"data.path={file}", f"run.folder={tmp_path / 'run'}", "data.max_tokens=64"]
    file.write_text("\n".join(map(json.dumps, [good] * 12 + [bad] * 11)))
    assert run(monkeypatch, *data) == 1
    assert "11 records cannot be trained on" in capsys.readouterr().err
    file.write_text("\n".join(map(json.dumps, [good] * 22 + [bad])))
    assert run(monkeypatch, *data) == 0
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def hostile_page() -> str:
    from ernie_model.chat import SpanKind
    from ernie_model.processor import Span

    spans = (Span(0, 1, 0, SpanKind.USER), Span(1, 2, 0, SpanKind.IMAGE), Span(2, 3, 1, SpanKind.ANSWER, True))
    sample = Sample(
        id=HOSTILE,
        dataset=HOSTILE,
        row=0,
        record=0,
        sections=(Section(Role.WHOLE, 0, 3, spans, ("user", "assistant")),),
        ids=[1, 2, 3],
        texts=[HOSTILE, "x", HOSTILE],
        positions=[(0, 0, 0), (1, 1, 1), (2, 2, 2)],
        weights=[0.0, 0.0, 0.25],
        in_vision_pool=[False, True, False],
        media=[Medium(HOSTILE, False, (1, 2, 2), (Image.new("RGB", (28, 28)),), 1, 1)],
    )
    rows = [Row(0, 0, [Stretch(HOSTILE, 3, 1, 1, 4, 0)])]
    return write_page(Page(HOSTILE, HOSTILE, [sample], rows, 8, None, 14, HOSTILE))


def test_nothing_in_the_data_becomes_part_of_the_page(hostile_page):
    elements = Elements(hostile_page)
    assert elements.tags.count("script") == 2 and elements.tags.count("img") == 2  # the page's own; picture, thumbnail
    assert not any("evil" in address for address in elements.addresses)
    (data,) = data_of(hostile_page)
    assert data["texts"] == [HOSTILE, "x", HOSTILE]


def test_an_unusual_weight_is_written_beside_the_token(hostile_page):
    assert "<i class='k-answer t'><sup>×0.25</sup>" in hostile_page
