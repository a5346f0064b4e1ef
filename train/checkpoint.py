"""Training state on disk: what a run needs to go on as if it had never stopped, on as many processes as there are.

    RUN_FOLDER/checkpoints/
      step-000100/
        shard-00000.safetensors   pieces of NAME/weight, NAME/exp_avg, NAME/exp_avg_sq, NAME/step: those of rank 0
        shard-00001.safetensors   rank 1's, and so on; together every element once (train/parallel/fragments.py)
        algorithm-00000.safetensors   what the algorithm of rank 0 keeps beside its weights, if anything
        random.safetensors        generators of every rank
        state.json                everything else: shapes of the whole tensors, size and checksum of every file, its own
                                  included; written last
      step-000200/
      step-000300.damaged/        found damaged by a later start, and set aside

This is for resuming only. Weights for others (transformers, vLLM) are another kind of folder: `ernie_model.checkpoint`.

A checkpoint is written under another name, synced to the disk, and appears by one rename. `fault` compares the sizes,
which is quick enough to do often; `damage` also reads every byte and compares checksums, once, before a checkpoint is
loaded. All ranks save, look for and load a checkpoint together, on a disk that all of them see: what one of them cannot
do, none does.
"""

import errno
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model.atomic import atomic_folder, atomic_write
from train.config import UserError
from train.parallel.fragments import bit_sums, pieces_to_write, restore, whole_shape
from train.pieces import PieceError, Pieces, write_pieces

FORMAT = 3
RANDOM, STATE = "random.safetensors", "state.json"
FOLDER_NAME = re.compile(r"step-(\d{6,})")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
CHECKSUM = "xxh3_128"  # finds damage at the speed of the memory; it isn't meant against forgery
BLOCK = 2**24

T = TypeVar("T")


class Resumable(Protocol):
    """The weights of a run: all of a model's, or adapters beside frozen ones."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers that a checkpoint holds, by name: the model's own, not copies."""
        ...

    def rests_on(self) -> str | None:
        """What they are worthless without: a fingerprint of frozen weights that the checkpoint does not hold."""
        ...


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def file_name(rank: int) -> str:
    return f"algorithm-{rank:05d}.safetensors"


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
    return fault(path) or _damaged_file(path, sorted(_read_sealed(path)["files"]))


def _damaged_file(path: Path, names: list[str]) -> str | None:
    files = _read_sealed(path)["files"]
    for name in names:
        try:
            found = checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != files[name][CHECKSUM]:
            return f"{name} does not have the checksum it was written with"
    return None


