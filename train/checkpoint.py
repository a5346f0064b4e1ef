"""Training state on disk: what a run needs to go on as if it had never stopped.

    RUN_FOLDER/checkpoints/
      step-000100/
        model.safetensors         float32 master weights, our names
        optimizer.safetensors     PARAMETER/exp_avg, PARAMETER/exp_avg_sq, PARAMETER/step
        random.safetensors        generators of every rank
        state.json                everything else, and the size of the three files; written last
      step-000200/

This is for resuming only. Weights for others (transformers, vLLM) are another kind of folder: `ernie_model.checkpoint`.

A checkpoint is written under another name, synced to the disk, and appears by one rename. `complete` also checks that
every file has the size it should have, so a folder that was copied halfway is not picked up either.
"""

import errno
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ernie_model.atomic import atomic_folder, atomic_write
from train.config import UserError

FORMAT = 1
MODEL, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
FOLDER_NAME = re.compile(r"step-(\d{6,})")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that can be resumed from, oldest first."""
    return [path for path in _all(root) if is_complete(path)]


def damaged(root: Path) -> list[Path]:
    """Those that cannot, oldest first."""
    return [path for path in _all(root) if not is_complete(path)]


def _all(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := FOLDER_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_complete(path: Path) -> bool:
    return fault(path) is None


def fault(path: Path) -> str | None:
    """Which file of a checkpoint is missing or has the wrong size; None when it is whole."""
    try:
        files = json.loads((path / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE} cannot be read: {error}"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes, not {size:,}"
    return None


def save(
    root: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`.

    Args:
        generators: `generator_state()` of every rank, in order.
        state: anything JSON can hold.

    Raises:
        UserError: the disk is full. Nothing was changed; earlier checkpoints are as they were.
    """
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
        sizes = {file: (folder / file).stat().st_size for file in tensors}
        atomic_write(folder / STATE, json.dumps({"format": FORMAT, "step": step, "files": sizes, **state}, indent=1))
    for old in complete(root)[:-keep]:
        delete(old)
    return path


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
    if not is_complete(path):
        raise UserError(
            f"{path} is not a complete checkpoint: it needs {STATE} and the files named there, in full size. Choose "
            "another step-... folder."
        )
    state = json.loads((path / STATE).read_text())
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}.")
    return state


def load(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Put weights, optimizer state and this rank's random generators back.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    try:
        weights, moments, generators = (load_file(path / file) for file in (MODEL, OPTIMIZER, RANDOM))
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be loaded: {error}. If the file is damaged, delete this folder: the same command then goes "
            "on from the checkpoint before it."
        ) from error
    load_optimizer_tensors(optimizer, moments)
    ranks = 1 + max(int(name.partition("/")[0]) for name in generators)
    prefix = f"{rank % ranks}/"
    set_generator_state(
        {name.removeprefix(prefix): value for name, value in generators.items() if name.startswith(prefix)}
    )


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


def set_generator_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item() if "python_gauss" in state else None
    random.setstate((3, tuple(state["python"].tolist()), gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
