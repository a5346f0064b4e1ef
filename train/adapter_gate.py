"""The adapter gate: nothing is published, and no adapter is used, before its files were compared with the live model.

    files on the disk ── read again, recomputed in float64 ──┐
                                                             ├── equal to rounding, or AdapterError and no folder
    live model ── every tensor; sampled rows of W + BA ──────┘

Adapters get lost in silence everywhere else: a tensor that nobody wrote, zeros after a failed gather, B transposed,
alpha / r where alpha / sqrt(r) was trained. So the gate believes neither the code that wrote the files nor the code
that reads them. It has its own reading of peft's format, and it does not ask the live layer for its factors alone but
for its function: row i of the effective weight is the gradient of output i by the input.

    check_adapter   after an adapter was saved or loaded: all tensors exactly, sampled rows of W + BA of every part
    check_merged    after a merged folder was written: two rows of every tensor in it, adapted or not

What sampling cannot see is damage of single rows in a merged folder that are not among those read.

Where the model lies on several ranks, all of them look, each at the experts that it holds; under ZeRO-3 they put the
weights of one module after the other together for it (`whole`), so none of them stops at the first difference.
"""

import json
import math
import re
from collections import OrderedDict
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ernie_model.checkpoint import INDEX_FILE, SINGLE_FILE
from ernie_model.expert_parallel import WHOLE, Shard, shard_of
from ernie_model.hub import Piece, hub_tensors
from ernie_model.layers import wide
from train.config import UserError
from train.lora.files import CONFIG, WEIGHTS, keys_by_tensor
from train.lora.layers import Factors, LoraExperts, LoraLinear, effective_rows
from train.parallel.partition import whole

if TYPE_CHECKING:
    from train.lora.adapt import Adapters

ROWS, EXPERTS = 4, 4
WAY_OUT = "Nothing was published; the checkpoints of this run are whole."


class AdapterError(UserError):
    """An adapter or a merged folder that is not what was trained."""


class Checked(NamedTuple):
    """What the gate has looked at."""

    tensors: int
    rows: int
    worst: float
    """The largest difference found, as a share of what rounding may explain."""


# ------------------------------------------------------------------------------------------------- an adapter folder


def check_adapter(folder: Path, adapters: "Adapters", name: str | None = None) -> Checked:
    """Compare an adapter folder with a live adapter: the trained one, or the one called `name`.

    Raises:
        AdapterError: names the first tensor that is missing, unknown, of another shape, not finite, all zero though
            the live one is not, different, or scaled differently.
    """
    name = name or adapters.config.name
    config, tensors = _read(folder)
    keys = keys_by_tensor(adapters.model.config)
    sampled, names = _sample(adapters, name), set[str]()
    rows, worst, problem = 0, 0.0, None
    for site in adapters.sites[name]:
        with whole(adapters.layers[site.module]):
            for tensor, live in adapters.own(site.module, name).items():
                names |= {keys[tensor].A, keys[tensor].B, *([keys[tensor].magnitude] * (live.magnitude_O is not None))}
                try:
                    _compare_factors(folder, adapters, tensor, live, site.rank, config, tensors)
                    stacked = live.A.ndim == 3
                    experts = _spread(live.A.shape[0], EXPERTS) if stacked else [None]
                    for expert in experts if site.module in sampled else ():
                        count, share = _compare_rows(folder, adapters, name, tensor, expert, config, tensors)
                        rows, worst = rows + count, max(worst, share)
                except AdapterError as error:
                    problem = problem or error
    if problem is not None:
        raise problem
    if strangers := sorted(tensors.keys() - names):
        raise AdapterError(f"{folder}: {WEIGHTS} holds {strangers[0]}, which no live adapter has. {WAY_OUT}")
    return Checked(len(names), rows, worst)


def _compare_factors(
    folder: Path, adapters: "Adapters", tensor: str, live: Factors, rank: int, config: dict, tensors: dict[str, Tensor]
) -> None:
    """A and B of one tensor, or of those of its experts that are here, and their scale."""
    keys = keys_by_tensor(adapters.model.config)[tensor]
    shard = shard_of(adapters.base_tensor(tensor))
    experts = live.A.shape[0] if live.A.ndim == 3 else None
    pairs = [(keys.A, "A", live.A, experts), (keys.B, "B", live.B, experts)]
    if live.magnitude_O is not None:
        pairs.append((keys.magnitude, "magnitude", live.magnitude_O, None))
    for key, role, value, count in pairs:
        _same(folder, key, role, tensors.get(key), value.detach().cpu(), count, shard)
    if (scale := _scale(config, keys.target, rank, folder)) != live.scale:
        raise AdapterError(
            f"{folder}: {CONFIG} scales {keys.target} by {scale:.6g}, and it was trained with "
            f"{live.scale:.6g} (alpha / rank, or alpha / sqrt(rank) with rslora). {WAY_OUT}"
        )


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} cannot be read back as an adapter ({error}). {WAY_OUT}") from error


