"""`ernie pairs` as it is typed, on a checkpoint on the disk."""

import json
import sys

import pytest
import torch

from ernie_model.checkpoint import save_model
from ernie_model.model import ErnieModel
from tests.tiny import tiny_processor
from train import make_pairs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    processor = tiny_processor()
    torch.manual_seed(0)
    save_model(ErnieModel(processor.config), folder)
    processor.save(folder)
    return str(folder)


def ernie_pairs(monkeypatch, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["ernie pairs", *arguments])
    try:
        make_pairs.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_pairs(monkeypatch, tmp_path, checkpoint, capsys):
    """A model of random weights is wrong where it ends an answer at all, so the right ones are the task's own."""
    settings = [f"checkpoint={checkpoint}", "precision=fp32", "cpu=true", "tasks=[digits]", "limit=3", "attempts=8"]
    settings.append(f"output={tmp_path / 'a'}")
    assert ernie_pairs(monkeypatch, *settings) == 1
    said = capsys.readouterr()
    assert "none of 24 attempts at 3 questions is right" in said.err and "Traceback" not in said.err
    assert ernie_pairs(monkeypatch, *settings, "use_answer=true") == 0
    said = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "a" / "pairs.jsonl").read_text().splitlines()]
    assert "going on   24 of 24 answers" in said and records
    assert f"{len(records)} of 3 questions gave {len(records)} records" in said
    assert [record["chosen"][0]["content"] for record in records] == [record["answer"] for record in records]
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["tasks"]["digits"]["records"] == len(records)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["tasks=[digits]"], "these settings have no default and were not given: checkpoint."),
        (["checkpoint=MODEL"], "tasks is empty; for example tasks=[digits]"),
        (["checkpoint=MODEL", "tasks=[digits]", "split=heldout"], "split is not a setting of pairs"),
        (["checkpoint=MODEL", "tasks=[digits]", "form=pair"], "expected one of [pairs, labelled]"),
        (["checkpoint=MODEL", "tasks=[zoom]"], "zoom is answered with image_zoom_in_tool"),
    ],
)
def test_mistakes_end_in_one_message(monkeypatch, capsys, checkpoint, tmp_path, arguments, error):
    arguments = [one.replace("MODEL", checkpoint) for one in arguments]
    assert ernie_pairs(monkeypatch, "precision=fp32", f"output={tmp_path / 'x'}", *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and error in said and "Traceback" not in said
