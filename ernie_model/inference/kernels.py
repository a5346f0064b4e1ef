"""Which kernels answer: the same model over the same parameters, with other ways to multiply few rows on a CPU.

    training             Linear          MoE.route = route_local        one for all numbers of rows
    answering (CPU)      PackedLinear    MoE.route = route_few          the product that reads the weights fastest

Writing an answer reads every weight for a few rows, so a product is as fast as its weights arrive. In float32, the
library behind `F.linear` reads a matrix that is not in a cache at 7 GB/s where the memory gives 25. What reaches more:

    1 row           batched product of the matrix in two halves             1.4 to 2.4 times as fast
    2, 3 rows       the transposed product W x^T                            1.3 to 4 times
    from 4 rows     oneDNN with the weight in its own layout, a copy        1.3 to 2 times (bfloat16: from 1 row)

(`tests.bench.products` prints the table.) `answering` builds a second tree of modules: where it changes nothing it
shares modules' parameters, buffers and hooks, so the model that trains is left alone and never meets a stale copy.

Shape letters:  T tokens   I inputs   O outputs   D model width   E experts of a pool   K experts per token
                U rows of one pool, expert by expert
"""

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie_model.attention import Attention, Context
from ernie_model.layers import Linear, RMSNorm, SwiGLU, cast, silu_mul
from ernie_model.model import ErnieModel
from ernie_model.moe import Experts, MoE, Routing, route_local
from ernie_model.rope import Rotation, rotate_text

NARROW = 512
"""Inputs up to which the transposed product is the fastest for 4 to 8 rows of a plain matrix."""
FEW = 16
"""Rows per expert up to which each expert multiplies on its own; above, one grouped product is as fast."""


def multiply(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T on a CPU, for few rows and a contiguous weight that comes from memory."""
    rows, inputs = x_TI.shape
    if x_TI.dtype == torch.float32:
        if rows == 1 and weight_OI.shape[0] % 2 == 0:
            # These strides, said outright: with others that mean the same, the library takes a seventh of the speed.
            x_2I1 = x_TI.contiguous().as_strided((2, inputs, 1), (0, 1, inputs))
            return torch.bmm(weight_OI.view(2, -1, inputs), x_2I1).view(1, -1)
        if 1 < rows <= (8 if inputs <= NARROW else 3):
            return torch.mm(weight_OI, x_TI.t()).t()
    return F.linear(x_TI, weight_OI)


# --------------------------------------------------------------------------------------------------------- dense layers


@lru_cache(maxsize=1)
def can_pack() -> bool:
    """Whether this torch has oneDNN's products with packed weights. They are not part of its public interface."""
    try:
        weight = torch.ones(2, 2)
        return torch.equal(_linear_packed(weight, _pack(weight)), torch.full((2, 2), 2.0))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _packs(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and can_pack()


def _pack(weight_OI: Tensor) -> Tensor:
    # The number of rows is a hint; what it chooses from 4 on serves any number.
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 32)


def _linear_packed(x_TI: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_TI, packed, None, "none", [], "")


class PackedWeight:
    """A weight, and a copy of it as oneDNN reads it."""

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype):
        self.weight_OI = weight_OI.detach()
        self.packed = _pack(self.weight_OI.to(dtype)) if _packs(dtype) else None
        self.least = 4 if dtype == torch.float32 else 1

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.packed is not None and x_TI.shape[0] >= self.least:
            return _linear_packed(x_TI.contiguous(), self.packed)
        return multiply(x_TI, cast(self.weight_OI, x_TI))


class _Plain(nn.Module):
    """A module without hooks: calling it costs no more than calling its `forward`."""

    def __call__(self, *arguments: Any) -> Any:
        return self.forward(*arguments)


class PackedLinear(_Plain):
    def __init__(self, linear: Linear, dtype: torch.dtype):
        super().__init__()
        self.product, self.bias = PackedWeight(linear.weight, dtype), linear.bias

    def forward(self, input: Tensor) -> Tensor:
        y = self.product(input)
        return y if self.bias is None else y + cast(self.bias, y)