def _scale(config: dict, target: str, rank: int, folder: Path) -> float:
    """alpha / r as a reader of adapter_config.json computes it."""

    def value(patterns: str, default: str) -> float:
        names = (target, target.removesuffix(".weight"))
        known = (config.get(patterns) or {}).items()
        matching = [v for name in names for k, v in known if re.fullmatch(rf"(.*\.)?({k})", name)]
        return matching[0] if matching else config[default]

    if (r := value("rank_pattern", "r")) != rank:
        raise AdapterError(f"{folder}: {CONFIG} gives {target} rank {r}, and it was trained with {rank}. {WAY_OUT}")
    return value("alpha_pattern", "lora_alpha") / (math.sqrt(r) if config.get("use_rslora") else r)


def _same(
    folder: Path, key: str, role: str, found: Tensor | None, live: Tensor, experts: int | None, shard: Shard
) -> None:
    """One stored tensor against the live one, or the part of it that is here, value by value."""

    def refuse(reason: str) -> None:
        raise AdapterError(f"{folder}: {key} {reason}. {WAY_OUT}")

    if found is None:
        refuse("is missing")
        return
    # peft's layout of stacked factors: A (E*L, I), B (O, L*E) with the expert running fastest.
    want = live if experts is None else live.reshape(-1, live.shape[-1])
    if experts is not None and role == "B":
        want = torch.stack([live[e, :, j] for j in range(live.shape[2]) for e in range(experts)], dim=1)
    of = shard.of if experts is not None else 1
    shape = (want.shape[0], want.shape[1] * of) if role == "B" else (want.shape[0] * of, *want.shape[1:])
    if tuple(found.shape) != tuple(shape):
        transposed = " (transposed)" if tuple(found.shape) == tuple(shape)[::-1] else ""
        refuse(f"is {tuple(found.shape)}{transposed}, not {tuple(shape)}")
    if of > 1 and experts is not None:
        first = shard.index * experts
        if role == "B":
            found = torch.cat([found[:, j : j + experts] for j in range(first, shape[1], of * experts)], dim=1)
        else:
            found = found[shard.index * len(want) : (shard.index + 1) * len(want)]
    if not torch.isfinite(found).all() or not torch.isfinite(live).all():
        refuse("is not finite")
    if not found.any() and (live.any() or role != "B"):  # B is zero until training moves it, and nothing else ever is
        refuse("is all zero, though training moved it" if live.any() else "is all zero, so it could never be trained")
    if not torch.equal(found.to(want.dtype), want):  # a folder may be narrower than the masters it is loaded into
        difference = (found.double() - want.double()).abs().max().item()
        square = found.ndim == 2 and found.shape[0] == found.shape[1]
        also = " (it is transposed)" if square and torch.equal(found.T, want) else ""
        refuse(f"differs from the live tensor by up to {difference:.3g}{also}")


def _sample(adapters: "Adapters", name: str) -> set[str]:
    """Modules of which rows are compared: of every part the first and the last, and one between."""
    by_part: dict[object, list[str]] = {}
    for site in adapters.sites[name]:
        by_part.setdefault(site.part, []).append(site.module)
    return {modules[i] for modules in by_part.values() for i in _spread(len(modules), 3)}


