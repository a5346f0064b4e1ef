"""The commands as they are typed, on a checkpoint on the disk."""

import json
import sys

import pytest

from tests.tiny import DENSE, save_tiny
from train import compare, evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(DENSE, folder)
    return str(folder)


def ernie(monkeypatch, program, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", [f"ernie {program.__name__.removeprefix('train.')}", *arguments])
    try:
        program.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_evaluate_and_compare(monkeypatch, tmp_path, checkpoint, capsys):
    settings = [f"checkpoint={checkpoint}", "precision=fp32", "cpu=true", "tasks=[digits,counting]", "limit=3"]
    for name in ("a", "b"):
        assert ernie(monkeypatch, evaluate, *settings, f"output={tmp_path / name}", f"seed={'ab'.index(name)}") == 0
    said = capsys.readouterr().out
    assert "digits" in said and "mean of tasks" in said and f"written   {tmp_path / 'b' / 'results.json'}" in said
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["tasks"]["digits"]["questions"] == 3 and results["tasks"]["digits"]["likelihood"]["questions"] == 3
    assert results["settings"]["limit"] == 3 and results["run"]["versions"]["torch"]
    assert (tmp_path / "a" / "answers.html").exists()
    runs = f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]"
    assert ernie(monkeypatch, compare, runs, f"output={tmp_path / 'both.json'}") == 0
    assert "mcnemar" in capsys.readouterr().out
    assert json.loads((tmp_path / "both.json").read_text())["tasks"]["counting"]["difference"] == 0


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["tasks=[digits]"], "these settings have no default and were not given: checkpoint."),
        (["checkpoint=MODEL"], "tasks is empty; for example tasks=[digits]"),
        (["checkpoint=MODEL", "tasks=[digit]"], "there is no task 'digit'; did you mean digits?"),
        (["checkpoint=MODEL", "tasks=digits"], "tasks=digits: tasks is a list. Write tasks=[digits]."),
        (["checkpoint=/no/such", "tasks=[digits]", "limit=1"], "/no/such"),
        (["checkpoint=MODEL", "tasks=[digits]", "taks=1"], "taks is not a setting of evaluate; did you mean tasks?"),
        (["checkpoint=MODEL", "tasks=[digits]", "tracker=trakio"], "did you mean tracker=trackio?"),
        (["checkpoint=MODEL", "tasks=[digits]", "limit=1", "agent.tools=[zoom]"], "'zoom'"),
        (["checkpoint=MODEL", "tasks=[digits]", "limit=1", "sampling.top_p=2"], "sampling.top_p is 2"),
        (["checkpoint=MODEL", "tasks=[digits]", "per_task.digits.reward=exakt"], "there is no reward 'exakt'"),
    ],
)
def test_mistakes_end_in_one_message(monkeypatch, capsys, checkpoint, tmp_path, arguments, error):
    arguments = [one.replace("MODEL", checkpoint) for one in arguments]
    assert ernie(monkeypatch, evaluate, "precision=fp32", f"output={tmp_path / 'x'}", *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and error in said and "Traceback" not in said


def test_compare_needs_two(monkeypatch, capsys, tmp_path):
    assert ernie(monkeypatch, compare, "runs=[a]") == 1
    assert "runs holds 1 folders; give two" in capsys.readouterr().err