def newest_undamaged(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole to the last bit, and what is wrong with those that are newer.

    All ranks ask together, and each reads some of the files.

    Raises:
        UserError: they do not see the same disk.
    """
    found = candidates(root)
    if any(names != found for names in everyones(found)):
        raise UserError(
            f"{root} does not look alike to all ranks: {_counts(everyones(len(found)))} checkpoints. run.folder must "
            "be on a disk that all machines share."
        )
    problems: dict[Path, str] = {}
    for path in reversed(found):
        faults = everyones(fault(path))
        if not any(faults):
            rank, world = here()
            faults = everyones(_damaged_file(path, sorted(_read_sealed(path)["files"])[rank::world]))
        problem = next((text for text in faults if text), None)
        if problem is None:
            return path, problems
        problems[path] = problem
    return None, problems


def _counts(numbers: list[int]) -> str:
    return ", ".join(f"rank {rank} sees {number}" for rank, number in enumerate(numbers))


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
        raise UserError(
            f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}. Finish that run with the "
            "version that began it, or start anew in another run.folder."
        )
    return state


class Saved(NamedTuple):
    path: Path
    num_bytes: int
    seconds: float


def save(
    root: Path,
    step: int,
    *,
    weights: Resumable,
    optimizer: Any,
    state: dict[str, Any],
    keep: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. All ranks call it.

    Args:
        optimizer: PyTorch's, or that of DeepSpeed's engine.
        state: anything JSON can hold; rank 0's is written.
        tensors: of this rank, beside the weights: `load_files` gives those of all ranks back.

    Raises:
        UserError: the disk is full, or a rank cannot write. Nothing was changed; earlier checkpoints are as they were.
    """
    begin = time.perf_counter()
    (rank, world), path, trained = here(), folder_of(root, step), weights.tensors()
    pieces, base = list(pieces_to_write(trained, optimizer, rank=rank, world=world)), weights.rests_on()
    generators = {
        f"{one}/{name}": value
        for one, values in enumerate(everyones(generator_state()))
        for name, value in values.items()
    }
    own = {name: tensor.cpu().contiguous() for name, tensor in (tensors or {}).items()}
    needed = sum(everyones(sum(piece.value.nbytes for piece in pieces) + sum(x.nbytes for x in own.values())))
    with shared_folder(path, needed) as folder:

        def write_shard() -> dict[str, dict[str, Any]]:
            written = write_pieces(folder / shard_name(rank), pieces)
            files = {shard_name(rank): {"bytes": written.num_bytes, CHECKSUM: written.checksum}}
            if own:
                save_file(own, file := folder / file_name(rank))
                files[file.name] = {"bytes": file.stat().st_size, CHECKSUM: checksum(file)}
            return files

        def seal() -> int:
            if rank:
                return 0
            save_file(generators, folder / RANDOM)
            files = {name: file for of_rank in shards for name, file in of_rank.items()}
            files[RANDOM] = {"bytes": (folder / RANDOM).stat().st_size, CHECKSUM: checksum(folder / RANDOM)}
            shapes = {name: whole_shape(tensor) for name, tensor in trained.items()}
            about = {"format": FORMAT, "step": step, "files": files, "shapes": shapes, "rests_on": base}
            atomic_write(folder / STATE, _sealed(about | state))
            return sum(file["bytes"] for file in files.values())

        shards = all_or_none(path, needed, write_shard)
        num_bytes = all_or_none(path, needed, seal)[0]
    if rank == 0:
        for old in complete(root)[:-keep]:
            delete(old)
    return Saved(path, num_bytes, time.perf_counter() - begin)


@contextmanager
def shared_folder(path: Path, needed: int) -> Iterator[Path]:
    """`atomic_folder` for all ranks: each writes files of its own into the one that it yields. Replaces what is there.

    Args:
        needed: bytes there must be room for.

    Raises:
        UserError: the disk is full, or a rank does not see the folder. Nothing was changed.
    """
    rank, _ = here()
    with ExitStack() as at_end:  # an error takes the half-written folder away

        def open_folder() -> Path:
            if rank:
                return path  # rank 0's is used
            check_room(path, needed)
            return at_end.enter_context(atomic_folder(path, overwrite=True))

        def see() -> None:
            if not folder.is_dir():
                raise UserError(
                    f"rank {rank} does not see {folder}, which rank 0 has just made. run.folder must be on a disk that "
                    "all machines share."
                )

        folder = all_or_none(path, needed, open_folder)[0]
        all_or_none(path, needed, see)
        yield folder
        all_or_none(path, needed, at_end.close)  # syncs and renames


def all_or_none(path: Path, needed: int, act: Callable[[], T]) -> list[T]:
    """What `act` returns on every rank. What fails on one fails on all, with the same words."""
    result: list[T] = []
    failure = None
    try:
        with _told(path, needed):
            result = [act()]
    except Exception as error:
        failure = error
    outcomes = everyones((result, None if failure is None else _described(failure, path)))
    for problem in (problem for _, problem in outcomes if problem is not None):
        if failure is not None and (problem == _described(failure, path) or not isinstance(failure, UserError)):
            raise failure
        raise UserError(problem) from failure
    return [one for result, _ in outcomes for one in result]


def _described(failure: Exception, path: Path) -> str:
    if isinstance(failure, UserError):
        return str(failure)
    return f"{path}: rank {here()[0]} failed. {type(failure).__name__}: {failure}"


def here() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def everyones(value: T) -> list[T]:
    """`value` of every rank, in order."""
    _, world = here()
    if world == 1:
        return [value]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered


def check_room(path: Path, needed: int) -> None:
    if (free := _free(path)) < needed:
        raise UserError(_disk_full(path, needed, free))


def _free(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


@contextmanager
def _told(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, or another refusal of the system, into an error that says what was being written where."""
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
        raise UserError(_disk_full(path, needed, _free(path))) from error


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


def load(path: Path, *, weights: Resumable, optimizer: Any) -> None:
    """Put weights and optimizer state back, whatever layout wrote them. All ranks call it, after the engine is made.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    saved, tensors, (rank, world) = read_state(path), weights.tensors(), here()
    shapes = {name: whole_shape(tensor) for name, tensor in tensors.items()}
    if differing := sorted(name for name in shapes | saved["shapes"] if shapes.get(name) != saved["shapes"].get(name)):
        there, mine = (found.get(name := differing[0], "nothing") for found in (saved["shapes"], shapes))
        raise UserError(
            f"{path} belongs to another model: {len(differing)} tensors differ. It has {name} of shape {there}, and "
            f"this model {mine}. Restore model.* and peft.*, or choose another run.folder."
        )
    if weights.rests_on() != saved["rests_on"]:
        raise UserError(
            "the frozen weights under this adapter are not those it was trained on: model.checkpoint (or model.config "
            "and run.seed), or a folder of peft.frozen, has other contents now. Bring them back, or choose another "
            "run.folder and start there with peft.init_from=."
        )
    with _readable(path):
        restore(pieces_of(path), tensors, optimizer, rank=rank, world=world)


def load_files(path: Path) -> list[dict[str, Tensor]]:
    """The `tensors` of every rank that wrote this checkpoint; empty where there were none.

    Raises:
        UserError: a file cannot be read.
    """
    with _readable(path):
        return [
            load_file(path / name)
            for name in sorted(read_state(path)["files"])
            if re.fullmatch(r"algorithm-\d{5,}\.safetensors", name)
        ]


def pieces_of(path: Path) -> Pieces:
    """The tensors of a checkpoint, read by range: NAME/weight and AdamW's state of it.

    Raises:
        PieceError, OSError: a file cannot be read.
    """
    return Pieces(path / name for name in read_state(path)["files"] if name.startswith("shard-"))


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
    except (OSError, SafetensorError, PieceError) as error:
        raise UserError(
            f"{path} cannot be loaded: {error}. If the file is damaged, delete this folder: the same command then goes "
            "on from the checkpoint before it."
        ) from error


def fingerprint(tensors: Mapping[str, Tensor], optimizer: Any = None) -> str:
    """A number that changes when a value does, and not with the layout. All ranks call it; each reads its share.

    Args:
        optimizer: where some of them train: PyTorch's, or the one of DeepSpeed's engine.
    """
    rank, world = here()
    mine = {name: bit_sums(tensor, optimizer, rank=rank, world=world) for name, tensor in tensors.items()}
    ranks, digest = everyones(mine), xxhash.xxh3_128()
    for name in sorted(tensors):
        sums = [sum(numbers) % 2**64 for numbers in zip(*(found[name] for found in ranks), strict=True)]
        digest.update(f"{name} {whole_shape(tensors[name])} {sums}".encode())
    return digest.hexdigest()


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