def _spread(length: int, count: int) -> list[int]:
    """`count` of the numbers 0..length-1, the first and the last among them."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


def _compare_rows(
    folder: Path,
    adapters: "Adapters",
    name: str,
    tensor: str,
    expert: int | None,
    config: dict,
    tensors: dict[str, Tensor],
) -> tuple[int, float]:
    """Rows of W + BA: from the files in float64, and as the gradient of the live layer's outputs by its input."""
    keys = keys_by_tensor(adapters.model.config)[tensor]
    weight_OI = adapters.base_tensor(tensor).detach()
    weight_OI = weight_OI if expert is None else weight_OI[expert]
    row_N = torch.tensor(_spread(weight_OI.shape[0], ROWS))
    live_NI = live_rows(adapters, tensor, expert, row_N).double().cpu()

    A, B = tensors[keys.A].double(), tensors[keys.B].double()
    if expert is not None:
        shard, here = shard_of(adapters.base_tensor(tensor)), adapters.base_tensor(tensor).shape[0]
        experts, stored = here * shard.of, here * shard.index + expert
        rank = A.shape[0] // experts
        A, B = A[stored * rank : (stored + 1) * rank], B[:, stored::experts]
    scale = _scale(config, keys.target, A.shape[0], folder)
    base_NI = weight_OI[row_N.to(weight_OI.device)].double().cpu()
    change_NI = scale * (B[row_N] @ A)
    # Adapters that are loaded beside this one belong to the effective weight as well.
    module, attribute = tensor.rpartition(".")[::2]
    others = [one for other, one in adapters.layers[module].factors(attribute).items() if other != name]
    for other in others:
        index = () if expert is None else (expert,)
        base_NI = base_NI + other.rows(index, row_N.to(other.B.device), torch.float64).detach().cpu()
    whole_NI = base_NI + change_NI
    size_NI = base_NI.abs() + scale * (B[row_N].abs() @ A.abs())
    if keys.magnitude in tensors:
        factor_N1 = (tensors[keys.magnitude].double()[row_N] / whole_NI.norm(dim=1))[:, None]
        whole_NI, size_NI = whole_NI * factor_N1, (size_NI + whole_NI.abs()) * factor_N1.abs()
    # Each entry is a sum of `rank` products and W, in the masters' precision; DoRA's norm sums a row.
    terms = A.shape[0] + 8 + (A.shape[1] if keys.magnitude in tensors else 0)
    allowed_NI = terms * torch.finfo(wide(weight_OI[:0]).dtype).eps * size_NI + 1e-30
    share = ((live_NI - whole_NI).abs() / allowed_NI).max().item()
    if not share <= 1:
        which = tensor if expert is None else f"{tensor}[{expert}]"
        most = (live_NI - whole_NI).abs().max().item()
        raise AdapterError(
            f"{folder}: rows of W + BA of {which} differ from the live model by up to {most:.3g}, {share:.3g} times "
            f"what rounding explains. {WAY_OUT}"
        )
    return len(row_N), share


@torch.enable_grad()
def live_rows(adapters: "Adapters", tensor: str, expert: int | None, row_N: Tensor) -> Tensor:
    """Rows of the effective weight as the layer applies it, in its masters' precision."""
    module, attribute = tensor.rpartition(".")[::2]
    layer = adapters.layers[module]
    weight = adapters.base_tensor(tensor)
    row_N = row_N.to(weight.device)
    x_NI = torch.zeros(len(row_N), weight.shape[-1], device=weight.device, dtype=wide(weight[:0]).dtype)
    x_NI.requires_grad_()
    was_training = layer.training
    layer.eval()  # no dropout
    hooks = _take_hooks(layer)
    try:
        if isinstance(layer, LoraExperts):
            count_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=weight.device)
            count_E[expert] = len(row_N)
            y_NO = layer.product(attribute, x_NI, count_E)
        else:
            assert isinstance(layer, LoraLinear)
            y_NO = layer(x_NI)
    finally:
        layer.train(was_training)
        _take_hooks(layer, hooks)
    (grad_NI,) = torch.autograd.grad(y_NO.gather(1, row_N[:, None]).sum(), x_NI)
    return grad_NI


def _take_hooks(layer: nn.Module, back: list | None = None) -> list:
    """What runs around the forward of every module in a layer, taken away and, with `back`, given back.

    ZeRO-3's would put the weights together, and away again, in an order that they expect to be that of the model.
    """
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    modules = list(layer.modules())
    before = [{kind: getattr(module, kind) for kind in kinds} for module in modules]
    for module, hooks in zip(modules, back or [{kind: OrderedDict() for kind in kinds}] * len(modules), strict=True):
        vars(module).update(hooks)
    return before


# --------------------------------------------------------------------------------------------------- a merged folder


