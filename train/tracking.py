"""Where a run's numbers go: metrics.jsonl always, and trackio, TensorBoard and wandb by choice, several at once.

    trackers = make_trackers(["trackio", "wandb"], project="ernie")     # [jsonl, trackio, wandb]
    for tracker in trackers:
        tracker.start(run_name, config, folder, marks.get(tracker.name))
    ...
        tracker.log({"loss": 0.41}, step=120)

Two rules hold for every tracker. What is wrong *before* the first step (a missing package, a read-only folder, a
refused key) is a `TrackerError` from `make_trackers` or `start`. What goes wrong *later* (a network that drops, a full
disk) is said once and costs numbers, never the run.

A run goes on as the same one after a resume, and shows no step twice: save `{tracker.name: tracker.mark()}` with the
training state and hand each mark back to `start`. What was recorded after the mark, by a process that died, is dropped.
"""

import contextlib
import difflib
import importlib
import io
import json
import logging
import math
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

logger = logging.getLogger(__name__)


Cell = str | float | Path | Sequence[Path] | None
"""Of a table; a path is a picture, and a cell may hold several."""

Mark = dict[str, Any]
"""What a tracker needs to go on with a run; anything JSON can hold."""


class TrackerError(RuntimeError):
    """A tracker that cannot start, with the way out."""


class Tracker(Protocol):
    """One place that a run's metrics go to."""

    name: str

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        """Open a new run, or go on with one where `mark` was taken: what it recorded later is dropped."""
        ...

    def mark(self) -> Mark:
        """Which run this is and how far it has come, for `start`. All that was logged so far is on the disk."""
        ...

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def log_image(self, name: str, path: Path, step: int) -> None: ...

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None: ...

    def finish(self) -> None: ...


def make_trackers(names: Sequence[str], project: str) -> list[Tracker]:
    """The metrics.jsonl tracker, then one tracker per name. "none" adds nothing.

    Raises `TrackerError` for an unknown name or a package that isn't installed.
    """
    trackers: list[Tracker] = [Guarded(JsonlTracker())]
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TrackerError(f"tracker={name} is not known; choose from {', '.join(sorted(TRACKERS))}, none.{hint}")
        trackers.append(Guarded(TRACKERS[name](project)))
    return trackers


class Guarded:
    """Wraps a tracker so that `start` fails with a clear error and nothing after it can end the run."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.name = tracker.name
        self.last_mark: Mark = {}
        self.calls = 0
        self.failures = 0

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        try:
            self.tracker.start(run_name, config, folder, mark)
            self.last_mark = self.tracker.mark()
        except TrackerError:
            raise
        except Exception as error:
            raise TrackerError(
                f"tracker={self.name} could not start: {type(error).__name__}: {error}. "
                f"Put it right or leave {self.name} out of tracker=..."
            ) from error

    def mark(self) -> Mark:
        def take() -> None:
            self.last_mark = self.tracker.mark()

        self._attempt(take)
        return self.last_mark

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._attempt(lambda: self.tracker.log(metrics, step))

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._attempt(lambda: self.tracker.log_image(name, path, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        self._attempt(lambda: self.tracker.log_table(name, columns, rows, step))

    def finish(self) -> None:
        self._attempt(self.tracker.finish)
        if self.failures:
            logger.warning("tracker %s: %d of %d calls failed.", self.name, self.failures, self.calls)

    def _attempt(self, call: Callable[[], None]) -> None:
        self.calls += 1
        try:
            call()
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning(
                    "tracker %s failed; the run goes on and keeps trying it in silence. %s: %s",
                    self.name,
                    type(error).__name__,
                    error,
                )


class JsonlTracker:
    """metrics.jsonl in the run folder: one JSON object per line, flushed, always written.

    {"step": 10, "time": 1767225600.0, "loss": 0.41, ...}      a number that is not finite is the string "nan" or "inf"
    {"step": 10, "time": 1767225600.0, "image": "answers", "path": "answers_10.png"}
    {"step": 10, "time": 1767225600.0, "table": "answers", "columns": ["picture", "said"], "rows": [["a.png", "7"]]}
    """

    name = "jsonl"
    file_name = "metrics.jsonl"

    def __init__(self):
        self.file: TextIO | None = None

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        if mark is not None:
            cut(path, mark["bytes"])
        elif path.exists() and path.stat().st_size:
            raise TrackerError(
                f"{path} already holds a run's metrics. Resume that run (resume=auto) or choose another run folder."
            )
        self.folder = folder
        self.file = path.open("a", encoding="utf-8")

    def mark(self) -> Mark:
        if self.file is None:
            raise RuntimeError("mark before start, or after finish")
        os.fsync(self.file.fileno())
        return {"bytes": os.fstat(self.file.fileno()).st_size}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._write({"step": step, "time": round(time.time(), 3), **{k: _finite(v) for k, v in metrics.items()}})

    def log_image(self, name: str, path: Path, step: int) -> None:
        self._write({"step": step, "time": round(time.time(), 3), "image": name, "path": self._shown(path)})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        plain = [[self._plain(one) for one in row] for row in rows]
        table = {"table": name, "columns": list(columns), "rows": plain}
        self._write({"step": step, "time": round(time.time(), 3), **table})

    def _plain(self, cell: Cell) -> Any:
        match cell:
            case Path():
                return self._shown(cell)
            case str() | None:
                return cell
            case list() | tuple():
                return [self._shown(path) for path in cell]
            case float():
                return _finite(cell)
        return cell

    def _shown(self, path: Path) -> str:
        """Relative to the run folder, where it lies in it."""
        path, folder = path.resolve(), self.folder.resolve()
        return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()

    def finish(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is None:
            raise RuntimeError("log before start, or after finish")
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def cut(path: Path, size: int) -> None:
    """Shorten a file of lines to `size` bytes, and to whole lines."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(min(size, os.fstat(file.fileno()).st_size))
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
        file.truncate(end)


