"""`ernie plan`: the program."""

import json
import sys

import pytest

from train import plan


def run(monkeypatch, tmp_path, *settings: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ernie plan", f"run.folder={tmp_path}", *settings])
    try:
        plan.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_one_layout(monkeypatch, tmp_path, capsys):
    settings = ["experiment=digits", "plan.gpus=4", "parallel=ep2_zero2", "plan.tflops=1", "run.steps=1000"]
    assert run(monkeypatch, tmp_path, *settings) == 0
    told = capsys.readouterr().out
    for part in ("weights", "optimizer", "highest point", "experts", "checkpoint", "fits         yes", "tokens take"):
        assert part in told
    found = json.loads((tmp_path / "plan.json").read_text())
    (layout,) = found["layouts"]
    assert layout["fits"] and layout["parallel"]["expert"] == 2
    assert found["tokens"] == 1000 * 4 * 1024
    assert 0 < layout["memory"]["weights"] < layout["memory"]["peak"]


def test_a_search(monkeypatch, tmp_path, capsys):
    settings = ["model=ernie_4_5_21b_a3b", "plan.search=true", "plan.show=3", "data.max_tokens=4096", "plan.tokens=1e9"]
    assert run(monkeypatch, tmp_path, *settings) == 0
    told = capsys.readouterr().out
    assert "fastest      parallel.zero=" in told and "1 B tokens take" in told
    assert len(json.loads((tmp_path / "plan.json").read_text())["layouts"]) == 3


def test_nothing_fits(monkeypatch, tmp_path, capsys):
    settings = ["model=ernie_4_5_21b_a3b", "plan.search=true", "plan.gpus=1", "plan.host_gb=64"]
    assert run(monkeypatch, tmp_path, *settings) == 0
    told = capsys.readouterr().out
    assert "fits         nothing; something does from 8 GPUs on (plan.gpus=8)" in told
    assert "not          zero=" in told
    assert json.loads((tmp_path / "plan.json").read_text())["layouts"] == []


@pytest.mark.parametrize(
    "setting, told",
    [
        ("plan.gpus=0", "plan.gpus is 0; it must be at least 1."),
        ("plan.gpu_gb=0", "plan.gpu_gb is 0.0; it must be a positive number."),
        ("plan.mfu=2", "plan.mfu is 2.0; it must be more than 0 and at most 1."),
        ("plan.imbalance=0.5", "plan.imbalance is 0.5; it must be 1 (even) or more."),
        ("plan=h101", "there is no configs/plan/h101.yaml; did you mean plan=h100?"),
        ("plan.device=H101", "plan.device=H101 has no known rate"),
    ],
)
def test_mistakes(monkeypatch, tmp_path, capsys, setting, told):
    assert run(monkeypatch, tmp_path, "experiment=digits", setting) == 1
    assert told in capsys.readouterr().err


def test_the_length_of_the_data_as_the_doctor_found_it(monkeypatch, tmp_path, capsys):
    (tmp_path / "doctor.json").write_text(json.dumps({"numbers": {"tokens": 5_000_000}}))
    settings = ["experiment=digits", "run.steps=null", "run.epochs=2", "plan.tflops=1", "plan.gpus=1"]
    assert run(monkeypatch, tmp_path, *settings) == 0
    assert "10 M tokens take" in capsys.readouterr().out
