"""The adapted layers: a frozen weight and a small product beside it, W + scale * B A, never added up.

    x ──┬── W ───────────────┐                 Linear    A (L, I)      B (O, L)
        └── A ── scale ── B ─┴─ add ── y       Experts   A (E, L, I)   B (E, O, L), rows grouped by expert

Both are peft's layers: `LoraLinear` is peft's own with a forward that follows the dtype of the activations, and
`LoraExperts` is registered with peft for `Experts`, which peft itself could only adapt by building W + B A of all
experts in every forward. B starts at zero, so an adapter begins as the base model.

A weight that is frozen gets no gradient: the backward pass multiplies by W once, for the activations.

Shape letters:  T tokens   I inputs   O outputs   L rank   E experts   U rows of one pool   D model width
                F expert width (gate and up together in gate_up)
Source: reference 5.4.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ernie_model.exact import ADAPTERS, KINDS, grouped_product, product
from ernie_model.expert_parallel import mark, shard_of
from ernie_model.hub import Index, Read
from ernie_model.layers import Linear, cast, silu_mul, touch, wide
from ernie_model.moe import Experts, grouped_linear
from train.parallel.fragments import whole_shape


class Factors(NamedTuple):
    """One adapter's change of one tensor: scale * B A, stacked for experts. With DoRA, the length of every row too."""

    A: Tensor  # (L, I) or (E, L, I)
    B: Tensor  # (O, L) or (E, O, L)
    scale: float
    magnitude_O: Tensor | None = None

    def rows(self, index: Index, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows of scale * B A, of the part `index` of the tensor."""
        A = self.A[index[0]] if self.A.ndim == 3 and index else self.A
        B = self.B[index] if index else self.B
        B = B[:, rows] if B.ndim == 3 else B[rows]
        return self.scale * (B.to(dtype) @ A.to(dtype))


def effective_rows(
    weight: Tensor, factors: list[Factors], index: Index = (), rows: Tensor | slice = slice(None), *, dtype: torch.dtype
) -> Tensor:
    """Rows of W + scale * B A, by definition, of the part `index` of the tensor."""
    part = weight[index] if index else weight
    total = (part[:, rows] if part.ndim == 3 else part[rows]).to(dtype)
    for one in factors:
        total = total + one.rows(index, rows, dtype)
        if one.magnitude_O is not None:
            total = total * (one.magnitude_O[rows].to(dtype) / total.norm(dim=1))[:, None]
    return total


class LoraLinear(PeftLinear):
    """peft's LoRA (or DoRA) on a Linear whose activations may be narrower than the float32 master weights."""

    TENSORS = ("weight",)
    base_layer: Linear

    def forward(self, x_TI: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_TO = self.base_layer(x_TI)
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:  # DoRA measures lengths of rows: not in bfloat16
                y_TO = self._variant(name, x_TI, y_TO)
                continue
            A_LI, B_OL = cast(self._weight("lora_A", name), x_TI), cast(self._weight("lora_B", name), x_TI)
            x_TL = F.linear(self.lora_dropout[name](x_TI), A_LI) * self.scaling[name]
            # In place: nobody needs the base layer's output alone, so it is not kept.
            y_TO = y_TO.addmm_(x_TL, B_OL.t())
        return y_TO

    def _variant(self, name: str, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        master = self._weight("lora_A", name).dtype
        variant = self.lora_variant[name]
        return variant.forward(self, active_adapter=name, x=x_TI.to(master), result=y_TO.to(master)).to(y_TO.dtype)

    def _weight(self, kind: str, adapter: str) -> Tensor:
        weight = getattr(self, kind)[adapter].weight
        assert isinstance(weight, Tensor)
        return weight

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: adapters are float32 masters whatever the frozen weight is kept in."""
        _to_masters(self, adapter_name, self.base_layer.weight, device)

    def factors(self, tensor: str) -> dict[str, Factors]:
        """What each active adapter adds to `tensor`, a parameter of the base layer."""
        return {name: self.factors_of(name, tensor) for name in self.adapters_of(tensor)}

    def adapters_of(self, tensor: str) -> list[str]:
        """None of a bias."""
        return [name for name in self.active_adapters if name in self.lora_A and tensor in self.TENSORS]

    def factors_of(self, adapter: str, tensor: str, index: Index = (), read: Read | None = None) -> Factors:
        """One adapter's.

        Args:
            index, read: of the part `index`, from values that lie elsewhere, by their names here.
        """
        kinds = [("lora_A", ()), ("lora_B", index), ("lora_magnitude_vector", index)]
        found = [
            self._weight(kind, adapter) if read is None else read(f"{kind}.{adapter}.weight", part)
            for kind, part in kinds[: 3 if adapter in self.lora_variant else 2]
        ]
        A_LI, B_OL, *dora = found
        return Factors(A_LI, B_OL, self.scaling[adapter], *dora)


class LoraExperts(nn.Module, LoraLayer):
    """LoRA on all experts of one pool, as grouped products over stacked A and B.

    The two matrices of `Experts` have a pair each: gate and up share one, as they share one tensor.
    """

    adapter_layer_names = ("lora_gate_up_A_ELD", "lora_gate_up_B_EFL", "lora_down_A_ELF", "lora_down_B_EDL")
    PAIRS = {
        "gate_up_EFD": ("lora_gate_up_A_ELD", "lora_gate_up_B_EFL"),
        "down_EDF": ("lora_down_A_ELF", "lora_down_B_EDL"),
    }
    TENSORS = tuple(PAIRS)
    base_layer: Experts

    def __init__(
        self, base_layer: Experts, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None  # two matrices of different shapes

    @property
    def num_experts(self) -> int:
        return self.base_layer.num_experts

    def update_layer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.lora_dropout or config.use_dora:  # peft has neither for stacked weights, so nobody could load it
            raise ValueError("adapters of experts have no dropout and no DoRA.")
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha  # pyright: ignore[reportArgumentType]
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        for tensor, (name_A, name_B) in self.PAIRS.items():
            weight_EOI = getattr(self.base_layer, tensor)
            experts, outputs, inputs = whole_shape(weight_EOI)
            # All experts' values are drawn, so that a rank with some of them has those that one process would have.
            A_ELI = torch.empty(experts, r, inputs)
            nn.init.uniform_(A_ELI, -(inputs**-0.5), inputs**-0.5)  # what peft gives a Linear's A
            A_ELI = A_ELI[shard_of(weight_EOI).part_of(experts)].clone()
            getattr(self, name_A)[adapter_name] = nn.Parameter(A_ELI)
            getattr(self, name_B)[adapter_name] = nn.Parameter(torch.zeros(A_ELI.shape[0], outputs, r))
        _to_masters(self, adapter_name, self.base_layer.gate_up_EFD)
        for name in self.adapter_layer_names:
            mark(getattr(self, name)[adapter_name], shard_of(self.base_layer.gate_up_EFD))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x_UD: Tensor, count_E: Tensor) -> Tensor:
        if not x_UD.shape[0]:
            return touch(x_UD, *self._weights())
        gate_UF, up_UF = self.product("gate_up_EFD", x_UD, count_E).chunk(2, dim=-1)
        return self.product("down_EDF", silu_mul(gate_UF, up_UF), count_E)

    def _weights(self) -> list[Tensor]:
        """In the order in which `forward` uses them. Frozen ones too: under ZeRO-3 all ranks fetch them together."""
        found: list[Tensor] = []
        for tensor in self.TENSORS:
            found.append(getattr(self.base_layer, tensor))
            found += [value for one in self.factors(tensor).values() for value in (one.A, one.B)]
        return found

    def product(self, tensor: str, x_UI: Tensor, count_E: Tensor) -> Tensor:
        """Rows of expert e times W[e] + scale * B[e] A[e], transposed. An expert without rows gets zero gradients."""
        y_UO = grouped_linear(x_UI, getattr(self.base_layer, tensor), count_E)
        for A_ELI, B_EOL, scale, _ in self.factors(tensor).values():
            A_ELI, B_EOL = _aligned(cast(A_ELI, x_UI), cast(B_EOL, x_UI))
            x_UL = grouped_linear(x_UI, A_ELI, count_E) * scale
            y_UO = y_UO.add_(grouped_linear(x_UL, B_EOL, count_E))
        return y_UO

    def factors(self, tensor: str) -> dict[str, Factors]:
        """What each active adapter adds to `tensor`, a parameter of the base layer."""
        return {name: self.factors_of(name, tensor) for name in self.adapters_of(tensor)}

    def adapters_of(self, tensor: str) -> list[str]:
        A = getattr(self, self.PAIRS[tensor][0])
        return [name for name in self.active_adapters if name in A]

    def factors_of(self, adapter: str, tensor: str, index: Index = (), read: Read | None = None) -> Factors:
        """One adapter's.

        Args:
            index, read: of the part `index`, from values that lie elsewhere, by their names here.
        """
        name_A, name_B = self.PAIRS[tensor]
        if read is None:
            A, B = getattr(self, name_A)[adapter], getattr(self, name_B)[adapter]
        else:
            A, B = read(f"{name_A}.{adapter}", index[:1]), read(f"{name_B}.{adapter}", index)
        return Factors(A, B, self.scaling[adapter])


def _aligned(A_ELI: Tensor, B_EOL: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped products need rows of 16 bytes. Zeros added to an odd rank change nothing but the speed."""
    padding = -A_ELI.shape[1] % (16 // A_ELI.element_size())
    return (F.pad(A_ELI, (0, 0, 0, padding)), F.pad(B_EOL, (0, padding))) if padding else (A_ELI, B_EOL)


def _to_masters(layer: LoraLayer, adapter: str, base: Tensor, device: torch.device | None = None) -> None:
    dtype = wide(base[:0]).dtype
    for name in layer.adapter_layer_names:
        values = getattr(layer, name)
        if adapter in values:
            values[adapter] = values[adapter].to(device or base.device, dtype)


class ExactLoraLinear(LoraLinear):
    """See ernie_model/exact.py."""

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = self.base_layer(x_TI)
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:
                raise ValueError("rollout.exact=true knows no DoRA (peft.use_dora). Set one of them to false.")
            x_TL = product(self.lora_dropout[name](x_TI), self._weight("lora_A", name)) * self.scaling[name]
            y_TO = y_TO + product(x_TL, self._weight("lora_B", name))
        return y_TO


class ExactLoraExperts(LoraExperts):
    """See ernie_model/exact.py."""

    def product(self, tensor: str, x_UI: Tensor, count_E: Tensor) -> Tensor:
        y_UO = grouped_product(x_UI, getattr(self.base_layer, tensor), count_E)
        for A_ELI, B_EOL, scale, _ in self.factors(tensor).values():
            y_UO = y_UO + grouped_product(grouped_product(x_UI, A_ELI, count_E) * scale, B_EOL, count_E)
        return y_UO


KINDS[LoraLinear], KINDS[LoraExperts] = ExactLoraLinear, ExactLoraExperts
ADAPTERS |= {LoraLinear, LoraExperts}
