"""What launch/README.md says is true: its commands are understood by accelerate, and run, here with the small model.

GPUs become two processes on the CPU, the 28B model the tiny one, and the data the digits. SLURM's `srun` and `scontrol`
are stand-ins that do what the script relies on: number the processes, pass signals on, queue again.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
from torch.distributed.run import config_from_args, get_args_parser

from tests.distributed.gloo import ROOT, environments
from train import checkpoint
from train.config import ParallelConfig, UserError
from train.parallel.layout import check_launcher

README = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("accelerate")
]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
SMALL = [
    *("model=tiny_vl", "data=digits", "tracker=none", "optim.warmup_steps=1", "data.max_tokens=128", "data.workers=0"),
    *("evaluate.every=0", "evaluate.max_examples=2", "evaluate.sheet=0", "parallel.cpu=true", "parallel.processes=2"),
]
WAIT_S = 240


def given(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def name_of(words: list[str]) -> str:
    gpus = given(words, "--num_processes") if "--num_processes" in words else "all"
    return " ".join(
        [Path(given(words, "--config_file")).stem, gpus, *(w for w in words if w.startswith(("exp", "par")))]
    )


# ------------------------------------------------------------------------------------------------ read by accelerate


@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_accelerate_understands_it(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert args.training_script == "train.sft" and args.module
    # Precision and DeepSpeed are the run's own affair.
    assert args.mixed_precision == "no" and not args.use_deepspeed and not defaults.deepspeed_config
    if not args.multi_gpu:
        assert args.num_processes == 1
        return
    args.main_process_port = args.main_process_port or 0  # whatever port is free
    prepare_multi_gpu_env(args)
    rest = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    config, _, arguments = config_from_args(_filter_args(args, get_args_parser(), rest))
    assert config.nproc_per_node * config.max_nodes == args.num_processes
    assert config.nproc_per_node <= 8 and arguments[-len(args.training_script_args) :] == args.training_script_args
    if config.max_nodes > 1:
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "node-0:29500")


def test_the_numbers_of_gpus_that_are_promised_are_there():
    counts = [given(words, "--num_processes") if "--num_processes" in words else None for words in COMMANDS]
    lora, full = (
        [n for n, words in zip(counts, COMMANDS, strict=True) if f"experiment={e}_vl_28b" in words]
        for e in ("lora", "full")
    )
    assert lora == [None, "4", "8"] and full == ["8", None]  # None: as the file has it, 1 and 16


# ------------------------------------------------------------------------------------------------------------- run


class Launched:
    """A launcher as a process, with what it and its ranks say."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str] | None = None):
        self.said = folder / f"said-{len(list(folder.glob('said-*')))}.txt"
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=clean | (environment or {}), stdout=output, stderr=subprocess.STDOUT
            )

    def wait_until(self, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not happened():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.01)

    def rank(self, number: int) -> psutil.Process:
        def is_it(process: psutil.Process) -> bool:
            return "train.sft" in process.cmdline() and process.environ().get("RANK") == str(number)

        (found,) = filter(is_it, psutil.Process(self.process.pid).children(recursive=True))
        return found

    def end(self) -> str:
        code = self.process.wait(WAIT_S)
        assert code == 0, self.said.read_text()
        return self.said.read_text()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
        self.process.wait()


def on_two_cpus(words: list[str]) -> list[list[str]]:
    """The command with the small model, as it is typed on each machine."""
    at = words.index("-m")
    launcher, run = words[:at], [word for word in words[at:] if not word.startswith("data.path=")]
    run += [word for word in SMALL if word.partition("=")[0] not in ("parallel.processes",)]
    run += ["parallel.offload_optimizer=false"]  # or DeepSpeed would compile its own Adam
    if re.search(r"parallel=ep", " ".join(run)):
        run += ["parallel.expert=2"]
    if "one_process" in " ".join(launcher):
        return [launcher + run]
    if "--machine_rank" in launcher:
        (port,) = {environment["MASTER_PORT"] for environment in environments(2)[:1]}
        here = launcher + ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        return [[*here, "--machine_rank", rank, *run] for rank in ("0", "1")]
    return [[*launcher, "--num_processes", "2", "--main_process_port", "0", *run]]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_it_runs_on_two_processes_with_the_tiny_model(words, tmp_path):
    folder = tmp_path / "run"
    rest = ["run.steps=2", "run.epochs=1", f"run.folder={folder}"]
    machines = [Launched([*command, *rest], tmp_path) for command in on_two_cpus(words)]
    for machine in machines:
        with machine:
            machine.end()
    ranks = 1 if "one_process" in " ".join(words) else 2
    assert len(list((folder / "data").glob("rank-*.jsonl"))) == ranks
    assert [line["step"] for line in losses(folder)] == [1, 2]
    assert any((folder / name).is_dir() for name in ("export", "adapter"))


