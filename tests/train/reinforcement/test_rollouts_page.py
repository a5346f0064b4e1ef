"""The page of rollouts: what a model writes stays text, also in a browser, and what is left out is said."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.train.reinforcement.asked import PROCESSOR, attempt, group, question
from train.reinforcement import curves
from train.reinforcement.recorded import Place, lines_of
from train.reinforcement.rollouts_page import best_and_worst, evenly, shortened, table_of, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
ZERO = [
    {
        "step": 2,
        "attempts": {"rollout": 0, "attempts": 4, "fates": {"wrong": 1, "learned": 3}, "problems": {EVIL: 1}},
        "tokens": {"sampled": 50, "fates": {"clipped": 20, "taught": 30}, "left": 0.45},
    }
]


def recorded(folder: Path) -> list[dict]:
    """Two groups of rollout 0 and one of rollout 3; somebody writes HTML."""
    folder.mkdir(exist_ok=True)
    crop = Image.new("RGB", (30, 20), "red")
    evil = question(1, text=EVIL, expected=EVIL)
    groups = [
        (0, evil, group(0, attempt(EVIL, 0.0), attempt("7", 1.0, crop=crop), attempt("7", 1.0, crop=crop))),
        (0, question(0), group(1, attempt("7", None, problem=EVIL), attempt("1", 0.0))),
        (3, question(0), group(9, attempt("7", 1.0), attempt("8", 0.25))),
    ]
    lines = []
    for rollout, asked, one in groups:
        place = Place(rollout=rollout, step=2 * rollout, domain=EVIL, kind="mixed")
        fates = ["learned"] * len(one.attempts)
        found = lines_of(one, asked, place, fates, [0.5] * len(one.attempts), PROCESSOR, folder)
        lines += json.loads(json.dumps(list(found)))
    return lines


def page_of(folder: Path, lines: list[dict], learned: list[dict], **how: int) -> str:
    settings = {"attempts": 6, "recorded": 2} | how
    rewards = [(0, 0.25), (1, 0.5), (2, 0.25), (3, 0.75)]
    return write_page(f"run {EVIL}", lines, learned, ZERO, rewards, folder=folder, band=(0.5, 5.0), **settings)


def data_of(page: str) -> dict:
    found = re.search(r"const DATA=(.*);</script>", page)
    assert found is not None
    return json.loads(found[1])


def test_nothing_that_was_written_is_html(tmp_path):
    page = page_of(tmp_path, recorded(tmp_path), [])
    assert EVIL not in page and "document.title" in page  # it is there, as JSON
    assert page.count("<script>") == page.count("</script>") == 2
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert data_of(page)["rollouts"][0]["groups"][0]["question"] == EVIL


def test_what_an_update_learned_is_beside_what_was_recorded(tmp_path):
    lines = recorded(tmp_path)
    tokens = sum(piece.get("count", len(piece.get("ids", ()))) for piece in lines[1]["pieces"])
    gaps = [place / 100 for place in range(tokens)]
    learned = [{"step": 5, "rollout": 0, "group": 0, "attempt": 1, "advantage": 1.25, "gaps": gaps}]
    first = data_of(page_of(tmp_path, lines, learned))["rollouts"][0]["groups"][0]
    best = first["attempts"][0]
    assert (best["attempt"], best["advantage"], best["learned"]) == (1, 1.25, 5)
    at = 0
    for piece in best["pieces"]:
        count = piece.get("count", len(piece.get("ids", ())))
        if "logprobs" in piece:
            assert piece["gaps"] == gaps[at : at + count]
        else:
            assert "gaps" not in piece
        at += count
    assert at == tokens


def test_equal_attempts_are_shown_once(tmp_path):
    first = data_of(page_of(tmp_path, recorded(tmp_path), []))["rollouts"][0]["groups"][0]
    assert [(one["attempt"], one["same"]) for one in first["attempts"]] == [(1, 1), (0, 0)]
    assert first["rewards"] == [0.0, 1.0, 1.0] and first["left"] == 0


def test_pictures_are_stored_once_and_one_that_is_gone_is_left_out(tmp_path):
    lines = recorded(tmp_path)
    assert len(data_of(page_of(tmp_path, lines, []))["pictures"]) == 1
    shutil.rmtree(tmp_path / "rollouts")
    assert data_of(page_of(tmp_path, lines, []))["pictures"] == {}


def test_some_of_many_rollouts(tmp_path):
    lines = [line for line in recorded(tmp_path) if line["rollout"] == 3]
    page = page_of(tmp_path, lines, [])
    assert [one["number"] for one in data_of(page)["rollouts"]] == [3]
    assert "2 rollouts recorded, 1 of them shown" in page
    alone = write_page("run", lines, [], [], {}, folder=tmp_path, attempts=2, recorded=1, band=(0.5, 5.0))
    assert "1 rollout recorded" in alone
    assert evenly(range(101), 5) == [0, 25, 50, 75, 100]
    assert evenly([3, 9], 5) == [3, 9]


@pytest.mark.parametrize("first", range(1, 7))
def test_of_a_long_attempt_both_ends_are_shown(first):
    def piece(kind: str, *ids: int) -> dict:
        return {"kind": kind, "ids": list(ids), "texts": [str(one) for one in ids], "logprobs": [0.0] * len(ids)}

    pieces = [
        piece("reasoning", 0, 1, 2),
        {"kind": "image", "count": 4},
        piece("result", 3, 4),
        piece("answer", 5, 6, 7, 8),
    ]
    short = shortened(pieces, first, 2)
    shown = [one for piece in short for one in piece.get("ids", ["cut"] if "left_out" in piece else [])]
    assert shown == [*range(first), "cut", 7, 8]
    assert [one["left_out"] for one in short if "left_out" in one] == [9 - first - 2]
    assert sum("count" in one for one in short) == 1
    assert all(len(one["ids"]) == len(one["texts"]) == len(one["logprobs"]) for one in short if "ids" in one)
    assert shortened(pieces, 7, 2) == pieces


def test_the_best_and_the_worst():
    attempts = [{"reward": reward} for reward in (0.5, None, 1.0, 0.25, 0.0, 0.75)]
    assert [one["reward"] for one in best_and_worst(attempts, 4)] == [1.0, 0.75, 0.0, None]
    assert [one["reward"] for one in best_and_worst(attempts, 6)] == [1.0, 0.75, 0.5, 0.25, 0.0, None]


def test_boxes_are_drawn_on_a_copy_for_the_trackers(tmp_path):
    (tmp_path / "rollouts").mkdir()
    Image.new("RGB", (200, 100), "white").save(tmp_path / "rollouts/p.png")
    (line, *_) = (one for one in recorded(tmp_path) if one["calls"])
    line["pictures"], line["calls"][0]["on"] = ["rollouts/p.png"], 0
    columns, ((pictures, crops, *rest),) = table_of([line], 6, tmp_path)
    assert len(columns) == 2 + len(rest)
    with Image.open(pictures[0]) as drawn:
        assert drawn.getpixel((20, 30)) == (9, 105, 218) and drawn.getpixel((100, 80)) == (255, 255, 255)
    with Image.open(tmp_path / "rollouts/p.png") as own:
        assert own.getpixel((20, 30)) == (255, 255, 255)
    assert [path.exists() for path in crops] == [True]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it_all_and_runs_nothing_of_it(tmp_path):
    page = page_of(tmp_path, recorded(tmp_path), [])
    (tmp_path / "page.html").write_text(page)
    dom = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}#rollout=0&colour=gap",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout
    assert "<title>run &lt;/script&gt;" in dom  # nobody has changed it
    shown = dom.partition("<main")[2].partition("</main>")[0]
    assert shown.count('class="attempt') == 4 and "onerror" in shown and '<img src="x"' not in shown
    assert "[object" not in shown and "undefined" not in shown and "NaN" not in shown
    assert "2 attempts of the group wrote this" in shown and "45.0 %" in shown
    assert 'class="box"' not in shown  # the prompt has no picture that a box could be drawn on


def test_curves(tmp_path):
    def line(step: int, **more: float) -> dict:
        numbers = {"reward": 0.1 * step, "zero_attempts_learned": 0.5, "zero_attempts_wrong": 0.5, "loss": 0.0}
        return {"step": step, "rollout": float((step - 1) // 2), **numbers, **more}

    lines = [
        {"step": 0, "eval_accuracy": 0.1},
        line(1),
        line(2, tool_use=0.5, mismatch_mean="nan"),  # type: ignore[arg-type]
        line(3, seconds_rollout=4.0, seconds_update=1.0),
    ]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write("".join(json.dumps(one) + "\n" for one in [*lines, {"step": 3, "image": "curves"}]))
    assert curves.history(tmp_path) == lines
    assert curves.rewards_of(lines) == [(0, pytest.approx(0.2)), (1, pytest.approx(0.3))]
    curves.draw(lines, tmp_path / "curves.png", "run")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 20
    with pytest.raises(ValueError, match="no update"):
        curves.draw(lines[:1], tmp_path / "none.png", "run")
    assert curves.history(tmp_path / "nowhere") == []


def test_long_curves_are_thinned():
    assert curves.thinned([(n, float(n)) for n in range(10)], 5) == [
        (0.5, 0.5),
        (2.5, 2.5),
        (4.5, 4.5),
        (6.5, 6.5),
        (8.5, 8.5),
    ]
    assert curves.thinned([(0, 1.0), (1, float("nan"))], 1) == [(0.5, 1.0)]
    assert curves.thinned([], 5) == []
