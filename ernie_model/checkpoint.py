"""Read and write Hugging Face checkpoints, one shard at a time.

    load   headers of all shards -> all names and shapes checked -> module after module allocated and filled
    save   names and sizes planned -> shard after shard assembled and written -> index, config.json -> one rename

Nothing is allocated before the plan is known to be complete, so a wrong folder fails in seconds and names everything
that is wrong with it. Peak memory is the model plus one shard, also when the dtype changes: the stacked expert tensors
are allocated at their final place, and each stored expert is copied into its slice. A rank that holds some of the
experts allocates and reads no others, and one that keeps a part of every weight (`ready`) never has two modules whole.

Read: the layout of the public repositories and that of transformers' modules (see hub.py), one file or many, flat
(Baidu) or nested config.json, from a folder or from the hub. Written: always the public layout, with the nested config.
Router weights and correction biases are float32 in memory and in what we write, whatever the dtype of the rest.

Not read, on purpose:
    pickled weights          they can run code; convert them to safetensors first
    multi-token prediction   `mtp*` tensors of text repositories, a head this model does not have: ignored and logged
    a second head            a tied model whose file holds an lm_head unlike its embedding: an error
A flipped bit inside a tensor cannot be noticed: safetensors carries no checksum of the data, only its length.

Source: reference section 5.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ernie_model.atomic import atomic_folder, atomic_write
from ernie_model.config import ErnieConfig, PositionAfterVideo
from ernie_model.expert_parallel import WHOLE, Shard, mark_experts, shard_experts, shard_of
from ernie_model.hub import Index, Piece, Read, assemble, hub_tensors, pieces_by_stored_name
from ernie_model.model import ErnieModel

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pdparams")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# safetensors' names for the dtypes we read. Quantised types are not in the list: their scales have no place here.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded or saved exactly."""


class Stored(NamedTuple):
    """One tensor in a file, as the header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


# ------------------------------------------------------------------------------------------------------------ loading


def load_config(source: str | Path, revision: str | None = None) -> ErnieConfig:
    """The configuration of a local folder (or its config.json) or of a hub repository.

    Raises:
        ConfigError: unknown `model_type`, or a setting that is not implemented.
        CheckpointError: the repository cannot be reached.
        FileNotFoundError: there is no config.json.
    """
    return ErnieConfig.load(local_folder(source, revision, ["config.json"]))


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    position_after_video: PositionAfterVideo | None = None,
    experts: Shard = WHOLE,
    ready: Callable[[nn.Module], None] | None = None,
) -> ErnieModel:
    """Load weights from a local folder or a hub id (`baidu/ERNIE-4.5-0.3B-PT`).

    Args:
        dtype: of the parameters in memory, except the routers', which are float32. None: as the embedding is stored.
        device: where the parameters are allocated; files stream through the CPU one tensor at a time.
        revision: branch, tag or commit of a hub repository; not for a folder.
        position_after_video: overrides the configuration (reference trap 7.1).
        experts: which experts of every pool this rank holds. The others are neither allocated nor read.
        ready: gets every module with weights of its own as soon as they are read, before the next one is allocated.

    Raises:
        CheckpointError: files missing, damaged, pickled or quantised; tensors missing, unexpected, of the wrong shape,
            stored twice; a tied model with a different head.
        ConfigError: see `load_config`.
        ValueError: the experts cannot be shared out evenly.
    """
    folder = local_folder(source, revision, ["*.safetensors", "*.json"])
    config = ErnieConfig.load(folder)
    if position_after_video is not None:
        config = config.replace(position_after_video=position_after_video)
    stored = _read_headers(folder)

    with torch.device("meta"):
        model = ErnieModel(config)
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict()), "to_empty would leave it unset"
    plan = _match(config, model.state_dict(), stored, folder)
    model.set_dtype(dtype or plan["embed_tokens.weight"][0].stored.dtype)
    if dtype is None:
        _warn_if_narrowed(plan, model.state_dict())
    shard_experts(model, experts)

    files = _Files()
    for path, module in model.named_modules():
        if own := [name for name, _ in _own_tensors(module)]:
            module.to_empty(device=device, recurse=False)
            mark_experts(module, experts)
            _fill(module, {name: plan[f"{path}.{name}"] for name in own}, files)
            if module is model.embed_tokens:
                _check_tied_head(config, stored, model.embed_tokens.weight.detach())
            if ready is not None:
                ready(module)
    return model


class Headers(NamedTuple):
    """What the files of a checkpoint hold, without having read a value."""

    num_files: int
    num_tensors: int
    num_bytes: int
    dtypes: dict[str, int]
    """Stored dtype -> number of tensors."""


def inspect_headers(source: str | Path, config: ErnieConfig, revision: str | None = None) -> Headers:
    """Check that a checkpoint would load into `config`: every tensor there once, in its shape, in a dtype we read.

    Only headers are read, so it takes seconds for any size.

    Raises:
        CheckpointError: what `load_model` would raise, except for a tied head that differs from the embedding.
    """
    folder = local_folder(source, revision, ["*.safetensors", "*.json"])
    stored = _read_headers(folder)
    with torch.device("meta"):
        model = ErnieModel(config)
    _match(config, model.state_dict(), stored, folder)
    return Headers(
        num_files=len({item.file for item in stored}),
        num_tensors=len(stored),
        num_bytes=sum(math.prod(item.shape) * item.dtype.itemsize for item in stored),
        dtypes=dict(Counter(str(item.dtype).removeprefix("torch.") for item in stored)),
    )


class Source(NamedTuple):
    """Where (part of) one of our tensors is stored."""

    stored: Stored
    piece: Piece


class _Files:
    """Readers of the files of a checkpoint, one open at a time: what it has mapped counts as this process's memory."""

    def __init__(self):
        self.open: dict[Path, Any] = {}

    def __getitem__(self, file: Path):
        if file not in self.open:
            self.open.clear()
            self.open[file] = _open(file)
        return self.open[file]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _fill(module: nn.Module, sources: Mapping[str, list[Source]], files: _Files) -> None:
    """Read a module's own tensors, file by file."""
    ours = dict(_own_tensors(module))
    wanted = [(source, ours[name]) for name, found in sources.items() for source in found]
    for (stored, piece), tensor in sorted(wanted, key=lambda one: one[0].stored.file):
        if (held := _held(piece, tensor)) is None:
            continue
        index, rows = held
        values = files[stored.file].get_slice(stored.name)[rows]
        # detached, so that autograd does not notice; copy_ converts the dtype
        piece.view(tensor.detach(), index).copy_(values if piece.row is None else values[0])