def losses(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], "loss": line["loss"]} for line in lines if "loss" in line]


def settings(folder: Path) -> list[str]:
    # Learning digits, as the demo does, for as long as it takes to be interrupted.
    return ["experiment=digits", *SMALL, "run.steps=60", "run.save_every=5", f"run.folder={folder}"]


def accelerate(*options: str) -> list[str]:
    launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    return [*launcher, *options, "-m", "train.sft"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("uninterrupted")
    with Launched([*accelerate(), *settings(folder / "run")], folder) as run:
        run.end()
    return losses(folder / "run")


def has_saved(folder: Path) -> bool:
    return bool(checkpoint.candidates(folder / "checkpoints"))


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    with Launched([*accelerate("--max_restarts=1"), *settings(folder)], tmp_path) as run:
        run.wait_until(lambda: has_saved(folder))
        run.rank(1).kill()
        said = run.end()
    assert "resuming from" in said
    assert losses(folder) == uninterrupted
    first, second = json.loads((folder / "run.json").read_text())["starts"]
    assert first["resumed_from"] is None and second["resumed_from"] is not None


SRUN = """#!{python}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--")]
ranks = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(ranks)
]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$*" >> "$QUEUE"; fi
"""


def test_a_slurm_job_saves_before_its_time_is_up_queues_again_and_goes_on(tmp_path, uninterrupted):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    folder, queue = tmp_path / "run", tmp_path / "queue"
    port = int(environments(1)[0]["MASTER_PORT"])
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "QUEUE": str(queue),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_ID": str(port % 10000),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    command = ["bash", str(SCRIPT), *settings(folder)]
    with Launched(command, tmp_path, environment) as job:
        job.wait_until(lambda: has_saved(folder))
        job.process.send_signal(signal.SIGUSR1)
        said = job.end()
    assert said.count("SIGTERM: saving") == 2 and "queues again" in said
    assert queue.read_text() == f"requeue {port % 10000}\n"
    assert 0 < len(losses(folder)) < len(uninterrupted)
    with Launched(command, tmp_path, environment) as job:
        said = job.end()
    assert "resuming from" in said and queue.read_text().count("requeue") == 1
    assert losses(folder) == uninterrupted


def test_what_the_slurm_script_asks_for_fits_together():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT.read_text(), re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one process per GPU
    lead = int(asked["signal"].removeprefix("B:USR1@"))
    (grace,) = re.findall(r"run\.grace_s=(\d+)", SCRIPT.read_text().partition("srun")[2])
    assert int(grace) < lead
    subprocess.run(["bash", "-n", SCRIPT], check=True)


# ------------------------------------------------------------------------------------- one process instead of several


def test_accelerates_other_launcher_starts_one_process_and_the_program_says_so(tmp_path):
    words = ["accelerate", "launch", "--cpu", "--num_processes=2", "-m", "train.sft", "experiment=digits"]
    with Launched([*words, *SMALL[:-1], f"run.folder={tmp_path / 'run'}"], tmp_path) as run:
        assert run.process.wait(WAIT_S) == 1
    said = run.said.read_text()
    assert "error: accelerate launch was asked for several processes and started one" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_CPU": "True"},  # one was asked for
        {"MASTER_PORT": "29500"},  # no accelerate
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "WORLD_SIZE": "2"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "OMPI_COMM_WORLD_SIZE": "2"},  # --mpirun_hostfile
    ],
)
def test_other_starts_are_let_be(environment):
    check_launcher(ParallelConfig(), environment)


def test_one_process_can_be_meant():
    environment = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    check_launcher(ParallelConfig(processes=1), environment)
    with pytest.raises(UserError, match="parallel.processes=1"):
        check_launcher(ParallelConfig(), environment)
