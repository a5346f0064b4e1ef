"""Weights in 8, 4 or 2 bits, part by part. Activations stay what they are: every product is with w^ instead of w.

    int8   one scale a row                 w^ = scale * code             code in -127..127
    int4   one scale a group of columns    w^ = scale * (code - 7.5)     code in 0..15, two in a byte
    int2   one scale a group of columns    w^ = scale * (code - 1.5)     code in 0..3, four in a byte

The levels lie symmetrically around 0, without a zero point: at two bits a level spent on 0 would be a third of them.
Scales are bfloat16, and codes are chosen for the rounded scale, so w^ is the same in every dtype that holds it.

    quantise_model(model, settings, importance)   Linear, Experts, Embedding -> modules with the same calls
    write_quantised / load_quantised              a folder with config.json and safetensors under our own names

Routers and norms are never quantised: they are small, and near-ties decide routing. A quantised module is neither a
`Linear` nor `Experts` nor an `nn.Embedding`; whoever fuses weights looks at that, and calls what it cannot fuse.

How it multiplies: for a few rows in bfloat16 on the CPU by torch's kernels for packed weights (those under torchao's
Linears, which know neither stacked experts nor two bits); otherwise w^ of one matrix, or of one expert that has rows,
is written out and forgotten.

Shape letters:  T tokens   I inputs   O outputs   G groups of columns   E experts   U rows of one pool   D model width
                F expert width   C bytes of a row's codes   V vocabulary   leading ... are O or E, O
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ernie_model.atomic import atomic_write
from ernie_model.checkpoint import INDEX_FILE, CheckpointError, local_folder, plan_shards, weight_files
from ernie_model.config import ErnieConfig, PositionAfterVideo
from ernie_model.layers import Linear, silu_mul
from ernie_model.model import ErnieModel
from ernie_model.moe import Experts, Router
from ernie_model.parts import Part, part_of

METHOD = "ernie_train"
"""`quantization_config.quant_method` in config.json: what other programs read, and refuse."""
QUANTISABLE = tuple(part for part in Part if part not in (Part.ROUTER, Part.NORMS))
SCALE_DTYPE = torch.bfloat16
KERNEL_ROWS = 16
"""Up to so many rows torch's CPU kernels for packed weights beat writing w^ out (docs/export.md has the figures)."""
KERNEL_GROUPS = (32, 64, 128, 256)
CHUNK = 1 << 22
"""Weights that are looked at in one go while scales are searched: it bounds the memory, not the result."""


class Scheme(Enum):
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def bits(self) -> int:
        return int(self.value.removeprefix("int"))

    @property
    def offset(self) -> float:
        """Half of the largest code; int8 is signed."""
        return 0.0 if self is Scheme.INT8 else (2**self.bits - 1) / 2

    @property
    def reach(self) -> float:
        """The largest |w^| in steps of a scale."""
        return 127.0 if self is Scheme.INT8 else self.offset


@dataclass(frozen=True)
class Quantization:
    """Which parts are quantised, and how."""

    parts: Mapping[Part, Scheme] = field(default_factory=dict)
    group: int = 128
    """Columns that share a scale in int4 and int2; a narrower matrix is one group."""

    def __post_init__(self):
        """Raises ValueError: a part that stays as it is, or a group that bytes and kernels cannot share."""
        for part in self.parts:
            if part not in QUANTISABLE:
                raise ValueError(f"{part.value} cannot be quantised; {', '.join(p.value for p in QUANTISABLE)} can.")
        if self.group not in KERNEL_GROUPS:
            raise ValueError(f"group is {self.group}; it must be 32, 64, 128 or 256 columns.")

    def scheme_of(self, name: str) -> Scheme | None:
        return self.parts.get(part_of(name))

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format": 1,
            "group": self.group,
            "parts": {p.value: s.value for p, s in self.parts.items()},
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Quantization":
        """Raises CheckpointError: quantised by another program, or by a later version of this one."""
        if raw.get("quant_method") != METHOD or raw.get("format") != 1:
            raise CheckpointError(
                f"config.json says quantization_config.quant_method={raw.get('quant_method')!r}, format="
                f"{raw.get('format')!r}; only {METHOD!r}, format 1, is read here. Take the unquantised checkpoint."
            )
        return Quantization({Part(p): Scheme(s) for p, s in raw["parts"].items()}, raw["group"])