def _held(piece: Piece, tensor: Tensor) -> tuple[Index, slice] | None:
    """The part of `tensor` to fill, and from which stored rows; None where another rank holds that expert."""
    if piece.row is not None:
        return piece.index, slice(piece.row, piece.row + 1)
    if (shard := shard_of(tensor)) == WHOLE:
        return piece.index, slice(None)
    part = shard.part_of(shard.of * tensor.shape[0])
    if not piece.index:  # all experts are one stored tensor, as in transformers' modules
        return (), part
    expert, *rest = piece.index
    assert isinstance(expert, int)
    return ((expert - part.start, *rest), slice(None)) if part.start <= expert < part.stop else None


def _warn_if_narrowed(plan: Mapping[str, list[Source]], ours: Mapping[str, Tensor]) -> None:
    narrowed = {
        source.stored.name
        for name, sources in plan.items()
        for source in sources
        if torch.promote_types(source.stored.dtype, ours[name].dtype) != ours[name].dtype
    }
    if narrowed:
        log.warning(
            "%d tensors are stored wider than they are loaded and were rounded: %s", len(narrowed), _brief(narrowed)
        )


def _check_tied_head(config: ErnieConfig, stored: list[Stored], embedding_VD: Tensor) -> None:
    """A tied model may store its embedding twice, but not two different ones.

    transformers would silently untie such a model, vLLM would silently drop the head. Neither may be what was meant.
    """
    heads = [item for item in stored if item.name == HEAD]
    if not config.tie_word_embeddings or not heads:
        return
    with _open(heads[0].file) as reader:
        head = reader.get_slice(HEAD)
        for start in range(0, embedding_VD.shape[0], 4096):  # in rows, so that no second copy is ever made
            stop = min(start + 4096, embedding_VD.shape[0])
            rows = embedding_VD[start:stop]
            difference = (head[start:stop].to(rows.device, rows.dtype) - rows).abs().max().item()
            if difference:
                raise CheckpointError(
                    f"{heads[0].file}: config.json says tie_word_embeddings = true, but {HEAD} and {EMBEDDING} differ "
                    f"(by {difference:.3g} in rows {start} to {stop - 1}). Set tie_word_embeddings to false to keep "
                    f"both, or remove {HEAD} to use the embedding."
                )


# ------------------------------------------------------------------------------------------- which tensors go where