def check_merged(folder: Path, adapters: "Adapters") -> Checked:
    """Compare a merged folder with W + BA of the live model, recomputed in float64: two rows of every stored tensor.

    Raises:
        AdapterError: names the first tensor that is missing, of another shape, not finite, or different.
    """
    tensors = hub_tensors(adapters.model.config)
    files = _files(folder, tensors)
    rows, worst, problem = 0, 0.0, None
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as reader:
            here = [name for name in tensors if files[name] == file]
            for module, names in groupby(here, key=lambda name: tensors[name][0].ours.rpartition(".")[0]):
                with whole(adapters.layers.get(module) or adapters.model.get_submodule(module)):
                    for name in names:
                        if (pieces := _held(tensors[name], adapters)) is None:
                            continue
                        try:
                            count, share = _compare_stored(folder, name, pieces, reader.get_slice(name), adapters)
                            rows, worst = rows + count, max(worst, share)
                        except AdapterError as error:
                            problem = problem or error
    if problem is not None:
        raise problem
    return Checked(len(tensors), rows, worst)


def _held(pieces: list[Piece], adapters: "Adapters") -> list[Piece] | None:
    """The pieces of a stored tensor, by their place on this rank; None for an expert that another one holds."""
    first = pieces[0]
    shard, here = shard_of(ours := adapters.base_tensor(first.ours)), ours.shape[0]
    if shard == WHOLE:
        return pieces
    expert, *rest = first.index
    assert isinstance(expert, int) and len(pieces) == 1
    if expert // here != shard.index:
        return None
    return [replace(first, index=(expert % here, *rest))]


def _files(folder: Path, tensors: dict[str, list[Piece]]) -> dict[str, str]:
    try:
        if (folder / INDEX_FILE).exists():
            found: dict[str, str] = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        else:
            with safe_open(folder / SINGLE_FILE, framework="pt") as reader:
                found = dict.fromkeys(reader.keys(), SINGLE_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AdapterError(f"{folder} cannot be read back ({error}). {WAY_OUT}") from error
    if differing := sorted(found.keys() ^ tensors.keys()):
        what = "is missing" if differing[0] in tensors else "has no place in this model"
        raise AdapterError(f"{folder}: {differing[0]} {what}. {WAY_OUT}")
    return found


def _compare_stored(folder: Path, name: str, pieces: list[Piece], stored, adapters: "Adapters") -> tuple[int, float]:
    ours = adapters.base_tensor(pieces[0].ours).detach()
    if tuple(stored.get_shape()) != pieces[0].stored_shape(ours):
        shape, wanted = tuple(stored.get_shape()), pieces[0].stored_shape(ours)
        raise AdapterError(f"{folder}: {name} is {shape}, not {wanted}. {WAY_OUT}")
    if pieces[0].row is not None or not (factors := adapters.factors(pieces[0].ours)):
        parts = [piece.view(adapters.base_tensor(piece.ours).detach()).double().cpu() for piece in pieces]
        row_N = torch.tensor(_spread(stored.get_shape()[0], 2))
        expected, terms, size = (torch.stack(parts) if pieces[0].row is not None else parts[0])[row_N], 0, None
    else:
        row_N = torch.tensor(_spread(stored.get_shape()[0], 2))
        on_device = row_N.to(ours.device)
        expected = effective_rows(ours, factors, pieces[0].index, on_device, dtype=torch.float64).cpu()
        rank = max(one.A.shape[-2] for one in factors)
        dora = any(one.magnitude_O is not None for one in factors)
        terms = rank * len(factors) + 8 + (ours.shape[-1] if dora else 0)
        size = expected.abs() + sum(
            (abs(one._replace(A=one.A.abs(), B=one.B.abs()).rows(pieces[0].index, on_device, torch.float64)).cpu())
            for one in factors
        )
    found = torch.stack([torch.as_tensor(stored[int(row)]) for row in row_N])
    # The sum is made in float32 and rounded once more when it is stored.
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-30
    if size is not None:
        allowed = allowed + terms * torch.finfo(wide(ours[:0]).dtype).eps * size
    if not torch.isfinite(found).all():
        raise AdapterError(f"{folder}: {name} is not finite. {WAY_OUT}")
    share = ((found.double() - expected).abs() / allowed).max().item()
    if not share <= 1:
        raise AdapterError(
            f"{folder}: rows of {name} differ from W + BA of the live model by up to "
            f"{(found.double() - expected).abs().max().item():.3g}, {share:.3g} times what rounding explains. {WAY_OUT}"
        )
    return len(row_N), share
