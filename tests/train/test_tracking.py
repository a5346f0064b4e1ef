"""Trackers: every one against its own real library, offline."""

import json
import logging
import math
import struct
import sys
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from train.tracking import Guarded, JsonlTracker, TrackerError, charts, cut, make_trackers

CONFIG = {"optim": {"lr": 1e-3}, "model": {"layers": [1, 2]}, "note": None}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "run" / "answers.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 30), "#336699").save(path)
    return path


# ---- names ---------------------------------------------------------------------------------------


def test_jsonl_always_comes_first_and_none_adds_nothing():
    assert [tracker.name for tracker in make_trackers(["none"], "p")] == ["jsonl"]
    assert [tracker.name for tracker in make_trackers([], "p")] == ["jsonl"]
    assert [tracker.name for tracker in make_trackers(["tensorboard", "none", "tensorboard"], "p")] == [
        *("jsonl", "tensorboard")
    ]


def test_an_unknown_name_gives_the_choices_and_the_nearest():
    with pytest.raises(
        TrackerError, match="tracker=tensorbord is not known.*tensorboard, trackio, wandb, none.*mean tens"
    ):
        make_trackers(["tensorbord"], "p")


@pytest.mark.parametrize(
    ("name", "install"),
    [("trackio", "trackio"), ("tensorboard", r"'ernie-train\[tensorboard\]'"), ("wandb", r"'ernie-train\[wandb\]'")],
)
def test_a_missing_package_says_how_to_install_it(name, install, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    with pytest.raises(TrackerError, match=f"tracker={name} needs the package.*pip install {install}"):
        make_trackers([name], "p")


# ---- metrics.jsonl -------------------------------------------------------------------------------


def test_jsonl_has_one_line_per_call_at_once(tmp_path, picture):
    folder = picture.parent
    tracker = JsonlTracker()
    tracker.start("run", CONFIG, folder)
    tracker.log({"loss": 0.5, "accuracy": 1}, step=1)
    first = records(folder)  # before finish: a kill loses nothing that was logged
    tracker.log({"loss": math.nan, "grad_norm": math.inf}, step=2)
    tracker.log_image("answers", picture, step=2)
    tracker.log_table("table", ["picture", "said", "score"], [[picture, "7", math.nan], [None, "1", 0.5]], step=2)
    tracker.finish()

    assert [{k: v for k, v in r.items() if k != "time"} for r in first] == [{"step": 1, "loss": 0.5, "accuracy": 1.0}]
    assert [{k: v for k, v in r.items() if k != "time"} for r in records(folder)[1:]] == [
        {"step": 2, "loss": "nan", "grad_norm": "inf"},
        {"step": 2, "image": "answers", "path": "answers.png"},
        {
            "step": 2,
            "table": "table",
            "columns": ["picture", "said", "score"],
            "rows": [["answers.png", "7", "nan"], [None, "1", 0.5]],
        },
    ]


def test_resume_drops_what_was_recorded_after_the_mark_and_a_torn_line(tmp_path):
    tracker = JsonlTracker()
    tracker.start("run", CONFIG, tmp_path)
    for step in range(1, 8):
        tracker.log({"loss": float(step)}, step)
        if step == 5:
            mark = tracker.mark()
            tracker.log({"eval_nll": 1.0}, step)  # of the same step, and still after the mark
    tracker.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a write

    again = JsonlTracker()
    again.start("run", CONFIG, tmp_path, mark)
    again.log({"loss": 6.5}, 6)
    again.finish()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6.5)]