def _match(
    config: ErnieConfig, ours: Mapping[str, Tensor], stored: list[Stored], folder: Path
) -> dict[str, list[Source]]:
    """Where each of our tensors is stored; every element of it exactly once."""
    table = pieces_by_stored_name(config)
    plan: dict[str, list[Source]] = defaultdict(list)
    problems: list[str] = []
    unexpected, ignored = [], []
    written: Counter[str] = Counter()
    for item in stored:
        # The head of a tied model may be stored as well: it has the embedding's shape, and is compared in the end.
        pieces = table.get(EMBEDDING if item.name == HEAD and config.tie_word_embeddings else item.name)
        if pieces is None:
            is_ignored = _is_multi_token_prediction(item.name) and config.vision is None
            (ignored if is_ignored else unexpected).append(item.name)
            continue
        expected = pieces[0].stored_shape(ours[pieces[0].ours])
        if item.shape != expected:
            problems.append(f"wrong shape: {item.name} is {item.shape}, the configuration asks for {expected}")
        if item.name == HEAD and config.tie_word_embeddings:
            continue
        for piece in pieces:
            plan[piece.ours].append(Source(item, piece))
            written[piece.ours] += piece.view(ours[piece.ours]).numel()

    names = {item.name for item in stored}
    missing = [
        name
        for name, pieces in hub_tensors(config).items()
        if name not in names and any(written[piece.ours] < ours[piece.ours].numel() for piece in pieces)
    ]
    twice = [name for name, tensor in ours.items() if written[name] > tensor.numel()]
    if missing:
        problems.append(f"missing ({len(missing)}): {_brief(missing)}")
    if unexpected:
        problems.append(f"unexpected ({len(unexpected)}): {_brief(unexpected)}{_hint(unexpected)}")
    if twice:
        problems.append(f"stored twice, in two layouts ({len(twice)}): {_brief(twice)}")
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise CheckpointError(f"{folder} does not fit its config.json ({config.model_type}):\n  {shown}")
    unknown = set(ours) - set(written)
    assert not unknown and all(written[name] == ours[name].numel() for name in ours), f"no stored name for {unknown}"
    if ignored:
        log.warning("ignored %d multi-token-prediction tensors of %s: %s", len(ignored), folder, _brief(ignored))
    return plan


def _is_multi_token_prediction(name: str) -> bool:
    return any(part.startswith("mtp") for part in name.split("."))


def _hint(unexpected: list[str]) -> str:
    if all(name.startswith("ernie.") or name == HEAD for name in unexpected):
        return "\n  These are PaddlePaddle names; use the repository whose name ends in -PT."
    if any("lora_" in name for name in unexpected):
        return "\n  These are adapter weights; load the base model first."
    return ""


def _brief(names: Iterable[str], limit: int = 20) -> str:
    """All of the names, with those that differ only in numbers on one line: `layers.{1..27}.mlp.gate.weight (27)`."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append([int(n) for n in re.findall(r"\d+", name)])
    lines = []
    for pattern, numbers in groups.items():
        for values in zip(*numbers, strict=True):
            distinct = set(values)
            low, high = min(distinct), max(distinct)
            contiguous = len(distinct) == high - low + 1
            text = str(low) if low == high else f"{{{low}{'..' if contiguous else ', ..., '}{high}}}"
            pattern = pattern.replace("#", text, 1)
        lines.append(pattern if len(numbers) == 1 else f"{pattern} ({len(numbers)})")
    more = [f"and {len(lines) - limit} more kinds"] if len(lines) > limit else []
    return ", ".join(lines[:limit] + more)


# -------------------------------------------------------------------------------------------------------------- files


def check_name(source: str | Path) -> str:
    """The name of a hub repository. Raises CheckpointError: what is no folder cannot be one either."""
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CheckpointError(
            f"{str(source)!r} is neither an existing folder nor a hub id such as baidu/ERNIE-4.5-0.3B-PT."
        )
    return source


def local_folder(source: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """`source` itself when it is a folder; otherwise the downloaded snapshot of a hub repository.

    Raises:
        CheckpointError: it is neither, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} was given, but {path} is a folder; revisions belong to hub ids."
            )
        return path
    name = check_name(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{source!r} is not a folder here, and downloading it from the hub failed ({reason}). "
            "Check the name and the network, or pass a local folder."
        ) from error


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index when there is one.

    Raises:
        CheckpointError: there are none, or files that the index names are missing or of another kind.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is out of date."
        )
    if single.exists():
        return [single], None
    if not index.exists():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights ({', '.join(pickled[:5])}) and no safetensors. Pickles can run any "
                "code when they are opened, so they are not read; convert them to safetensors."
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is not a readable index: {type(error).__name__}: {error}") from error
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; a shard is a .safetensors file in the same folder.")
    if absent := [name for name in files if not (folder / name).exists()]:
        raise CheckpointError(
            f"{index} names {len(files)} shards, of which {len(absent)} are not there: {', '.join(absent)}. "
            "Was the download interrupted?"
        )
    return [folder / name for name in files], weight_map


