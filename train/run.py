"""What surrounds every run: the program's edges, and the run folder.

    RUN_FOLDER/
      config.yaml       every setting, resolved
      run.json          each start of this run: command, versions, git state, where it resumed from
      metrics.jsonl     the record (train/tracking.py)
      trackers.json     where each tracker's record of this run begins
      data/             which records each update saw (train/ledger.py)
      checkpoints/      training state (train/checkpoint.py)
      best/             weights of the best evaluation   }  safetensors + config + tokenizer: folders that transformers
      export/           weights at the end               }  and vLLM load
      adapter/          with peft=lora, in peft's format; best_adapter/ likewise
      answers.png       held-out images with the model's answers

Errors that only the user can put right end in a short message and exit code 1, Ctrl-C in one and exit code 130;
anything else keeps its traceback.
"""

import faulthandler
import fcntl
import functools
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import hydra
from accelerate import Accelerator
from accelerate.utils import gather_object
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import DataError
from data.quarantine import Quarantine
from ernie_model.atomic import atomic_write
from ernie_model.checkpoint import CheckpointError, write_tensors
from ernie_model.config import ConfigError, ErnieConfig
from ernie_model.expert_parallel import Shard
from ernie_model.images import MediaError
from ernie_model.processor import Processor
from ernie_model.tokenizer import TokenizerError
from train import checkpoint
from train.compose import differences, plain, register
from train.config import (
    RunConfig,
    TrainingConfig,
    UserError,
)
from train.explain import explain
from train.peers import trace
from train.tracking import Mark, Tracker, TrackerError, make_trackers
from train.values import Values

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")

USER_ERRORS = (UserError, DataError, MediaError, ConfigError, CheckpointError, TokenizerError, TrackerError)
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
logger = logging.getLogger(__name__)
REPORTED_PACKAGES = ("ernie-train", "torch", "accelerate", "safetensors", "tokenizers", "numpy", "pillow", "av")


# ------------------------------------------------------------------------------------------------- the program's edges


def program(entry: str, *, also: Sequence[str] = ()) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a function of the composed settings a program: configs/ENTRY.yaml, the command line, errors, exit codes.

    `also`: other entries whose settings it takes, when its first argument names one (`ernie doctor dpo ...`).

    Hydra would print its own errors, and a line of its own above ours. HYDRA_FULL_ERROR makes it let its errors by,
    and ours travel past it; then both are told in the same form. ERNIE_DEBUG=1 or run.debug=true shows the traceback.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        caught: list[BaseException] = []

        def inside_hydra(cfg: DictConfig) -> None:
            try:
                job(cfg)
            except BaseException as error:
                caught.append(error)

        hydra_main = hydra.main(config_path=CONFIGS, config_name=entry, version_base="1.3")(inside_hydra)

        @functools.wraps(job)
        def wrapped() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"
            chosen = entry
            if (first := sys.argv[1:2]) and first[0] in also:
                chosen = first[0]
                sys.argv[1:2] = ["--config-name", chosen]
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            register(chosen)
            try:
                try:
                    hydra_main()
                except ValueError as error:  # `model=null`: Hydra raises its own mistakes as plain ValueErrors too
                    if "override" not in str(error):
                        raise
                    raise UserError(f"{error}. A group such as model= takes the name of a file in configs/.") from error
                if caught:
                    raise caught.pop()
            except (*USER_ERRORS, *HYDRA_ERRORS) as error:
                if debugging():
                    raise
                message = explain(error, chosen, sys.argv[1:]) if isinstance(error, HYDRA_ERRORS) else str(error)
                print(f"error: {message}", file=sys.stderr, flush=True)
                sys.exit(1)
            except KeyboardInterrupt as error:
                if debugging():
                    raise
                print(stopped(error), file=sys.stderr, flush=True)
                sys.exit(130)
            finally:
                faulthandler.cancel_dump_traceback_later()

        return wrapped

    return decorate


def forget_earlier_looks(folder: Path) -> None:
    """What doctor and preview refused when they last looked at the data, which may have been mended. A run's stays."""
    if not (folder / "metrics.jsonl").exists():
        Quarantine.start_anew(folder)


def debugging() -> bool:
    return os.environ.get("ERNIE_DEBUG", "0") not in ("", "0")


def stopped(error: KeyboardInterrupt) -> str:
    """What is said after Ctrl-C; whoever knows the way on has put it into the error (`going_on`)."""
    return " ".join(["stopped.", *map(str, error.args)])


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Ctrl-C while a run writes to `folder` tells how it goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        saved = checkpoint.complete(folder / "checkpoints")
        where = f"goes on from {saved[-1]}" if saved else "begins anew: nothing was saved yet"
        raise KeyboardInterrupt(f"The same command {where}. SIGTERM, instead of Ctrl-C, saves first.") from error


