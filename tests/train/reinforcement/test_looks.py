"""`ernie doctor rl`, `preview rl` and `plan rl`, and what `ernie rl` refuses or gives up on."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.test_configs import load
from train import doctor, plan, preview, rl
from train.compose import differences, plain
from train.config import UserError

SETTINGS = ["tracker=none", "plan.device=cpu", "model.precision=fp32", "data=files", "agent.max_tokens=256"]
PROGRAMS = {"doctor": doctor, "preview": preview, "plan": plan}


def records(folder: Path, *given: dict) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"answer": "4", "reward": "exact", **one}) + "\n" for one in given))
    return f"data.path={path}"


def asks(text: str, *parts: dict) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def run(monkeypatch, name: str, folder: Path, *settings: str) -> int:
    arguments = [f"ernie {name}", *([] if name == "rl" else ["rl"]), *SETTINGS, f"run.folder={folder}", *settings]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        (rl if name == "rl" else PROGRAMS[name]).main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_the_doctor_looks_at_prompts(tmp_path, monkeypatch):
    data = records(tmp_path, asks("2 + 2?"), asks("1 + 3?"))
    assert run(monkeypatch, "doctor", tmp_path / "run", data, "sampling.max_new_tokens=8") == 0
    report = json.loads((tmp_path / "run" / "doctor.json").read_text())
    assert report["numbers"]["prompts"] == 2 and report["numbers"]["refused"] == 0


def test_the_doctor_names_prompts_that_cannot_be_asked(tmp_path, monkeypatch, capsys):
    data = records(
        tmp_path,
        asks("word " * 300),
        asks("?", {"type": "image", "image": "missing.png"}),
        asks("2 + 2?") | {"tools": [{"type": "function", "function": {"name": "stranger", "parameters": {}}}]},
    )
    assert run(monkeypatch, "doctor", tmp_path / "run", data) == 1
    said = capsys.readouterr().out
    assert "prompts.jsonl:1' has" in said and "agent.max_tokens=256" in said
    assert "missing.png: no such file" in said
    assert "2 prompts of training data cannot be asked" in said
    assert "offer the tool stranger, which agent.tools does not have" in said
    assert "after 1 of 1 prompts" in said  # sampling.max_new_tokens=1024


def test_the_preview_shows_prompts_and_what_is_right(tmp_path, monkeypatch, capsys):
    data = records(tmp_path, asks("2 + 2?"), asks("3 + 1?"))
    settings = (data, "agent.tools=[image_zoom_in_tool]", "agent.max_tokens=1024")
    assert run(monkeypatch, "preview", tmp_path / "run", *settings) == 0
    assert "shown     2 prompts" in capsys.readouterr().out
    page = (tmp_path / "run" / "preview.html").read_text()
    assert page.count("right: 4   (exact)") == 2 and "tool definitions" in page and "Packed rows" not in page


def test_the_plan_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "plan", tmp_path / "run", "data.path=-", "run.steps=3") == 0
    said = capsys.readouterr().out
    assert "rollouts are not in these numbers" in said and "\ndata " not in said


def test_a_run_that_can_score_nothing_ends(tmp_path, monkeypatch, capfd):
    data = records(tmp_path, asks("?", {"type": "image", "image": "missing.png"}))
    small = ("rollout.groups=1", "rollout.updates=1", "rollout.attempts=2", "run.steps=3", "rewards.workers=0")
    assert run(monkeypatch, "rl", tmp_path / "run", data, *small, "rollout.max_rounds=1") == 1
    told = capfd.readouterr().err
    assert "none of the 2 attempts could be scored in the first rollout" in told and "2 x missing.png" in told


BAD = ({"messages": [{"role": "nobody", "content": "?"}]}, asks("?", {"type": "image", "image": "missing.png"}))
"""A record that cannot be read, and one whose picture is not there: that shows when it is asked."""
GOOD = tuple(asks(f"{number}?") for number in range(5))
SMALL = ("rollout.groups=7", "rollout.updates=1", "rollout.attempts=2", "rewards.workers=0", "rollout.max_rounds=1")
SMALL += ("sampler.kind=uniform", "sampling.max_new_tokens=3", "rollout.max_idle=null", "optim.warmup_steps=0")


def quarantined(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_bad_records_are_left_out_and_told(tmp_path, monkeypatch, capfd):
    data = records(tmp_path, GOOD[0], *BAD, *GOOD[1:])
    assert run(monkeypatch, "rl", tmp_path / "run", data, *SMALL, "run.steps=2") == 0
    read, media = quarantined(tmp_path / "run")
    assert (read["stage"], read["line"]) == ("format", 2) and "nobody" in read["reason"]
    assert (media["stage"], media["line"]) == ("media", 3) and "missing.png" in media["reason"]
    said = capfd.readouterr().out
    assert "1 record is refused" in said and "6 prompts of" in said  # before the first rollout
    assert "left out  2 records were refused" in said
    assert re.search(r"rows      2 rollouts, \d+ groups asked, 0 learned from", said)
    # No answer was right: nothing was learned anywhere, which is not for want of data for a part of the model.
    assert "no update had a gradient other than zero" in said and "no gradient ever reached" not in said
    # The others were asked, the one without its picture in both rollouts: it may be there again.
    asked = [json.loads(line) for line in (tmp_path / "run/zero_gradient.jsonl").read_text().splitlines()]
    assert [one["step"] for one in asked] == [1, 2]


@pytest.mark.parametrize(
    "bad, told", [(BAD[0], "1 of mine, at stage format"), (BAD[1], "1 of mine, at stage media")], ids=["read", "media"]
)
def test_more_bad_records_than_are_tolerated_end_the_run(tmp_path, monkeypatch, capfd, bad, told):
    data = records(tmp_path, *GOOD, bad)
    assert run(monkeypatch, "rl", tmp_path / "run", data, *SMALL, "run.steps=2", "data.max_bad=0") == 1
    said = capfd.readouterr().err
    assert "1 record cannot be trained on; data.max_bad=0 tolerates 0." in said and "Traceback" not in said
    assert told.partition(",")[2] in said


def test_doctor_names_records_that_cannot_be_read_and_looks_at_the_others(tmp_path, monkeypatch, capsys):
    data = records(tmp_path, *GOOD, BAD[0])
    assert run(monkeypatch, "doctor", tmp_path / "run", data, *SMALL, "run.steps=2") == 0
    said = capsys.readouterr().out
    assert "1 records are refused (1 at stage format)" in said and "5 prompts of training data can be asked" in said
    assert run(monkeypatch, "doctor", tmp_path / "run", data, *SMALL, "run.steps=2", "data.max_bad=0") == 1


def test_a_run_with_nothing_left_to_learn_saves_and_ends(tmp_path, monkeypatch, capfd):
    """No answer of random weights is the right one, so that all groups are all wrong."""
    data = records(tmp_path, asks("2 + 2?"), asks("1 + 3?"))
    small = ("rollout.updates=2", "rollout.attempts=2", "run.steps=9", "rewards.workers=0", "rollout.max_rounds=1")
    small = (*small, "rollout.groups=2", "sampling.max_new_tokens=4", "optim.schedule=constant")
    assert run(monkeypatch, "rl", tmp_path / "run", data, *small, "rollout.max_idle=2") == 1
    told = capfd.readouterr().err
    assert "ended after step 3 of 9: the last 2 rollouts gave nothing to learn" in told and "are all wrong" in told
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000003"]
    # With a larger limit it goes on from there, and its last update ends it as ever.
    assert run(monkeypatch, "rl", tmp_path / "run", data, *small, "rollout.max_idle=3", "run.steps=5") == 0
    assert (tmp_path / "run/export").is_dir()


def test_a_reward_that_no_record_asks_for_is_refused(tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, "rl", tmp_path / "run", records(tmp_path, asks("?")), "reward=math", "run.steps=1") == 1
    assert "reward=math is for records that name none, and all name their own (exact)" in capfd.readouterr().err


def test_records_without_a_reward_are_told_of_settings_that_there_are(tmp_path, monkeypatch, capfd):
    data = records(tmp_path, asks("?") | {"reward": None})
    assert run(monkeypatch, "rl", tmp_path / "run", data, "run.steps=1") == 1
    told = capfd.readouterr().err
    assert "names no reward" in told and "reward=exact." in told and "per_task" not in told and "tasks=" not in told


def test_options_of_a_reward_that_are_none_are_told_of(tmp_path, monkeypatch, capfd):
    data = records(tmp_path, asks("?") | {"reward_options": "tight"})
    assert run(monkeypatch, "rl", tmp_path / "run", data, "run.steps=1") == 1
    assert "reward_options is 'tight'; it must be like {tolerance: 0.05}" in capfd.readouterr().err


def test_what_does_not_change_the_numbers_may_change_when_a_run_goes_on():
    settings = ("data=files", "data.path=x.jsonl")
    free = ("rewards.workers=3", "rollout.vllm.urls=[http://elsewhere:8000]", "mismatch.stop.mean=2", "record.every=1")
    old = plain(load(*settings, entry="rl"))
    assert differences(old, plain(load(*settings, *free, entry="rl"))) == {}
    assert list(differences(old, plain(load(*settings, "rewards.time_s=3", entry="rl")))) == ["rewards.time_s"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("sampling.top_k=1", "leave the likeliest token"),
        ("sampling.min_p=1", "leave the likeliest token"),
        ("data.too_long=shrink_images", "neither cuts prompts"),
        ("data.shuffle=false", "always draws prompts at random"),
        ("evaluate.max_new_tokens=99", "sampling.max_new_tokens is for both"),
        *((f"data.{key}", "and would do nothing") for key in ("lookahead=8", "workers=2", "prefetch=4")),
        ("data.min_image_pixels=784", "says how far pictures may shrink"),
        ("data.sets={a: {path: a.jsonl, weight: 2}, b: {path: b.jsonl}}", "data.sets.a.weight would do nothing"),
        ("data.sets={a: {path: a.jsonl, modality: text}}", "data.sets.a.modality would do nothing"),
        *((f"data.{key}", "would do nothing") for key in ("mix=concat", "stop=last", "modality_ratio={text: 1}")),
        *((f"data.{key}", "and would do nothing") for key in ("cache_gib=1", "cache_folder=x", "slow_s=3")),
        ("evaluate.sheet=5", "draws no sheet"),
        *((f"agent.{key}=[bad.txt]", "attempts are not filtered") for key in ("input_filters", "output_filters")),
    ],
)
def test_settings_that_would_do_nothing_are_refused(setting, told):
    data = ["data=files"] if "sets" in setting else ["data=files", "data.path=x.jsonl"]
    with pytest.raises(UserError, match=told):
        load(*data, setting, entry="rl")