# ---------------------------------------------------------------------------------------------------------- one matrix


class Quantised(NamedTuple):
    """Codes and scales of (..., I) weights."""

    codes: Tensor  # int8 (..., I), or uint8 (..., C): codes of column k * g / n + j of a group lie in byte j, n a byte
    scale: Tensor  # bfloat16 (...) for int8, (..., G) otherwise


def group_of(columns: int, group: int) -> int:
    """Columns that share a scale: `group`, or all of a narrower matrix, up to whole bytes of two-bit codes."""
    return min(group, math.ceil(columns / 32) * 32)


def shapes_of(shape: tuple[int, ...], scheme: Scheme, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of codes and scales for weights of `shape`."""
    *rows, columns = shape
    if scheme is Scheme.INT8:
        return shape, tuple(rows)
    size = group_of(columns, group)
    groups = math.ceil(columns / size)
    return (*rows, groups * size * scheme.bits // 8), (*rows, groups)


def quantise(
    weight: Tensor, scheme: Scheme, group: int = 128, importance: Tensor | None = None, *, search: bool = True
) -> Quantised:
    """Codes and scales of (..., I) weights.

    Args:
        importance: (I,) or (E, I): mean square of each input, by which errors count; None: all alike.
        search: choose every scale for the smallest weighted square error; otherwise the largest weight is the last
            level, and no weight is off by more than half a scale.

    Raises:
        ValueError: weights that are not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("weights that are not finite cannot be quantised.")
    flat = weight.reshape(-1, weight.shape[-1])
    rows = max(1, CHUNK // weight.shape[-1])
    parts = []
    for start in range(0, len(flat), rows):
        chunk = flat[start : start + rows].float()
        each = None
        if importance is not None:  # of the expert that each row belongs to
            per_expert = len(flat) // (importance.shape[0] if importance.ndim == 2 else 1)
            expert = torch.arange(start, start + len(chunk), device=chunk.device) // per_expert
            each = importance.view(-1, importance.shape[-1]).to(chunk.device).float()[expert]
        parts.append(_quantise_rows(chunk, scheme, group, each, search))
    codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    shapes = shapes_of(tuple(weight.shape), scheme, group)
    return Quantised(codes.view(shapes[0]), scale.view(shapes[1]))


SHRUNK = tuple(1 - step / 16 for step in range(11))
"""Which shares of the largest weight are tried as the last level."""


def _quantise_rows(w_RI: Tensor, scheme: Scheme, group: int, importance_RI: Tensor | None, search: bool) -> Quantised:
    rows, columns = w_RI.shape
    size = columns if scheme is Scheme.INT8 else group_of(columns, group)
    padding = -columns % size
    w_RGg = F.pad(w_RI, (0, padding)).view(rows, -1, size)
    counts_RGg = torch.ones_like(w_RI) if importance_RI is None else importance_RI
    counts_RGg = F.pad(counts_RGg, (0, padding)).view(rows, -1, size)  # padding counts nothing
    top_RG1 = w_RGg.abs().amax(-1, keepdim=True)
    best_scale, best_error = None, None
    for share in SHRUNK if search else (1.0,):
        scale = _rounded_up(top_RG1 * share / scheme.reach)
        error = ((scale * (_codes(w_RGg, scale, scheme) - scheme.offset) - w_RGg).square() * counts_RGg).sum(-1, True)
        if best_error is None or best_scale is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    assert best_scale is not None
    codes_RGg = _codes(w_RGg, best_scale, scheme)
    scale_RG = best_scale[..., 0].to(SCALE_DTYPE)
    if scheme is Scheme.INT8:
        return Quantised(codes_RGg.view(rows, -1).to(torch.int8), scale_RG[:, 0])
    return Quantised(pack(codes_RGg.to(torch.uint8), scheme.bits).view(rows, -1), scale_RG)


def _codes(w: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The nearest code of each weight, as floats. A group of zeros has scale 0 and any code."""
    codes = (w / torch.where(scale > 0, scale, 1.0) + scheme.offset).round()
    return codes.clamp(scheme.offset - scheme.reach, scheme.offset + scheme.reach)


def _rounded_up(scale: Tensor) -> Tensor:
    """The next bfloat16 that is not smaller, as float32, so that the largest weight stays within reach."""
    near = scale.to(SCALE_DTYPE)
    above = (near.view(torch.int16) + 1).view(SCALE_DTYPE)  # positive floats are ordered as their bits are
    return torch.where(near.float() < scale, above, near).float()


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., g) -> bytes (..., g * bits / 8). Byte j holds columns j, j + g/n, ...: runs, when unpacked."""
    several = codes.unflatten(-1, (8 // bits, -1))
    out = several[..., 0, :].clone()
    for place in range(1, 8 // bits):
        out |= several[..., place, :] << (bits * place)
    return out


def unpack(packed: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The other way."""
    several = 8 // bits
    out = torch.empty(*packed.shape[:-1], several, packed.shape[-1], dtype=dtype, device=packed.device)
    for place in range(several):
        codes = packed >> (bits * place)
        out[..., place, :] = codes & (2**bits - 1) if place < several - 1 else codes
    return out.flatten(-2)


def dequantise(one: Quantised, scheme: Scheme, columns: int, dtype: torch.dtype) -> Tensor:
    """w^ (..., I)."""
    scale = one.scale.to(dtype)[..., None]
    if scheme is Scheme.INT8:
        return one.codes.to(dtype).mul_(scale)
    by_group = unpack(one.codes.unflatten(-1, (one.scale.shape[-1], -1)), scheme.bits, dtype)
    return by_group.sub_(scheme.offset).mul_(scale).flatten(-2)[..., :columns]


class _Matrix:
    """One quantised (O, I) matrix at work: a view of a module's buffers."""

    def __init__(self, codes: Tensor, scale: Tensor, scheme: Scheme, columns: int, for_kernel: bool):
        self.one, self.scheme, self.columns, self.for_kernel = Quantised(codes, scale), scheme, columns, for_kernel

    def product(self, x_TI: Tensor) -> Tensor:
        """x w^T in the dtype of x."""
        if self.for_kernel and x_TI.dtype == torch.bfloat16:
            return _int4_kernel(x_TI, self.one)
        few = x_TI.device.type == "cpu" and x_TI.dtype == torch.bfloat16 and x_TI.shape[0] <= KERNEL_ROWS
        # torch's kernel (2.13) reads whole vectors: it crashes where a row ends inside one (588 columns).
        if self.scheme is Scheme.INT8 and few and self.columns % 32 == 0:
            return torch.ops.aten._weight_int8pack_mm(x_TI.contiguous(), self.one.codes, self.one.scale.to(x_TI.dtype))
        return F.linear(x_TI, self.weight(x_TI.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        if self.for_kernel:
            raise RuntimeError(
                "codes were packed for a kernel, which keeps its order to itself. Read the folder again."
            )
        return dequantise(self.one, self.scheme, self.columns, dtype)


def _int4_kernel(x_TI: Tensor, one: Quantised) -> Tensor:
    """The kernel's w^ is scale * (code - 8) + zero, so that our half step is its zero point."""
    groups = one.scale.shape[-1]
    size = one.codes.shape[-1] * 2 // groups
    x_TI = F.pad(x_TI, (0, groups * size - x_TI.shape[-1]))
    scale_GO = one.scale.t()
    both_GO2 = torch.stack((scale_GO, scale_GO * 0.5), -1).to(x_TI.dtype).contiguous()
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI.contiguous(), one.codes, size, both_GO2)


def _repack(codes_OC: Tensor, groups: int) -> Tensor:
    codes = unpack(codes_OC.unflatten(-1, (groups, -1)), 4, torch.int32).flatten(-2)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)


# ------------------------------------------------------------------------------------------------------------- modules


class QuantisedModule(nn.Module):
    """Weights of (..., I) as buffers NAME_codes and NAME_scale."""

    def __init__(self, scheme: Scheme, group: int, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.scheme, self.group, self.shapes = scheme, group, dict(shapes)
        self.for_kernel = False
        for name, shape in shapes.items():
            codes, scale = shapes_of(shape, scheme, group)
            dtype = torch.int8 if scheme is Scheme.INT8 else torch.uint8
            self.register_buffer(f"{name}_codes", torch.zeros(codes, dtype=dtype))
            self.register_buffer(f"{name}_scale", torch.zeros(scale, dtype=SCALE_DTYPE))

    def put(self, name: str, weight: Tensor, importance: Tensor | None, *, search: bool) -> None:
        codes, scale = quantise(weight, self.scheme, self.group, importance, search=search)
        self.register_buffer(f"{name}_codes", codes)
        self.register_buffer(f"{name}_scale", scale)

    def matrix(self, name: str, expert: int | None = None) -> _Matrix:
        codes, scale = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale")
        if expert is not None:
            codes, scale = codes[expert], scale[expert]
        return _Matrix(codes, scale, self.scheme, self.shapes[name][-1], self.for_kernel)

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """w^, whole, in the shape of the weight that it stands for."""
        codes, scale = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale")
        return _Matrix(codes, scale, self.scheme, self.shapes[name][-1], self.for_kernel).weight(dtype)

    def pack_for_kernel(self) -> None:
        """Bring int4 codes into the order of torch's CPU kernel. From then on, `product` in bfloat16 is all it does."""
        if self.scheme is not Scheme.INT4 or self.for_kernel:
            return
        for name, shape in self.shapes.items():
            groups = self.get_buffer(f"{name}_scale").shape[-1]
            if shape[-2] % 16 or self.get_buffer(f"{name}_codes").shape[-1] * 2 // groups not in KERNEL_GROUPS:
                return
        for name in self.shapes:
            codes, groups = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale").shape[-1]
            stacked = codes.ndim == 3
            packed = [_repack(one, groups) for one in (codes if stacked else codes[None])]
            self.register_buffer(f"{name}_codes", torch.stack(packed) if stacked else packed[0])
        self.for_kernel = True

    def extra_repr(self) -> str:
        return f"{self.scheme.value}, " + ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())


class QuantisedLinear(QuantisedModule):
    def __init__(self, linear: nn.Linear, scheme: Scheme, group: int):
        super().__init__(scheme, group, {"weight": tuple(linear.weight.shape)})
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        out = self.matrix("weight").product(rows).view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """w^ (O, I) in float32: of a head, for whoever has no other way."""
        return self.dequantised("weight")


class QuantisedEmbedding(QuantisedModule):
    """Rows by token id; with `project`, the tied head as well. Its codes never change their order."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, group: int):
        super().__init__(scheme, group, {"weight": tuple(embedding.weight.shape)})
        self.dtype = embedding.weight.dtype

    def forward(self, token_T: Tensor) -> Tensor:
        one = Quantised(self.get_buffer("weight_codes")[token_T], self.get_buffer("weight_scale")[token_T])
        return dequantise(one, self.scheme, self.shapes["weight"][-1], self.dtype)

    def project(self, x_TD: Tensor) -> Tensor:
        """Logits (T, V); a few thousand rows of w^ at a time."""
        codes, scale = self.get_buffer("weight_codes"), self.get_buffer("weight_scale")
        columns, rows = self.shapes["weight"][-1], max(1, CHUNK // self.shapes["weight"][-1])
        parts = zip(codes.split(rows), scale.split(rows), strict=True)
        return torch.cat([_Matrix(*part, self.scheme, columns, False).product(x_TD) for part in parts], dim=-1)

    def pack_for_kernel(self) -> None:
        pass  # rows are looked up one by one

    @property
    def weight(self) -> Tensor:
        """w^ (V, D), whole, in the dtype that activations begin in."""
        return self.dequantised("weight", self.dtype)


class QuantisedExperts(QuantisedModule):
    """`Experts`: E independent SwiGLU networks over rows that are grouped by expert. Only those with rows are read."""

    def __init__(self, experts: Experts, scheme: Scheme, group: int):
        shapes = {"gate_up": tuple(experts.gate_up_EFD.shape), "down": tuple(experts.down_EDF.shape)}
        super().__init__(scheme, group, shapes)
        self.num_experts = experts.num_experts

    def forward(self, x_UD: Tensor, count_E: Tensor) -> Tensor:
        counts = count_E.tolist()
        out = [
            self.matrix("down", expert).product(silu_mul(*self.matrix("gate_up", expert).product(x).chunk(2, dim=-1)))
            for expert, x in enumerate(x_UD.split(counts))
            if x.shape[0]
        ]
        return torch.cat(out) if out else x_UD


# --------------------------------------------------------------------------------------------------------- whole models


def quantise_model(
    model: ErnieModel,
    settings: Quantization,
    importance: Mapping[str, Tensor] | None = None,
    *,
    search: bool = True,
) -> list[str]:
    """Replace the modules of the chosen parts, in place; their weights are freed one module after the other.

    Args:
        importance: mean square of the inputs by tensor name (`Calibration`); the name of a Linear's weight, or
            `...experts.gate_up_EFD` and `...down_EDF`.
        search: as in `quantise`.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: a part that the model does not have, or a module that another program has wrapped (adapters).
    """
    replaced = []
    found = set()
    for name, module in list(model.named_modules()):
        if (made := _quantised_module(name, module, settings)) is None:
            continue
        found.add(part_of(f"{name}.weight"))
        for ours, tensor in _weights_of(module).items():
            theirs = _short(ours)
            if tensor.is_meta:
                continue
            key = f"{name}.{ours}"
            made.put(theirs, tensor.detach(), (importance or {}).get(key), search=search)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.train(module.training))
        replaced.append(name)
    if absent := [part.value for part in settings.parts if part not in found]:
        raise ValueError(f"this model has no modules in {', '.join(absent)}; leave them out of quantize.")
    return replaced


def _short(tensor: str) -> str:
    return {"gate_up_EFD": "gate_up", "down_EDF": "down"}.get(tensor, tensor)


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2}


def _quantised_module(name: str, module: nn.Module, settings: Quantization) -> QuantisedModule | None:
    kinds = {Linear: QuantisedLinear, nn.Embedding: QuantisedEmbedding, Experts: QuantisedExperts}
    make = kinds.get(type(module))  # exactly these: a subclass computes something else
    if make is None or (scheme := settings.scheme_of(f"{name}.weight")) is None:
        return None
    with torch.device("meta" if next(module.parameters()).is_meta else "cpu"):
        return make(module, scheme, settings.group)


def stored_bytes(config: ErnieConfig, settings: Quantization, dtype: torch.dtype = torch.bfloat16) -> dict[Part, int]:
    """Bytes of each part as `write_quantised` would write it, from the configuration alone (meta device)."""
    with torch.device("meta"):
        model = ErnieModel(config).set_dtype(dtype)
    quantise_model(model, settings)
    sizes: dict[Part, int] = {}
    for name, tensor in model.state_dict().items():
        part = part_of(name)
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
    return sizes


# --------------------------------------------------------------------------------------------------------- calibration


class Calibration:
    """Mean squares of the inputs of everything that will be quantised, collected from forward passes.

        with Calibration(model, settings) as calibration:
            model(...) ...
        quantise_model(model, settings, calibration.importance())

    An expert that saw few rows borrows from its pool: `PRIOR` rows of the pool's mean are added to its own.
    """

    PRIOR = 16.0

    def __init__(self, model: ErnieModel, settings: Quantization):
        self.model = model
        self.names = {
            name: module
            for name, module in model.named_modules()
            if type(module) in (Linear, Experts) and settings.scheme_of(f"{name}.weight") is not None
        }
        self.head = model.lm_head is None and Part.EMBEDDINGS in settings.parts
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Calibration":
        for name, module in self.names.items():
            see = self._see_experts if isinstance(module, Experts) else self._see_linear
            self._hooks.append(
                module.register_forward_pre_hook(lambda module, inputs, name=name, see=see: see(name, module, *inputs))
            )
        if self.head:
            self._hooks.append(
                self.model.norm.register_forward_hook(lambda *args: self._add("embed_tokens.weight", args[-1]))
            )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_linear(self, name: str, module: nn.Module, x: Tensor) -> None:
        self._add(f"{name}.weight", x)

    def _see_experts(self, name: str, module: Experts, x_UD: Tensor, count_E: Tensor) -> None:
        if not x_UD.shape[0]:
            return
        counts = count_E.tolist()
        gate_up = module.gate_up_EFD
        hidden = [
            silu_mul(*F.linear(x, gate_up[expert].to(x.dtype)).chunk(2, dim=-1))
            for expert, x in enumerate(x_UD.split(counts))
            if x.shape[0]
        ]
        self._add(f"{name}.gate_up_EFD", x_UD, count_E)
        self._add(f"{name}.down_EDF", torch.cat(hidden), count_E)

    def _add(self, key: str, x: Tensor, count_E: Tensor | None = None) -> None:
        square = x.detach().reshape(-1, x.shape[-1]).float().square()
        if count_E is None:
            sums, counts = square.sum(0), torch.tensor(float(len(square)))
        else:
            sums = torch.stack([part.sum(0) for part in square.split(count_E.tolist())])
            counts = count_E.float()
        self.sums[key] = self.sums.get(key, 0) + sums
        self.counts[key] = self.counts.get(key, 0) + counts

    def importance(self) -> dict[str, Tensor]:
        """(I,) or (E, I) by tensor name; nothing for what no input reached."""
        out = {}
        for key, sums in self.sums.items():
            counts = self.counts[key]
            if sums.ndim == 1:
                out[key] = sums / counts
            else:
                pool_I = sums.sum(0) / counts.sum()
                out[key] = (sums + self.PRIOR * pool_I) / (counts + self.PRIOR)[:, None]
        return out


# --------------------------------------------------------------------------------------------------------------- files


def quantization_of(folder: str | Path) -> Quantization | None:
    """What config.json of a local folder says; None where the weights are not quantised."""
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text()).get("quantization_config") if path.is_file() else None
    return None if raw is None else Quantization.from_json(raw)


def write_quantised(
    model: ErnieModel, settings: Quantization, folder: Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """config.json and safetensors of a quantised model, under our own names, into an existing folder."""
    tensors = model.state_dict()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    for file, names in shards.items():
        save_file({n: tensors[n].detach().cpu().contiguous() for n in names}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        atomic_write(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    said = {"dtype": str(model.norm.weight.dtype).removeprefix("torch."), "quantization_config": settings.to_json()}
    atomic_write(folder / "config.json", json.dumps(model.config.to_json() | said, indent=2) + "\n")


def load_quantised(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    position_after_video: PositionAfterVideo | None = None,
) -> ErnieModel:
    """A model that `write_quantised` wrote, ready to run: nothing is dequantised that is not in use.

    Args:
        dtype: of what is not quantised, and of the activations; routers stay float32. None: as stored.

    Raises:
        CheckpointError: not a quantised folder of ours; tensors missing, unexpected, or of the wrong shape.
    """
    folder = local_folder(source, revision, ["*.safetensors", "*.json"])
    settings = quantization_of(folder)
    if settings is None:
        raise CheckpointError(f"{folder}: config.json has no quantization_config; load_model reads this folder.")
    config = ErnieConfig.load(folder)
    if position_after_video is not None:
        config = config.replace(position_after_video=position_after_video)
    with torch.device("meta"):
        model = ErnieModel(config)
    quantise_model(model, settings)
    wanted = model.state_dict()
    found: set[str] = set()
    for file in weight_files(folder)[0]:
        for name, tensor in load_file(file).items():
            if name not in wanted or wanted[name].shape != tensor.shape:
                asked = tuple(wanted[name].shape) if name in wanted else "nothing of that name"
                raise CheckpointError(
                    f"{file}: {name} is {tuple(tensor.shape)}, and config.json asks for {asked}. They are not of one "
                    "model; export it again."
                )
            found.add(name)
            _assign(model, name, tensor.to(device))
    if missing := sorted(wanted.keys() - found):
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing; for example {missing[0]}.")
    stored = model.norm.weight.dtype
    dtype = dtype or stored
    for module in model.modules():
        if not isinstance(module, QuantisedModule):
            own = torch.promote_types(dtype, torch.float32) if isinstance(module, Router) else dtype
            module._apply(lambda t, own=own: t.to(own) if t.is_floating_point() else t, recurse=False)
        elif module._parameters.get("bias") is not None:
            module.bias = nn.Parameter(module.get_parameter("bias").to(dtype))
        if isinstance(module, QuantisedEmbedding):
            module.dtype = dtype
    model.requires_grad_(False).eval()
    prepare(model)
    return model


def prepare(model: ErnieModel) -> None:
    """Bring codes into the order that is fastest here for the model's dtype; it can't be saved afterwards."""
    if model.norm.weight.device.type == "cpu" and model.norm.weight.dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, QuantisedModule):
                module.pack_for_kernel()


def _assign(model: ErnieModel, name: str, tensor: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