def described(error: BaseException) -> str:
    """What the user is told about an error that ends a run of several ranks."""
    if isinstance(error, KeyboardInterrupt) and not debugging():
        return stopped(error)
    return f"error: {error}" if isinstance(error, USER_ERRORS) and not debugging() else trace(error)


class StopSignal:
    """SIGTERM asks for an orderly end: finish the step, save, leave with exit code 0. A second one ends at once.

    What comes before a step and takes long (a rollout) asks too, and may be dropped: `loop.Interrupted`.

    Whoever sends it (a batch system, torchrun) kills soon after. So when `grace_s` seconds have passed the process ends
    by itself, with exit code 1 and the stack of every thread on stderr, which tells what it was waiting for. The last
    checkpoint is whole whatever it was doing. The watch is Python's own fault handler: a thread in C, that goes off
    even while a library holds the interpreter.
    """

    def __init__(self, at_end: ExitStack, *, grace_s: float):
        self.asked = False
        self.grace_s = grace_s
        previous = signal.signal(signal.SIGTERM, self._ask)
        at_end.callback(signal.signal, signal.SIGTERM, previous)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.dump_traceback_later(self.grace_s, exit=True, file=2)
        note = (
            f"SIGTERM: saving after this step; run.grace_s={self.grace_s:g} seconds from now the process ends anyway.\n"
        )
        os.write(2, note.encode())


# ------------------------------------------------------------------------------------------------------- the run folder


class Opened(NamedTuple):
    """A run folder, and the checkpoint to go on from."""

    folder: Path
    resume_from: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def open_folder(run: RunConfig, at_end: ExitStack, *, main: bool) -> Opened:
    """Claim the run folder and decide where to start.

    Args:
        at_end: gives the folder up again.
        main: this is rank 0, which alone writes.

    Raises:
        UserError: another process trains here; run.resume does not allow what is found; the folder cannot be written.
    """
    folder = Path(run.folder)
    if main:
        at_end.enter_context(_claim(folder))
    chosen = _starting_point(run, folder, main=main)
    if main:
        checkpoint.sweep(folder / "checkpoints")
    return Opened(folder, chosen)


def _starting_point(run: RunConfig, folder: Path, *, main: bool) -> Path | None:
    root = folder / "checkpoints"
    if run.resume == "auto":
        # Checkpoints appear whole, so one that isn't was damaged later: never go round it in silence.
        good, problems = checkpoint.newest_undamaged(root)
        if problems and good is None:
            path, problem = next(iter(problems.items()))
            raise UserError(
                f"{path} is damaged ({problem}), and run.folder={run.folder} has no whole checkpoint to go on from. "
                "Bring the file back, choose another run.folder, or delete the checkpoints folder to start this run "
                "anew."
            )
        if main and good is not None:
            for path, problem in problems.items():
                kept = checkpoint.set_aside(path).name
                logger.warning("%s is damaged (%s); going on from %s. Kept as %s.", path, problem, good.name, kept)
        return good
    own = checkpoint.complete(root)
    if run.resume == "never":
        if own or _holds_a_run(folder):
            what = f"the checkpoint {own[-1].name}" if own else "the metrics of an earlier run"
            raise UserError(
                f"run.folder={run.folder} already holds {what}, and run.resume is never. Choose another run.folder, or "
                "run.resume=auto to go on with that run."
            )
        return None
    chosen = _named(run)
    if own and own[-1].resolve() != chosen.resolve():
        raise UserError(
            f"run.folder={run.folder} has checkpoints of its own (newest: {own[-1].name}), which a start from "
            f"run.resume={run.resume} would overwrite. Choose another run.folder, or run.resume=auto."
        )
    return chosen


def _claim(folder: Path) -> TextIO:
    """Only one process at a time may write into a run folder. The kernel drops the lock when the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"run.folder={folder} cannot be written ({error.strerror}). Choose another run.folder."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"another process is training in run.folder={folder}. Choose another run.folder.") from error
    return lock


def _holds_a_run(folder: Path) -> bool:
    record = folder / "metrics.jsonl"
    return record.exists() and record.stat().st_size > 0


def _named(run: RunConfig) -> Path:
    """run.resume as a checkpoint folder, or a run folder whose newest checkpoint is meant."""
    path = Path(run.resume)
    found = [path] if (path / checkpoint.STATE).exists() else []
    for root in (path / "checkpoints", path):
        found = found or checkpoint.candidates(root)[-1:]
    if not found:
        raise UserError(
            f"run.resume={run.resume}: there is no checkpoint. Use auto, never, a run folder, or one of its "
            "checkpoints/step-... folders."
        )
    if problem := checkpoint.damage(found[0]):
        raise UserError(
            f"run.resume={run.resume}: {found[0]} is damaged ({problem}). Bring the file back, or name another "
            "step-... folder."
        )
    return found[0]


def check_same_maths(path: Path | None, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would change its numbers.

    Raises:
        UserError: names every setting that differs.
    """
    changed = differences(saved, now)
    if changed:
        meaning = {"rows_per_update": " (data.accumulation x processes)"}
        lines = "\n".join(
            f"  {key}{meaning.get(key, '')}: {old!r} then, {new!r} now" for key, (old, new) in changed.items()
        )
        way_out = "Restore them, or start anew in another run.folder"
        if path is not None and "run.steps" in changed:
            exported = path.parent.parent / "export"
            way_out += f"; model.checkpoint={exported} model.processor=null there goes on from its weights"
        raise UserError(
            f"cannot resume from {path}: these settings differ from the run that wrote it and would change "
            f"its numbers\n{lines}\n{way_out}."
        )