def test_resume_without_a_file_starts_one(tmp_path):
    cut(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_file_that_lost_its_end_is_not_filled_with_zeros(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    cut(path, 1000)
    assert path.read_text() == '{"step": 1}\n'


def test_a_new_run_never_writes_into_another_runs_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(TrackerError, match=r"metrics\.jsonl already holds.*resume=auto"):
        make_trackers([], "p")[0].start("run", CONFIG, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ---- failures ------------------------------------------------------------------------------------


class Breaking:
    """A tracker whose network is gone."""

    name = "breaking"

    def __init__(self, *, at_start: bool = False):
        self.at_start = at_start

    def start(self, run_name, config, folder, mark=None):
        if self.at_start:
            raise ConnectionError("no route to host")

    def mark(self):
        return {"id": "b"}

    def log(self, metrics, step):
        raise ConnectionError("no route to host")

    def log_image(self, name, path, step):
        raise OSError("disk full")

    def finish(self):
        raise ConnectionError("no route to host")


def test_failure_at_the_start_is_an_error_that_names_the_tracker(tmp_path):
    with pytest.raises(TrackerError, match="tracker=breaking could not start: ConnectionError: no route to host"):
        Guarded(Breaking(at_start=True)).start("run", {}, tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match="tracker=jsonl could not start"):
        make_trackers([], "p")[0].start("run", {}, tmp_path / "file" / "run")


def test_failure_later_is_said_once_and_counted_at_the_end(tmp_path, caplog):
    tracker = Guarded(Breaking())
    tracker.start("run", {}, tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            tracker.log({"loss": 1.0}, step)
        tracker.log_image("a", tmp_path / "a.png", 5)
        assert len(caplog.records) == 1
        assert "breaking" in caplog.text and "no route to host" in caplog.text
        tracker.finish()
    assert "7 of 7 calls failed" in caplog.text


# ---- trackio -------------------------------------------------------------------------------------


def trackio_logs(project: str, name: str) -> list[dict]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(project, name)


def test_trackio_keeps_numbers_and_pictures_on_this_machine(picture, capsys):
    _, tracker = make_trackers(["trackio"], "keeps")
    tracker.start("run", {**CONFIG, "_private": 1}, picture.parent)
    tracker.log({"loss": 0.5}, step=1)
    tracker.log({"loss": 0.4}, step=2)
    tracker.log_image("answers", picture, step=2)
    tracker.log_table("table", ["picture", "said"], [[picture, "7"], [None, "1"]], step=2)
    tracker.finish()
    assert tracker.failures == 0
    logs = trackio_logs("keeps", "run")
    (table,) = [log["table"] for log in logs if "table" in log]
    assert table["_type"] == "trackio.table" and [row["said"] for row in table["_value"]] == ["7", "1"]
    assert table["_value"][0]["picture"]["_type"] == "trackio.image"
    assert [(log["step"], log["loss"]) for log in logs if "loss" in log] == [(1, 0.5), (2, 0.4)]
    assert [log["answers"]["_type"] for log in logs if "answers" in log] == ["trackio.image"]
    assert capsys.readouterr().out == ""  # no advice in the middle of our own output


def test_trackio_without_a_folder_it_can_write_is_an_error_at_the_start(tmp_path, monkeypatch):
    """trackio itself only warns, and every number would be lost."""
    (tmp_path / "file").write_text("")
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "file" / "trackio")
    tracker = make_trackers(["trackio"], "test")[1]
    with pytest.raises(TrackerError, match=r"tracker=trackio could not start: .*TRACKIO_DIR"):
        tracker.start("run", {}, tmp_path)


def test_trackio_gives_two_runs_of_one_name_two_names_and_resumes_the_right_one(tmp_path):
    marks = []
    for loss in (1.0, 2.0):
        _, tracker = make_trackers(["trackio"], "names")
        tracker.start("run", CONFIG, tmp_path)
        tracker.log({"loss": loss}, step=1)
        marks.append(tracker.mark())
        tracker.finish()
    assert [mark["name"] for mark in marks] == ["run", "run-2"]

    _, tracker = make_trackers(["trackio"], "names")
    tracker.start("run", CONFIG, tmp_path, marks[0])
    tracker.log({"loss": 1.5}, step=2)
    tracker.finish()
    assert tracker.failures == 0 and tracker.mark()["name"] == "run"
    assert [(log["step"], log["loss"]) for log in trackio_logs("names", "run")] == [(1, 1.0), (2, 1.5)]
    assert [(log["step"], log["loss"]) for log in trackio_logs("names", "run-2")] == [(1, 2.0)]


def test_trackio_forgets_what_came_after_the_mark_and_loses_nothing_before_it(tmp_path, picture):
    _, tracker = make_trackers(["trackio"], "forgets")
    tracker.start("run", CONFIG, tmp_path)
    for step in (1, 2):
        tracker.log({"loss": float(step)}, step)
    mark = tracker.mark()
    # at once, and not when trackio's own thread gets to it: a kill may come now
    assert [log["step"] for log in trackio_logs("forgets", "run")] == [1, 2]
    tracker.log_image("answers", picture, 2)
    for step in (3, 4):
        tracker.log({"loss": float(step)}, step)
    tracker.finish()

    _, again = make_trackers(["trackio"], "forgets")
    again.start("run", CONFIG, tmp_path, mark)
    again.log({"loss": 3.5}, 3)
    again.finish()
    assert again.failures == 0
    assert [(log["step"], log.get("loss")) for log in trackio_logs("forgets", "run")] == [(1, 1.0), (2, 2.0), (3, 3.5)]


# ---- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_holds_the_numbers_and_forgets_the_steps_trained_again(picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = picture.parent
    _, tracker = make_trackers(["tensorboard"], "p")
    tracker.start("run", CONFIG, folder)
    for step in (1, 2):
        tracker.log({"loss": float(step)}, step)
    tracker.log_image("answers", picture, 2)
    tracker.log_table("table", ["picture", "said"], [[picture, "a|b\nc"]], 2)
    mark = tracker.mark()
    tracker.log({"loss": 9.0}, 2)  # of the same step, and still after the mark
    for step in (3, 4):
        tracker.log({"loss": float(step)}, step)
    tracker.finish()

    running = EventAccumulator(str(folder / "tensorboard"))  # a TensorBoard that looks on all the time
    running.Reload()
    for _ in range(2):  # killed twice, the second time before the next checkpoint
        _, again = make_trackers(["tensorboard"], "p")
        again.start("run", CONFIG, folder, mark)
        again.log({"loss": 3.5}, 3)
        again.finish()
        assert tracker.failures == again.failures == 0

    running.Reload()
    assert [e.step for e in running.Scalars("loss") if e.step > 2] == [3]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert [e.step for e in events.Images("answers")] == [2]
    (table,) = events.Tensors("table/text_summary")
    assert table.tensor_proto.string_val[0].decode().splitlines()[-1] == r"| answers.png | a\|b c |"


# ---- wandb ---------------------------------------------------------------------------------------


def wandb_records(path) -> Iterator[bytes]:
    """The records of an offline .wandb file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32,768 bytes hold chunks of (crc 4, length 2, kind 1, data); kind 1 is a whole record, 2-3-4 are the
    first, middle and last part of one; fewer than 7 bytes at the end of a block are padding.
    """
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_history(folder, runs: int) -> list[dict]:
    """What `wandb sync` would upload from the offline files of `runs` runs in the folder, in order.

    `finish` returns a moment before wandb's own process has written everything, so this waits for each "exit" record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 60
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
        files = [[Record.FromString(data) for data in wandb_records(path)] for path in paths]
        if len(files) == runs and all(file and file[-1].HasField("exit") for file in files):
            break
        assert time.monotonic() < deadline, "wandb did not finish its files within a minute"
        time.sleep(0.05)
    history = [record.history.item for file in files for record in file if record.HasField("history")]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items} for items in history]


def test_wandb_without_a_key_keeps_the_run_offline_and_resumes_its_id(picture, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(picture.parent / "no-such-netrc"))
    folder = picture.parent
    _, tracker = make_trackers(["wandb"], "p")
    tracker.start("run", CONFIG, folder)
    tracker.log({"loss": 0.5}, step=3)
    tracker.log_image("answers", picture, step=3)
    tracker.log_table("table", ["picture", "said"], [[picture, "7"]], step=3)
    mark = tracker.mark()
    tracker.finish()
    assert tracker.failures == 0
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1

    _, again = make_trackers(["wandb"], "p")
    again.start("run", CONFIG, folder, mark)
    again.log({"loss": 0.6}, step=2)  # smaller than a step that wandb has seen
    again.finish()
    assert again.failures == 0
    assert again.mark() == mark
    history = wandb_history(folder, runs=2)
    assert [(row["step"], row["loss"]) for row in history if "loss" in row] == [(3, 0.5), (2, 0.6)]
    assert sum("table/_type" in row or "table" in row for row in history) == 1
    assert [row["step"] for row in history if any(key.startswith("answers") for key in row)] == [3]


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_a_cell_may_hold_several_pictures(picture, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    other = picture.with_name("other.png")
    Image.new("RGB", (20, 30), "#993333").save(other)
    rows = [[[picture, other], "7"], [None, "1"], [(other,), "3"]]
    trackers = make_trackers([name], f"cells-{name}")
    for tracker in trackers:
        tracker.start("run", CONFIG, picture.parent)
        tracker.log_table("table", ["pictures", "said"], rows, step=2)
        tracker.finish()
        assert tracker.failures == 0, tracker.name
    (line,) = records(picture.parent)
    assert line["rows"] == [[["answers.png", "other.png"], "7"], [None, "1"], [["other.png"], "3"]]
    if name == "trackio":
        (table,) = [log["table"]["_value"] for log in trackio_logs(f"cells-{name}", "run") if "table" in log]
        assert [one["_type"] for one in table[0]["pictures"]] == ["trackio.image"] * 2
        assert table[1]["pictures"] is None and len(table[2]["pictures"]) == 1
    elif name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(picture.parent / "tensorboard"))
        events.Reload()
        (shown,) = events.Images("table_pictures")
        # Two rows have pictures, 160 pixels high: 40 x 30 and 20 x 30 side by side.
        assert (shown.width, shown.height) == (213 + 107 + 2 * 6, 2 * 166)
    else:
        cells = [tracker.tracker._cell(row[0]) for row in rows]
        assert [cell and cell.image.size for cell in cells] == [(332, 166), None, (113, 166)]


def test_charts_stand_in_sections():
    names = ["loss", "grad_norm", "eval_accuracy", "router_text_dead", "text_tokens_per_s", "memory_gb", "image_tokens"]
    names += ["flops", "mfu", "data_fill", "data_wait", "zero_left", "attempts_truncated", "seconds_asking"]
    assert list(charts(dict.fromkeys(names, 1.0))) == [
        *("loss", "grad_norm", "eval/accuracy", "router/text_dead", "speed/text_tokens_per_s", "speed/memory_gb"),
        *("batch/image_tokens", "batch/flops", "speed/mfu", "data/fill", "speed/data_wait"),
        *("zero/left", "attempts/truncated", "seconds/asking"),
    ]


def test_every_dashboard_uses_the_names_of_the_charts(tmp_path):
    trackers = make_trackers(["trackio", "tensorboard", "wandb"], "charts")
    for tracker in trackers:
        tracker.start("run", CONFIG, tmp_path)
        tracker.log({"eval_accuracy": 0.5}, 1)
        tracker.finish()
        assert tracker.failures == 0
    assert trackio_logs("charts", "run")[0]["eval/accuracy"] == 0.5
    assert wandb_history(tmp_path, runs=1)[0]["eval/accuracy"] == 0.5
    assert b"eval/accuracy" in next((tmp_path / "tensorboard").glob("events*")).read_bytes()
    assert records(tmp_path)[0]["eval_accuracy"] == 0.5  # the file keeps the names of the program


def test_several_at_once(picture):
    trackers = make_trackers(["trackio", "tensorboard", "wandb"], "several")
    for tracker in trackers:
        tracker.start("run", CONFIG, picture.parent)
    for step in (1, 2):
        for tracker in trackers:
            tracker.log({"loss": 1.0 / step}, step)
    for tracker in trackers:
        tracker.finish()
    assert [tracker.failures for tracker in trackers] == [0, 0, 0, 0]
