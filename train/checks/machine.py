"""This machine: versions against the bounds they were tested with, devices, threads, memory, disk."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

from train.build import human
from train.checks.findings import Finding, ok, problem, warning
from train.config import ParallelConfig

PROJECT = "ernie-train"


def check_machine(config: ParallelConfig, run_folder: Path) -> list[Finding]:
    return [*check_versions(), check_device(config), *check_threads(config), check_folder(run_folder)]


def check_versions(requirements: Sequence[str] | None = None) -> list[Finding]:
    """Every dependency that is always needed, against pyproject.toml's bounds."""
    here = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    if requirements is None:
        try:
            requirements = importlib.metadata.requires(PROJECT) or []
        except importlib.metadata.PackageNotFoundError:
            return [ok(here), warning(f"{PROJECT} is not installed as a package, so versions were not compared.")]
    wrong = []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(
                problem(
                    f"{requirement.name} is {version or 'not installed'}; {PROJECT} needs {requirement.specifier}. "
                    f"Install it: pip install '{requirement.name}{requirement.specifier}' -c constraints.txt"
                )
            )
    return [ok(here), *(wrong or [ok("all packages are within their bounds")])]


def check_device(config: ParallelConfig) -> Finding:
    if config.cpu:
        return ok("trains on the CPU (parallel.cpu=true)")
    if not torch.cuda.is_available():
        return ok("trains on the CPU; there is no GPU here")
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ok(", ".join(f"{one.name} with {human(one.total_memory, 'B')}" for one in names))


def check_threads(config: ParallelConfig) -> list[Finding]:
    cores = available_cores()
    threads = config.threads or torch.get_num_threads()
    if threads > cores:
        way_out = "Lower parallel.threads" if config.threads else "Set parallel.threads"
        return [warning(f"{threads} threads on {cores} cores: they would wait for each other. {way_out}.")]
    return [ok(f"{threads} thread{'s' * (threads > 1)} of {cores} cores")]


def available_cores() -> int:
    """What this process may use, which is less than the machine has inside many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_folder(folder: Path) -> Finding:
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return problem(f"run.folder={folder} cannot be written: {existing} refuses. Choose another run.folder.")
    return ok(f"{folder} can be written; {human(free_disk(folder), 'B')} are free there")


def existing_parent(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(existing_parent(folder)).free


def available_memory(device: torch.device) -> int | None:
    """Bytes that a training process could use; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    try:
        most, used = (Path(path).read_text().strip() for path in limits)
        return min(free, int(most) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