def check_not_past(steps: int, done: int, path: Path) -> None:
    """With a constant learning rate run.steps may change; the run cannot end before where it is.

    Raises:
        UserError: the checkpoint is beyond the end.
    """
    if done > steps:
        raise UserError(
            f"run.steps={steps}, but {path} is already at step {done}. Raise run.steps, or choose another run.folder."
        )


def start_trackers(
    config: TrainingConfig, run: Opened, saved: dict[str, Any] | None, at_end: ExitStack
) -> list[Tracker]:
    """The chosen trackers, going on with the run they recorded when this start goes on in its own folder.

    trackers.json holds the mark of each one's beginning: an attempt that died before its first checkpoint has begun
    that run already.
    """
    record = run.folder / "trackers.json"
    try:
        beginnings: dict[str, Mark] = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise UserError(f"{record} is damaged ({error}). Bring it back, or choose another run.folder.") from error
    continues = run.resume_from is not None and run.resume_from.parent.resolve() == run.checkpoints.resolve()
    marks = beginnings | (saved["trackers"] if saved is not None and continues else {})
    trackers = make_trackers(config.tracker.names, config.tracker.project)
    for tracker in trackers:
        tracker.start(config.run.name, plain(config), run.folder, marks.get(tracker.name))
        at_end.callback(tracker.finish)
        beginnings.setdefault(tracker.name, tracker.mark())
    atomic_write(record, json.dumps(beginnings, indent=1))
    return trackers


def check_same_start(accelerator: Accelerator, run: Opened) -> None:
    """Every rank chose where to start from what it sees itself.

    Raises:
        UserError: they chose differently, on all ranks.
    """
    chosen = gather_object([None if run.resume_from is None else run.resume_from.name])
    if len(set(chosen)) > 1:
        raise UserError(
            f"run.folder={run.folder}: the ranks would start from different checkpoints: "
            f"{', '.join(map(str, chosen))}. Is it on a disk that all machines share?"
        )


def export(
    folder: Path,
    config: ErnieConfig,
    values: Values,
    processor: Processor,
    check: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Weights, configuration and tokenizer: a folder that transformers and vLLM load. All ranks write it together.

    Args:
        check: looks at what was written, on every rank, before it appears.
    """
    (rank, world), needed = checkpoint.here(), values.num_bytes
    with checkpoint.shared_folder(folder, needed) as temporary:

        def write() -> None:
            write_tensors(config, values.tensors, temporary, read=values.read, writer=Shard(rank, world))
            if rank == 0:
                processor.save(temporary)

        checkpoint.all_or_none(folder, needed, write)
        checkpoint.all_or_none(folder, needed, lambda: check(temporary))


def write_start(folder: Path, config: dict[str, Any], resumed_from: Path | None) -> None:
    """config.yaml, and one more entry in run.json."""
    atomic_write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    record = folder / "run.json"
    try:
        starts = json.loads(record.read_text())["starts"] if record.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} is damaged ({error}). Mend it, or move it away; training does not need it."
        ) from error
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command(),
            "working_directory": os.getcwd(),
            "resumed_from": None if resumed_from is None else str(resumed_from),
            "versions": versions(),
            "git": git_state(),
        }
    )
    atomic_write(record, json.dumps({"starts": starts}, indent=2) + "\n")


def command() -> str:
    """What to type to repeat this start, as a shell reads it."""
    words = list(sys.orig_argv)
    if len(words) > 1 and Path(words[1]).name == "ernie":  # python .../bin/ernie sft ...: the console script
        words = ["ernie", *words[2:]]
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        machines = world // int(os.environ.get("LOCAL_WORLD_SIZE", world))
        # Without --multi_gpu accelerate starts one process where there is no GPU.
        launcher = ["accelerate", "launch", "--multi_gpu", f"--num_processes={world}", f"--num_machines={machines}"]
        if machines > 1:  # on the machine of rank 0
            ip, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            launcher += [f"--main_process_ip={ip}", f"--main_process_port={port}", "--machine_rank=0"]
        words = [*launcher, "-m", f"train.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return shlex.join(words)


def versions() -> dict[str, str]:
    out = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source folder that was never installed
            continue
    return out


def git_state() -> dict[str, Any] | None:
    """Commit of the source this runs from, and whether it was edited; None outside a repository."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "edited": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