class PackedEmbedding(_Plain):
    """The embedding where it is the head as well: rows by token id, and `project`."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype):
        super().__init__()
        self.weight, self.product = embedding.weight, PackedWeight(embedding.weight, dtype)

    def forward(self, token_T: Tensor) -> Tensor:
        return F.embedding(token_T, self.weight)

    def project(self, x_TD: Tensor) -> Tensor:
        return self.product(x_TD)


class FastNorm(_Plain):
    """`RMSNorm` in float32 by four operators: x * (w * sqrt(D)) / hypot(|x|, sqrt(D * eps))."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight, width = norm.weight, norm.weight.shape[0]
        self.scaled_D = norm.weight.detach() * math.sqrt(width)
        self.least = torch.full((1, 1), math.sqrt(width * norm.eps), dtype=norm.weight.dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        return (x_TD / length_T1.hypot_(self.least)).mul_(self.scaled_D)


class FusedAttention(_Plain):
    """`Attention` with one product for queries, keys and values, and one rotation."""

    def __init__(self, attention: Attention, dtype: torch.dtype):
        super().__init__()
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        weight_OI = torch.cat([part.weight.detach() for part in parts])
        bias = [part.bias.detach() for part in parts if part.bias is not None]
        self.product, self.bias = PackedWeight(weight_OI, dtype), torch.cat(bias) if bias else None
        self.head_dim = attention.head_dim
        self.sizes = [part.out_features // attention.head_dim for part in parts]
        self.o_proj = PackedLinear(attention.o_proj, dtype)

    def forward(self, x_TD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        qkv = self.product(x_TD)
        qkv = qkv if self.bias is None else qkv + cast(self.bias, qkv)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        turned, v_TGH = qkv.split([self.sizes[0] + self.sizes[1], self.sizes[2]], dim=1)
        q_TNH, k_TGH = rotate_text(turned, rotation).split(self.sizes[:2], dim=1)
        return self.o_proj(context.attend(q_TNH, k_TGH, v_TGH).flatten(1))


# -------------------------------------------------------------------------------------------------------------- experts


def route_few(x_TD: Tensor, routing: Routing, text: Experts, vision: Experts | None, shared: SwiGLU | None) -> Tensor:
    """`moe.route_local` where experts get few rows each: one product per expert that has any, nothing padded."""
    tokens, choices = routing.expert_TK.shape
    if tokens * choices > FEW * text.num_experts:
        return route_local(x_TD, routing, text, vision, shared)
    expert_R = routing.expert_TK.flatten().tolist()
    if tokens == 1:  # every choice is a row, in its order
        own = text if expert_R[0] < text.num_experts else vision
        assert own is not None
        y_KD = _each(x_TD.repeat(choices, 1), own, [(expert % text.num_experts, 1) for expert in expert_R])
        y_TD = routing.weight_TK.to(y_KD.dtype) @ y_KD
        return y_TD if shared is None else y_TD + shared(x_TD)
    order = sorted(range(len(expert_R)), key=expert_R.__getitem__)
    token_R = [row // choices for row in order]
    groups = [(expert, len(list(rows))) for expert, rows in groupby(expert_R[row] for row in order)]
    num_text = sum(count for expert, count in groups if expert < text.num_experts)
    x_RD = x_TD.index_select(0, torch.tensor(token_R))
    parts = []
    if num_text:
        parts.append(_each(x_RD[:num_text], text, [g for g in groups if g[0] < text.num_experts]))
    if num_text < len(order):
        assert vision is not None
        first = text.num_experts
        parts.append(_each(x_RD[num_text:], vision, [(e - first, count) for e, count in groups if e >= first]))
    y_RD = parts[0] if len(parts) == 1 else torch.cat(parts)
    place = [0] * len(order)
    for at, row in enumerate(order):
        place[row] = at
    y_TKD = y_RD.index_select(0, torch.tensor(place)).view(tokens, choices, -1)
    y_TD = torch.bmm(routing.weight_TK.to(y_TKD.dtype)[:, None], y_TKD)[:, 0]
    return y_TD if shared is None else y_TD + shared(x_TD)


def _each(x_UD: Tensor, experts: Experts, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of the experts (number, rows), in this order."""
    counts = [count for _, count in groups]
    gate_up_EFD, down_EDF = cast(experts.gate_up_EFD, x_UD), cast(experts.down_EDF, x_UD)
    rows = zip(groups, x_UD.split(counts), strict=True)
    hidden = torch.cat([multiply(x, gate_up_EFD[expert]) for (expert, _), x in rows])
    rows = zip(groups, silu_mul(*hidden.chunk(2, dim=-1)).split(counts), strict=True)
    return torch.cat([multiply(x, down_EDF[expert]) for (expert, _), x in rows])


# --------------------------------------------------------------------------------------------------------- whole models


def answering(model: ErnieModel) -> ErnieModel:
    """`model` as it answers fastest: modules of its own over the same parameters. On a GPU, the model itself.

    Copies of dense weights (`copied_bytes`) are made now: after the weights have changed, call it again.
    """
    if model.norm.weight.device.type != "cpu":
        return model
    other = _answering(model, model.activation_dtype)
    assert isinstance(other, ErnieModel)
    return other


def copied_bytes(model: ErnieModel) -> int:
    """Memory of the copies that `answering` makes: dense weights once in oneDNN's layout, and queries, keys and values
    once more as one matrix."""
    if model.norm.weight.device.type != "cpu":
        return 0
    dtype, modules = model.activation_dtype, list(model.modules())
    dense = [m for m in modules if type(m) is Linear] + ([model.embed_tokens] if _embeds_and_heads(model) else [])
    fused = [p for m in modules if isinstance(m, Attention) and _fuses(m) for p in (m.q_proj, m.k_proj, m.v_proj)]
    packed = sum(m.weight.numel() for m in dense) * dtype.itemsize * _packs(dtype)
    return packed + sum(part.weight.nbytes for part in fused)


def _answering(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if type(module) is Linear:
        return PackedLinear(module, dtype)
    if isinstance(module, Attention) and _fuses(module):
        return FusedAttention(module, dtype)
    if type(module) is RMSNorm and dtype == module.weight.dtype and dtype in (torch.float32, torch.float64):
        return FastNorm(module)
    other = copy.copy(module)
    other._modules = {name: None if m is None else _answering(m, dtype) for name, m in module._modules.items()}
    if isinstance(module, ErnieModel) and _embeds_and_heads(module):
        other._modules["embed_tokens"] = PackedEmbedding(module.embed_tokens, dtype)
    # nn.Module finds its children by a slow path, unless they are attributes like any other.
    other.__dict__ |= {name: value for kind in (other._modules, other._parameters) for name, value in kind.items()}
    if isinstance(other, MoE) and other.route is route_local and all(type(e) is Experts for e in _experts(other)):
        other.route = route_few
    return other


def _fuses(attention: Attention) -> bool:
    return type(attention) is Attention and all(type(m) is Linear for m in attention.children())


def _embeds_and_heads(model: ErnieModel) -> bool:
    return model.lm_head is None and type(model.embed_tokens) is nn.Embedding


def _experts(moe: MoE) -> list[nn.Module]:
    return [pool.experts for pool in (moe.text, moe.vision) if pool is not None]