def _read_headers(folder: Path) -> list[Stored]:
    files, index = weight_files(folder)
    stored: list[Stored] = []
    for file in files:
        with _open(file) as reader:
            for name in reader.keys():
                entry = reader.get_slice(name)
                if (dtype := entry.get_dtype()) not in DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} is stored as {dtype}; quantised checkpoints are not read. "
                        f"Use one in {', '.join(DTYPES)}."
                    )
                stored.append(Stored(name, file, tuple(entry.get_shape()), DTYPES[dtype]))
    if index is not None:
        held = {item.name: item.file.name for item in stored}
        if wrong := [name for name in {*held, *index} if held.get(name) != index.get(name)]:
            name = min(wrong)
            raise CheckpointError(
                f"{folder / INDEX_FILE} does not match the shards for {len(wrong)} tensors; for example {name}: the "
                f"index says {index.get(name, 'nowhere')}, it is in {held.get(name, 'none of them')}."
            )
    return stored


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}). Download or copy it again.") from error


# ------------------------------------------------------------------------------------------------------------- saving


def save_model(
    model: ErnieModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers and vLLM load: config.json and safetensors, all at once or not at all.

    To put a tokenizer into the same folder, use `atomic_folder` and `write_model` yourself.

    Args:
        dtype: of the stored tensors, except the routers', which stay float32. None: as they are in memory.
        max_shard_bytes: a shard is closed before it would become larger; one tensor may be larger than that alone.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the model holds parameters that a checkpoint has no place for, such as adapters.
        FolderExistsError: the folder is not empty and `overwrite` is False.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_model(model, temporary, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_model(
    model: ErnieModel, folder: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write config.json and safetensors into an existing folder. Holds at most one shard beside the model."""
    write_tensors(model.config, model.state_dict(), folder, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_tensors(
    config: ErnieConfig,
    ours: Mapping[str, Tensor],
    folder: Path,
    *,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    writer: Shard = WHOLE,
) -> None:
    """`write_model` for tensors under our names. With `read`, `ours` gives shapes and dtypes, and `read` the values.

    Args:
        writer: this process writes every `writer.of`-th shard; the first one also the index and config.json. All plan
            the same shards, so that they need not speak with each other, and several write what one would.
    """
    tensors = hub_tensors(config)
    _refuse_strangers(config, ours, tensors, valued=read is None)
    sizes = {name: _stored_bytes(pieces, ours, dtype) for name, pieces in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    for file, names in list(shards.items())[writer.index :: writer.of]:
        shard = {n: assemble(tensors[n], ours, _stored_dtype(tensors[n], ours, dtype), read).cpu() for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next one is assembled
    if writer.index:
        return
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.numel() for tensor in ours.values()),
                "total_size": sum(sizes.values()),
            },
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        atomic_write(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    main = str(dtype or ours["embed_tokens.weight"].dtype).removeprefix("torch.")
    atomic_write(folder / "config.json", json.dumps(config.to_json() | {"dtype": main}, indent=2) + "\n")


def _refuse_strangers(
    config: ErnieConfig, ours: Mapping[str, Tensor], tensors: dict[str, list[Piece]], *, valued: bool
) -> None:
    known = {piece.ours for pieces in tensors.values() for piece in pieces}
    if strangers := sorted(set(ours) - known):
        raise CheckpointError(
            f"the model holds parameters that a checkpoint has no place for: {_brief(strangers)}. Merge adapters first."
        )
    if absent := sorted(known - set(ours)):
        raise CheckpointError(f"the model lacks parameters its configuration asks for: {_brief(absent)}.")
    if valued and (empty := sorted(name for name in known if ours[name].is_meta)):
        raise CheckpointError(f"the model has no values (meta device) for: {_brief(empty)}.")
    if config.use_bias and config.model_type == "ernie4_5_moe":
        raise CheckpointError(
            "use_bias is true in a text mixture of experts: transformers' class then has an lm_head.bias, which this "
            "model does not. No released model is of this kind."
        )


def _stored_dtype(pieces: list[Piece], ours: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """Routers keep float32, even in a bfloat16 file (reference 2.11)."""
    current = ours[pieces[0].ours].dtype
    if ".router." in pieces[0].ours:
        return current if dtype is None else torch.promote_types(dtype, torch.float32)
    return dtype or current


def _stored_bytes(pieces: list[Piece], ours: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    elements = sum(piece.view(ours[piece.ours]).numel() for piece in pieces)
    return elements * _stored_dtype(pieces, ours, dtype).itemsize


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in their order."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be positive.")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
