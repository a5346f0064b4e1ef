"""Training state on disk: what a run needs to go on as if it had never stopped.

    RUN_FOLDER/checkpoints/
      step-000100/
        model.safetensors         float32 master weights, our names
        optimizer.safetensors     PARAMETER/exp_avg, PARAMETER/exp_avg_sq, PARAMETER/step
        random.safetensors        generators of every rank
        state.json                everything else, and size and checksum of every file, its own included; written last
      step-000200/
      step-000300.damaged/        found damaged by a later start, and set aside

This is for resuming only. Weights for others (transformers, vLLM) are another kind of folder: `ernie_model.checkpoint`.

A checkpoint is written under another name, synced to the disk, and appears by one rename. `fault` compares the sizes,
which is quick enough to do often; `damage` also reads every byte and compares checksums, once, before a checkpoint is
loaded.
"""

import errno
import json
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model.atomic import atomic_folder, atomic_write
from train.config import UserError

FORMAT = 2
MODEL, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
FOLDER_NAME = re.compile(r"step-(\d{6,})")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
CHECKSUM = "xxh3_128"  # finds damage at the speed of the memory; it isn't meant against forgery
BLOCK = 2**24


class Stateful(Protocol):
    """The weights of a run: a module, or the adapters of one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any: ...


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that can be resumed from, oldest first."""
    return [path for path in candidates(root) if is_complete(path)]


def candidates(root: Path) -> list[Path]:
    """Everything that has the name of a checkpoint, whole or not, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := FOLDER_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_complete(path: Path) -> bool:
    return fault(path) is None


def fault(path: Path) -> str | None:
    """Which file of a checkpoint is missing or cut off, or that state.json is damaged; None when it looks whole.

    Reads no file but state.json.
    """
    try:
        files = _read_sealed(path)["files"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{STATE} cannot be read: {error}"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != expected["bytes"]:
            return f"{name} has {found:,} bytes, not {expected['bytes']:,}"
    return None


def damage(path: Path) -> str | None:
    """As `fault`, and reads every file to compare its checksum."""
    if problem := fault(path):
        return problem
    for name, expected in _read_sealed(path)["files"].items():
        try:
            found = checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != expected[CHECKSUM]:
            return f"{name} does not have the checksum it was written with"
    return None


def newest_undamaged(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole to the last bit, and what is wrong with those that are newer."""
    problems: dict[Path, str] = {}
    for path in reversed(candidates(root)):
        problem = damage(path)
        if problem is None:
            return path, problems
        problems[path] = problem
    return None, problems


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint's name away, so that it counts as none and its step can be saved again."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sealed(state: dict[str, Any]) -> str:
    """state.json: the checksum of the rest comes first."""
    return json.dumps({CHECKSUM: _seal(state), **state}, indent=1)


def _seal(state: dict[str, Any]) -> str:
    # Over the values and not over the text, so that a file that was only formatted anew is not damaged.
    return xxhash.xxh3_128_hexdigest(json.dumps(state).encode())


def _read_sealed(path: Path) -> dict[str, Any]:
    """state.json without its checksum.

    Raises:
        OSError, ValueError, KeyError, AttributeError: it is damaged.
        UserError: it is whole, and of another version.
    """
    state = json.loads((path / STATE).read_bytes())
    seal = state.pop(CHECKSUM, None)
    whole = seal == _seal(state) or (seal is None and state["format"] == 1)  # format 1 had no checksums
    if not whole:
        raise ValueError("it does not have the checksum it was written with")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}.")
    return state


class Saved(NamedTuple):
    path: Path
    num_bytes: int
    seconds: float


