"""`ernie doctor`: one run names everything that is wrong, and nothing is trained or downloaded to find it."""

import io
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.tasks import digits
from ernie_model.model import ErnieModel
from tests.test_configs import load
from train import doctor
from train.build import build_processor, read_config
from train.checks import cost, records
from train.sources import build_data, rules_of

QUESTION = {"role": "user", "content": "Which digit?"}
ANSWER = {"role": "assistant", "content": "7"}


def run(monkeypatch, folder: Path, *settings: str) -> int:
    given = ["tracker=none", "doctor.processes=2", f"run.folder={folder}", *settings]
    monkeypatch.setattr(sys, "argv", ["ernie doctor", *given])
    try:
        doctor.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


@pytest.fixture(autouse=True)
def nothing_trained_and_no_network(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("the doctor connects to nobody and trains nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("torch.Tensor.backward", refuse)


def picture(kind: str = "JPEG", size: tuple[int, int] = (90, 60)) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise(size, 60).convert("RGB")
    image.save(file, format=kind)
    return file.getvalue()


def with_image(name: str, id: str) -> dict:
    return {"id": id, "messages": [{"role": "user", "content": [{"type": "image", "image": name}]}, ANSWER]}


def said(folder: Path) -> dict:
    return json.loads((folder / "doctor.json").read_text())


def texts(report: dict, level: str) -> list[str]:
    return [one["text"] for found in report["sections"].values() for one in found if one["level"] == level]


@pytest.fixture
def broken(tmp_path) -> Path:
    """One record of each kind of broken, among good ones."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "good.jpg").write_bytes(picture())
    (root / "cut.jpg").write_bytes(picture()[:-400])  # its header is whole
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("not a picture")
    (root / "thin.png").write_bytes(picture("PNG", (1200, 2)))
    (root / "clip.mp4").write_bytes(b"not a video either")
    (tmp_path / "outside.jpg").write_bytes(picture())
    records = [
        *({"id": f"good-{number}", "messages": [QUESTION, ANSWER]} for number in range(40)),
        with_image("good.jpg", "good-image"),
        with_image("cut.jpg", "cut-image"),
        with_image("empty.png", "empty-image"),
        with_image("text.png", "text-image"),
        with_image("thin.png", "thin-image"),
        with_image("missing.png", "missing-image"),
        with_image("../outside.jpg", "leaves-folder"),
        with_image("https://example.com/a.png", "address"),
        {
            "id": "broken-video",
            "messages": [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}]}, ANSWER],
        },
        {"id": "untrained", "messages": [QUESTION]},
        {"id": "strange-role", "messages": [{"role": "narrator", "content": "x"}, ANSWER]},
        {"id": "too-long", "messages": [{"role": "user", "content": "word " * 400}, ANSWER]},
    ]
    lines = [json.dumps(record).encode() for record in records]
    lines += [b'{"messages": [', b'{"id": "\xff", "messages": []}']
    (root / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return root / "train.jsonl"


NAMED = (
    "cut-image",
    "empty-image",
    "text-image",
    "thin-image",
    "missing-image",
    "leaves-folder",
    "address",
    "broken-video",
    "untrained",
    "too-long",
)


def test_every_broken_record_is_named_in_one_run(tmp_path, monkeypatch, broken, capsys):
    monkeypatch.setattr(records, "WORTH_PROCESSES", 2)  # through processes, as for large data
    folder = tmp_path / "run"
    data = [f"data.path={broken}", "data.max_tokens=256", "optim=adamw", "optim.lr=1e-3"]
    assert run(monkeypatch, folder, "data=files", *data) == 1
    refused = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in refused} >= set(NAMED)
    assert len(refused) == len(NAMED) + 3  # a strange role, half a line, a byte that is no UTF-8
    assert {entry["stage"] for entry in refused} == {"read", "format", "media", "encode", "size"}
    out = capsys.readouterr().out
    assert "to put right before training" in out and "13 records are refused" in out
    report = said(folder)
    assert report["problems"] > 0 and report["numbers"]["refused"] == 13 and report["numbers"]["records"] == 41
    # nothing of a run is there, so that the real one starts anew
    assert {path.name for path in folder.iterdir()} == {"doctor.json", "quarantine.jsonl"}


def test_a_few_bad_records_are_a_warning(tmp_path, monkeypatch, broken):
    lines = broken.read_bytes().splitlines()
    few = broken.with_name("few.jsonl")
    few.write_bytes(b"\n".join(lines[:43]))  # two bad ones
    settings = ["data=files", f"data.path={few}", "data.max_tokens=256", "optim=adamw", "optim.lr=1e-3"]
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    assert any("cut.jpg" in text for text in texts(said(tmp_path / "run"), "warning"))
    assert run(monkeypatch, tmp_path / "run", *settings, "data.max_bad=0") == 1
    refused = tmp_path / "run" / "quarantine.jsonl"
    assert len(refused.read_text().splitlines()) == 2  # the second look found the same ones
    (broken.parent / "cut.jpg").write_bytes(picture())
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    assert [json.loads(line)["id"] for line in refused.read_text().splitlines()] == ["empty-image"]


def test_a_healthy_run_and_its_packing(tmp_path, monkeypatch, capsys):
    """What it foretells is what the stream of training counts."""
    lines = digits.write_jsonl(tmp_path / "digits")["train"].read_text().splitlines()
    few = tmp_path / "digits" / "few.jsonl"
    few.write_text("\n".join(lines[:60]))
    settings = ["data=files", f"data.path={few}", "data.max_tokens=256", "data.lookahead=8", "data.eval_fraction=0.1"]
    settings += ["optim=adamw", "optim.lr=1e-3"]
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    report = said(tmp_path / "run")
    assert report["problems"] == report["warnings"] == 0
    numbers = report["numbers"]
    assert numbers["records"] == 54 and numbers["refused"] == 0
    config = load(*settings)
    architecture = read_config(config.model)
    stream = build_data(
        config.data, build_processor(config.model, architecture), rules=rules_of(config), rank=0, world=1
    ).train
    assert numbers["updates_per_epoch"] == numbers["rows_per_epoch"] == stream.count_steps(1.0) > 1
    stream.close()
    with torch.device("meta"):
        model = ErnieModel(architecture)
    assert numbers["parameters"] == numbers["trained_parameters"] == sum(p.numel() for p in model.parameters())
    out = capsys.readouterr().out
    assert "nothing is in the way, 0 warnings" in out and "tokens per record" in out


def test_adapters_and_what_random_weights_are_bad_for(tmp_path, monkeypatch, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"id": "same", "messages": [QUESTION, ANSWER]}) for _ in range(3)))
    # Of a file the second record of an id is refused; a stream cannot know.
    sets = f"data.sets={{a: {{path: {few}}}, b: {{path: {few}, streaming: true}}}}"
    settings = ["data=files", sets, "peft=lora", "run.steps=200"]
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    report = said(tmp_path / "run")
    warnings = " ".join(texts(report, "warning"))
    assert "adapters train beside random weights" in warnings
    assert "the id 'same' is already that of" in warnings
    assert "training data uses ids more than once: 1 of them (same)" in warnings
    assert 0 < report["numbers"]["trained_parameters"] < report["numbers"]["parameters"] / 5
    assert "adapters of" in capsys.readouterr().out


def test_what_cannot_be_opened_is_one_problem_among_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    gone = ["data=files", "data.path=gone.jsonl", "run.steps=200"]
    assert run(monkeypatch, tmp_path / "run", *gone, "model.checkpoint=some/where", "model.config=null") == 1
    found = texts(said(tmp_path / "run"), "problem")
    assert any("HF_HUB_OFFLINE" in text for text in found)
    assert run(monkeypatch, tmp_path / "run", *gone) == 1
    assert any("gone.jsonl" in text for text in texts(said(tmp_path / "run"), "problem"))
    assert "  1. data: " in capsys.readouterr().out


def test_of_the_bad_records_that_a_run_has_met_those_still_bad_are_told(tmp_path, monkeypatch, broken):
    few = broken.with_name("few.jsonl")
    few.write_bytes(b"\n".join(broken.read_bytes().splitlines()[:43]))
    settings = ["data=files", f"data.path={few}", "data.max_tokens=256", "optim=adamw", "optim.lr=1e-3"]
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    (tmp_path / "run" / "metrics.jsonl").write_text("")  # a run stands there, and its quarantine stays
    (broken.parent / "cut.jpg").write_bytes(picture())
    assert run(monkeypatch, tmp_path / "run", *settings) == 0
    warnings = " ".join(texts(said(tmp_path / "run"), "warning"))
    assert "empty.png" in warnings and "cut.jpg" not in warnings and "1 records are refused" in warnings
    assert said(tmp_path / "run")["numbers"]["refused"] == 1


def test_a_stream_whose_epochs_cannot_be_counted_is_a_problem(tmp_path, monkeypatch):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    settings = ["data=files", f"data.path={path}", "data.streaming=true"]
    assert run(monkeypatch, tmp_path / "run", *settings, "run.steps=null", "run.epochs=1") == 1
    assert any("Set run.steps" in text for text in texts(said(tmp_path / "run"), "problem"))
    assert run(monkeypatch, tmp_path / "run", *settings, "run.steps=200") == 0


def test_a_warmup_longer_than_the_run_does_not_hide_what_a_step_takes(tmp_path, monkeypatch):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    settings = ["data=files", f"data.path={path}", "run.steps=null", "run.epochs=1", "optim.warmup_steps=5"]
    assert run(monkeypatch, tmp_path / "run", *settings) == 1
    assert any("optim.warmup_steps (5) is not shorter" in text for text in texts(said(tmp_path / "run"), "problem"))
    assert said(tmp_path / "run")["numbers"]["update_s_least"] > 0


def test_rows_are_those_that_are_drawn_not_all_there_are():
    found = records.Statistics("data", sizes=[(10, 1, 0, 0), (20, 2, 8, 1), (1000, 900, 4000, 1)])
    rows = cost.Rows.of(found, [[0, 1], [0], [1, 1, 0]])  # of a mixture: nothing of the large third one
    assert rows == cost.Rows(num_rows=3, records=2, tokens=90 / 3, trained=9 / 3, patches=24 / 3, most_patches=16)