def _check_writable(folder: Path) -> None:
    """trackio only warns of a folder it cannot write, and all numbers would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TrackerError(
            f"tracker=trackio could not start: its folder {folder} cannot be written ({error.strerror}). Set "
            "TRACKIO_DIR to another folder, or leave trackio out of tracker=..."
        ) from error


class TrackioTracker:
    """trackio: an SQLite file on this machine and a web page (`ernie dashboard`); no account, no network.

    The files lie in trackio's own folder (environment variable TRACKIO_DIR, by default ~/.cache/huggingface/trackio),
    so one dashboard shows all of a user's runs. trackio finds a run by its name, so two runs that ask for the same name
    get "name" and "name-2".
    """

    name = "trackio"

    def __init__(self, project: str):
        self.trackio = _import("trackio", "trackio")
        self.project = project
        self._name = ""

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        _check_writable(Path(importlib.import_module("trackio.utils").TRACKIO_DIR))
        self._name = mark["name"] if mark else _unused(run_name, self._run_names())
        with contextlib.redirect_stdout(io.StringIO()):  # five lines of advice about its own command line
            self.run = self.trackio.init(
                project=self.project,
                name=self._name,
                # Names that start with "_" are trackio's own.
                config={key: value for key, value in config.items() if not key.startswith("_")},
                resume="allow" if mark else "never",
                embed=False,
            )
        if mark and self.run._is_local:
            with self._database() as database:  # trackio itself has no way to take a number back
                database.execute("DELETE FROM metrics WHERE run_name = ? AND id > ?", (self._name, mark["row"]))

    def mark(self) -> Mark:
        if not self.run._is_local:  # TRACKIO_SPACE_ID or TRACKIO_SERVER_URL: a server takes nothing back
            return {"name": self._name, "row": 0}
        with self.run._client_lock:  # its own thread writes every half second; a kill would lose what waits
            self.run._flush_queues_inline()
        with self._database() as database:
            ((row,),) = database.execute("SELECT coalesce(max(id), 0) FROM metrics WHERE run_name = ?", (self._name,))
        return {"name": self._name, "row": row}

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        path = storage.init_db(self.project)
        with storage._get_process_lock(self.project), storage._get_connection(path) as connection:
            yield connection

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(charts(metrics), step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        # trackio needs a current run to know where to copy the file to; `init` made ours the current one.
        self.run.log({name: self.trackio.Image(str(path), caption=f"{name}, step {step}")}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        data = [[self._cell(one) for one in row] for row in rows]
        self.run.log({name: self.trackio.Table(columns=list(columns), data=data)}, step=step)

    def _cell(self, cell: Cell) -> Any:
        pictures = [self.trackio.Image(str(path)) for path in _paths(cell)]
        return cell if not pictures else pictures[0] if isinstance(cell, Path) else pictures

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()

    def _run_names(self) -> set[str]:
        try:
            return {run.name for run in self.trackio.Api().runs(self.project)}
        except ValueError:  # the project does not exist yet
            return set()


class TensorBoardTracker:
    """TensorBoard event files in RUN_FOLDER/tensorboard; look at them with `tensorboard --logdir RUN_FOLDER`."""

    name = "tensorboard"

    def __init__(self, project: str):
        _import("tensorboard", "'ernie-train[tensorboard]'")

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.step = folder / "tensorboard", -1
        if mark:
            for path in self.folder.glob("events.*"):
                if path.name in mark["files"]:
                    os.truncate(path, min(mark["files"][path.name], path.stat().st_size))
                else:
                    path.unlink()
            self.step = mark["step"]
        # A TensorBoard that is running has read what was cut off: purge_step makes it forget.
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1 if mark else None)
        if not mark:
            self.writer.add_text("config", "```json\n" + json.dumps(config, indent=2, default=str) + "\n```")

    def mark(self) -> Mark:
        self.writer.flush()
        files = {path.name: path.stat().st_size for path in self.folder.glob("events.*")}
        return {"files": files, "step": self.step}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.step = step
        for key, value in charts(metrics).items():
            self.writer.add_scalar(key, value, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, numpy.asarray(image.convert("RGB")), step, dataformats="HWC")

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        """As text: TensorBoard has no tables. It shows no picture inside a text, which gets their names; the pictures
        come beside it, a line of them for each row that has some."""
        lines = [columns, ["---"] * len(columns), *rows]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(map(_in_markdown, line))} |" for line in lines), step)
        strips = [paths for row in rows if (paths := [path for cell in row for path in _paths(cell)])]
        if strips:
            self.writer.add_image(f"{name}_pictures", _contact(strips), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class WandbTracker:
    """Weights & Biases. With no key (WANDB_API_KEY or `wandb login`) the run is kept offline in RUN_FOLDER/wandb.

    WANDB_MODE=offline keeps it there even with a key; `wandb sync RUN_FOLDER/wandb/offline-run-*` uploads it later.
    A server takes nothing back, so steps trained again after a kill lie there twice, with equal values.
    """

    name = "wandb"

    def __init__(self, project: str):
        self.wandb = _import("wandb", "'ernie-train[wandb]'")
        self.project = project

    def start(self, run_name: str, config: dict[str, Any], folder: Path, mark: Mark | None = None) -> None:
        # `login` asks the server whether the key is good, so a refused one is an error now and not a silent run later.
        mode = os.environ.get("WANDB_MODE") or ("online" if self.wandb.login(prompt=False) else "offline")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(
            project=self.project,
            name=run_name,
            config=config,
            dir=str(folder),
            id=mark["id"] if mark else None,
            resume="allow" if mark else None,
            mode=mode,
            settings=self.wandb.Settings(console="off", silent=True),
        )
        # wandb refuses a step smaller than one it has seen, and a resumed run starts before the last one logged. So the
        # step travels as an ordinary number that the charts use as their axis.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def mark(self) -> Mark:
        return {"id": self.run.id}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({**charts(metrics), "step": step})

    def log_image(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        data = [[self._cell(one) for one in row] for row in rows]
        self.run.log({name: self.wandb.Table(columns=list(columns), data=data), "step": step})

    def _cell(self, cell: Cell) -> Any:
        """Several pictures become one, side by side: a column of wandb's has pictures or lists of them, not both."""
        paths = _paths(cell)
        if not paths:
            return cell
        return self.wandb.Image(str(cell) if isinstance(cell, Path) else _contact([paths]))

    def finish(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[str], Tracker]] = {
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


SECTIONS = frozenset("eval router layer loss data zero sampler mismatch groups attempts seconds engine rollout".split())


def charts(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics under the names of their charts; the dashboards make a section of what stands before a slash.

    loss            -> loss                 eval_accuracy   -> eval/accuracy
    tokens_per_s    -> speed/tokens_per_s   router_text_dead -> router/text_dead
    loss_image      -> loss/image           layer_text_dead_03 -> layer/text_dead_03
    zero_left       -> zero/left            attempts_truncated -> attempts/truncated
    """
    named = {}
    for key, value in metrics.items():
        section, _, rest = key.partition("_")
        if section in SECTIONS and rest and key != "data_wait":
            key = f"{section}/{rest}"
        elif key.endswith("_per_s") or key in ("step_s", "data_wait", "eta_s", "memory_gb", "mfu"):
            key = f"speed/{key}"
        elif key.endswith("tokens") or key in ("patches", "units", "flops", "skipped"):
            key = f"batch/{key}"
        named[key] = value
    return named


def _import(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackerError(
            f"tracker={module} needs the package {module}, which cannot be imported ({error}). "
            f"Install it with: pip install {install}"
        ) from error


def _unused(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _paths(cell: Cell) -> Sequence[Path]:
    return [cell] if isinstance(cell, Path) else list(cell) if isinstance(cell, list | tuple) else []


def _contact(strips: Sequence[Sequence[Path]], height: int = 160, gap: int = 6) -> Any:
    """(H, W, 3) uint8: lines of pictures, all equally high."""
    import numpy
    from PIL import Image

    lines = []
    for paths in strips:
        pictures = []
        for path in paths:
            with Image.open(path) as picture:
                size = (max(1, round(picture.width * height / picture.height)), height)
                pictures.append(picture.convert("RGB").resize(size))
        lines.append(pictures)
    width = max(sum(one.width + gap for one in pictures) for pictures in lines)
    sheet = Image.new("RGB", (width, len(lines) * (height + gap)), "white")
    for number, pictures in enumerate(lines):
        left = 0
        for picture in pictures:
            sheet.paste(picture, (left, number * (height + gap)))
            left += picture.width + gap
    return numpy.asarray(sheet)


def _in_markdown(cell: Cell) -> str:
    text = "" if cell is None else ", ".join(path.name for path in _paths(cell)) or str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(value: float) -> float | str:
    # JSON has no nan and no inf, and a run that diverged must show it.
    value = float(value)
    return value if math.isfinite(value) else str(value)