def save(
    root: Path,
    step: int,
    *,
    model: Stateful,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Saved:
    """Write the checkpoint of `step`, then delete all but the newest `keep`.

    Args:
        generators: `generator_state()` of every rank, in order.
        state: anything JSON can hold.

    Raises:
        UserError: the disk is full. Nothing was changed; earlier checkpoints are as they were.
    """
    begin = time.perf_counter()
    path = folder_of(root, step)
    tensors = {
        MODEL: {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        OPTIMIZER: optimizer_tensors(optimizer),
        RANDOM: {f"{rank}/{name}": value for rank, values in enumerate(generators) for name, value in values.items()},
    }
    needed = sum(value.nbytes for values in tensors.values() for value in values.values())
    with room_for(path, needed), atomic_folder(path, overwrite=True) as folder:
        for file, values in tensors.items():
            save_file(values, folder / file)
        files = {file: {"bytes": (folder / file).stat().st_size, CHECKSUM: checksum(folder / file)} for file in tensors}
        atomic_write(folder / STATE, _sealed({"format": FORMAT, "step": step, "files": files, **state}))
    for old in complete(root)[:-keep]:
        delete(old)
    return Saved(path, sum(file["bytes"] for file in files.values()), time.perf_counter() - begin)


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, or another refusal of the system, into an error that says what was being written where.

    Looks for room before anything is written.
    """
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(_disk_full(path, needed, free))
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors' writer is Rust and wraps the system's error in its own type.
        full = getattr(error, "errno", None) in FULL_DISK or "StorageFull" in str(error) or "os error 28" in str(error)
        if not full:
            if isinstance(error, SafetensorError) and "os error" not in str(error):
                raise
            raise UserError(
                f"{path} cannot be written ({error}). Nothing was changed: earlier checkpoints are whole. Put that "
                "right, and the same command goes on from the newest one."
            ) from error
        raise UserError(_disk_full(path, needed, shutil.disk_usage(existing).free)) from error


def _disk_full(path: Path, needed: int, free: int) -> str:
    return (
        f"the disk is full: {path} needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free. Nothing was changed: "
        "earlier checkpoints are whole. Free some space (run.keep says how many checkpoints stay) and start the same "
        "command again; it resumes from the newest one."
    )


def delete(path: Path) -> None:
    """Remove a checkpoint. It loses its name first: a kill on the way leaves nothing that looks like a checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (".step-*.partial", ".step-*.previous", ".step-*.deleted"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UserError: this is no complete checkpoint, or one of another version.
    """
    if problem := fault(path):
        raise UserError(f"{path} is not a complete checkpoint ({problem}). Choose another step-... folder.")
    return _read_sealed(path)


def load(path: Path, *, model: Stateful, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer state back.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    with _readable(path):
        weights, moments = (load_file(path / file) for file in (MODEL, OPTIMIZER))
        model.load_state_dict(weights)
    load_optimizer_tensors(optimizer, moments)


def load_generators(path: Path, *, rank: int) -> None:
    """Put this rank's random generators back. Do it last: whatever else starts may draw from them."""
    with _readable(path):
        generators = load_file(path / RANDOM)
    ranks = 1 + max(int(name.partition("/")[0]) for name in generators)
    prefix = f"{rank % ranks}/"
    set_generator_state(
        {name.removeprefix(prefix): value for name, value in generators.items() if name.startswith(prefix)}
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be loaded: {error}. If the file is damaged, delete this folder: the same command then goes "
            "on from the checkpoint before it."
        ) from error


# ------------------------------------------------------------------------------------------------------- optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state tensor by the name of its parameter. Parameters that never had a gradient have none.

    Needs the names that `train.optim.parameter_groups` puts beside the parameters.
    """
    out = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    names = [name for group in optimizer.param_groups for name in group["names"]]
    number = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in number:
            raise UserError(f"the checkpoint's optimizer knows a parameter {name} that this model does not train.")
        state.setdefault(number[name], {})[kind] = value
    # load_state_dict moves every tensor to its parameter's device.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -------------------------------------------------------------------------------------------------- random generators


def generator_state() -> dict[str, Tensor]:
    """PyTorch's, Python's and NumPy's global generators of this process."""
    python = random.getstate()
    numpy = np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple)
    out = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(numpy[1]).astype(np.int64)),
        "numpy_rest": torch.tensor([numpy[2], numpy[3], numpy[4]], dtype=torch.float64),
    }
    if python[2] is not None:
        out["python_gauss"] = torch.tensor(python[2], dtype=torch.float64)
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def seed_generators(seed: int, *, rank: int) -> None:
    """Start the global generators of a new run, differently on every rank."""
    torch.manual_seed((seed + rank) % 2**64)
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)  # all that NumPy's old generator takes


def set_generator_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item() if "python_gauss" in state else None
    random.setstate((3, tuple(state["python"].tolist()), gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
