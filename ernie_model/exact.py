"""The same numbers, bit for bit, wherever a token is computed: in a training row, in a chunk of a prompt, alone.

Sums of floating-point numbers depend on their order, and kernels choose the order by the shape of what they are given.
So everything here is computed in calls of fixed shape:

    products, means   blocks of ROWS rows, the last one padded with zeros
    experts           the rows of each expert padded to blocks of ROWS
    attention         tiles of TILE queries against blocks of TILE keys, both cut at multiples of TILE of the token's
                      place in its own sequence (a branch goes on counting where its stem ends), in order, masked

      place      0 1 2 3 | 4 5 6 7 | 8 9          training: all of it        decoding place 9: the tile (8, 9)
      tile 2     x x x x   x x x x   x x . .      . is masked                against the same blocks of keys

Gradients are those of the ordinary operators, at the values computed here. Sums over experts go one by one.

What remains to be trusted of a kernel is that a row of a product of fixed shape does not depend on its place among the
rows nor on their values, nor a matrix of a batch on the others, and that sums along a row (softmax, chunks of the
vocabulary) do not depend on the number of rows: `check_exact` tries it with the model's own weights.

Shape letters:  T tokens   D model width   N query heads   G key/value heads   H head width   P patches
                C vision width, or tokens of a tile   Z tiles   R routed rows   U rows of one pool   K experts per token
                E experts   F their width   I inputs   O outputs
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ernie_model.attention import Attention
from ernie_model.context import Packed
from ernie_model.distribution import masses
from ernie_model.layers import Linear, RMSNorm, SwiGLU, _RMSNorm, cast, silu_mul, touch, wide
from ernie_model.model import ErnieModel
from ernie_model.moe import (
    Experts,
    MoE,
    Router,
    Routing,
    _Combine,
    _rows_of_tokens,
    dispatch,
    route_local,
    sort_by_expert,
)
from ernie_model.rope import Rotation, rotate_text, rotate_vision
from ernie_model.tile_plan import TILE
from ernie_model.vision import VisionAttention

ROWS = 32
"""Of a block."""


def blocks(function: Callable[[Tensor], Tensor], x_TI: Tensor) -> Tensor:
    """`function`, which takes each row by itself, of ROWS rows at a time."""
    tokens = x_TI.shape[0]
    if not tokens:
        return function(x_TI)
    padded = F.pad(x_TI, (0, 0, 0, -tokens % ROWS)).contiguous()
    return torch.cat([function(block) for block in padded.split(ROWS)])[:tokens]


# ------------------------------------------------------------------------------------------------------------ products


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x_TI, weight_OI)
        return blocks(lambda x: F.linear(x, weight_OI, bias_O), x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TO):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad_TO @ weight_OI if needs_x else None,
            grad_TO.T @ x_TI if needs_weight else None,
            grad_TO.sum(0) if needs_bias else None,
        )


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` of weights in any dtype: (T, I) -> (T, O)."""
    bias_O = None if bias_O is None else cast(bias_O, x_TI)
    return _Product.apply(x_TI, cast(weight_OI, x_TI), bias_O)  # pyright: ignore[reportReturnType]


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_EOI, counts):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts = counts
        rows = zip(x_RI.split(counts), weight_EOI.unbind(), strict=True)
        return torch.cat([F.linear(block, weight) for x, weight in rows if x.shape[0] for block in x.split(ROWS)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_EOI) if ctx.needs_input_grad[1] else None
        at = 0
        for expert, count in enumerate(ctx.counts):
            rows, at = slice(at, at + count), at + count
            if count and grad_x is not None:
                torch.mm(grad_RO[rows], weight_EOI[expert], out=grad_x[rows])
            if count and grad_weight is not None:
                torch.mm(grad_RO[rows].T, x_RI[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """As `moe.grouped_linear`, where every count is a multiple of ROWS."""
    return _GroupedProduct.apply(x_RI, cast(weight_EOI, x_RI), count_E.tolist())  # pyright: ignore[reportReturnType]


class _Norm(_RMSNorm):
    @staticmethod
    def forward(ctx, x, weight, eps):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_wide = wide(x)
        scale = torch.rsqrt(blocks(lambda rows: rows.mean(-1, keepdim=True), x_wide.square()) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x_wide * scale).to(x.dtype) * cast(weight, x)


class _SumOfExperts(_Combine):
    @staticmethod
    def forward(ctx, y_RD, weight_TK, token_R, place_TK):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(y_RD, weight_TK, token_R, place_TK)
        each_TKD = _rows_of_tokens(y_RD, place_TK).mul_(weight_TK.to(y_RD.dtype)[..., None])
        return _one_by_one(wide(each_TKD)).to(y_RD.dtype)


def _one_by_one(x: Tensor) -> Tensor:
    """The sum over dimension 1, from the first to the last."""
    total, *others = x.unbind(1)
    for other in others:
        total = total + other
    return total


def route_exactly(
    x_TD: Tensor, routing: Routing, text: Experts, vision: Experts | None, shared: SwiGLU | None
) -> Tensor:
    """As `moe.route_local`."""
    rows = sort_by_expert(routing, text.num_experts * (1 if vision is None else 2), multiple=ROWS)
    x_RD = dispatch(x_TD, rows)
    parts = x_RD.split([rows.num_text, x_RD.shape[0] - rows.num_text])
    counts = rows.count_X.split(text.num_experts)
    y_RD = torch.cat(
        [
            experts(x, count)
            for experts, x, count in zip((text, vision), parts, counts, strict=False)
            if experts is not None and (x.shape[0] or routing.join)
        ]
    )
    y_TD = _SumOfExperts.apply(y_RD, routing.weight_TK, rows.token_R, rows.place_TK)
    assert isinstance(y_TD, Tensor)
    return y_TD if shared is None else y_TD + shared(x_TD)


# ----------------------------------------------------------------------------------------------------------- attention


@runtime_checkable
class ExactContext(Protocol):
    def attend_exactly(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor: ...


def _attend(context: object, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
    if isinstance(context, Packed):
        return _AttendPacked.apply(q_TNH, k_TGH, v_TGH, context)  # pyright: ignore[reportReturnType]
    if isinstance(context, ExactContext):
        return context.attend_exactly(q_TNH, k_TGH, v_TGH)
    raise ValueError(
        f"exact attention is for rows on one rank and for the engine's cache, not {type(context).__name__}."
    )


class _AttendPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TNH, k_TGH, v_TGH, context):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH)
        ctx.context = context
        return context.attend_exactly(q_TNH, k_TGH, v_TGH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TNH):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y_TNH = ctx.context.attend(*inputs)
            return *torch.autograd.grad(y_TNH, inputs, grad_TNH), None


# ------------------------------------------------------------------------------------------------------------- modules


class ExactLinear(Linear):
    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


class ExactRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class ExactAttention(Attention):
    def forward(self, x_TD: Tensor, rotation: Rotation, context: object) -> Tensor:
        q_TNH = rotate_text(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)), rotation)
        k_TGH = rotate_text(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)), rotation)
        v_TGH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(_attend(context, q_TNH, k_TGH, v_TGH).flatten(1))


class ExactVisionAttention(VisionAttention):
    def forward(self, x_PC: Tensor, rotation: Rotation, frames: Packed) -> Tensor:
        q_PNH, k_PNH, v_PNH = self.qkv(x_PC).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q_PNH, k_PNH = rotate_vision(q_PNH, rotation), rotate_vision(k_PNH, rotation)
        return self.proj(_attend(frames, q_PNH, k_PNH, v_PNH).flatten(1))


class ExactRouter(Router):
    def forward(self, x_TD: Tensor) -> Tensor:
        return product(x_TD, self.weight_ED)


class ExactExperts(Experts):
    def forward(self, x_UD: Tensor, count_E: Tensor) -> Tensor:
        if not x_UD.shape[0]:
            return touch(x_UD, self.gate_up_EFD, self.down_EDF)
        gate_UF, up_UF = grouped_product(x_UD, self.gate_up_EFD, count_E).chunk(2, dim=-1)
        return grouped_product(silu_mul(gate_UF, up_UF), self.down_EDF, count_E)


class ExactMoE(MoE):
    def shares(self, prob_TK: Tensor) -> Tensor:
        return prob_TK / _one_by_one(prob_TK)[:, None].clamp(min=self.norm_min)


class ExactModel(ErnieModel):
    exact = True

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return product(hidden_TD, self.head_VD)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    Linear: ExactLinear,
    RMSNorm: ExactRMSNorm,
    Attention: ExactAttention,
    VisionAttention: ExactVisionAttention,
    Router: ExactRouter,
    Experts: ExactExperts,
    MoE: ExactMoE,
    ErnieModel: ExactModel,
}
"""Modules whose computation depends on shapes, and those that take their place. Whoever adds layers with weights of
their own to the model adds them here, too (train/lora/layers.py)."""


def make_exact(model: ErnieModel) -> None:
    """From here on the model computes each token alike, whatever stands beside it; so do `Engine` and `Policy` over it.

    Weights stay what and where they are, under the same names.

    Raises:
        ValueError: a layer that cannot be exact, by name; nothing has been changed.
    """
    found = list(model.named_modules())
    for name, module in found:
        fits = type(module) in KINDS or type(module) in KINDS.values()
        own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if own and not fits and not isinstance(module, nn.Embedding) and not _inside_known(name, model):
            raise ValueError(f"{name} is a {type(module).__name__}: not known to compute alike for all shapes.")
        if isinstance(module, MoE) and module.route not in (route_local, route_exactly):
            raise ValueError(f"{name} sends tokens to other ranks: exact mode needs all experts on each rank.")
        if isinstance(module, nn.Dropout) and module.p:
            raise ValueError(f"{name} drops activations at random ({module.p}): exact mode needs lora dropout 0.")
    for _, module in found:
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(module, MoE):
            module.route = route_exactly


def _inside_known(name: str, model: nn.Module) -> bool:
    """A layer of a known adapter computes with the weights of the modules inside it."""
    parts = name.split(".")
    return any(
        type(model.get_submodule(".".join(parts[:n]))) in ADAPTERS
        or type(model.get_submodule(".".join(parts[:n]))) in [KINDS[kind] for kind in ADAPTERS]
        for n in range(1, len(parts))
    )


ADAPTERS: set[type[nn.Module]] = set()
"""Kinds that compute with weights of modules inside them."""


@torch.no_grad()
def check_exact(model: ErnieModel) -> None:
    """Try on this machine what exact mode trusts kernels with: rows of each shape of weights, in other places and
    beside others, attention beside other sequences, and all of it together on rows of text.

    Raises:
        RuntimeError: a kernel that does not keep it.
    """
    generator, dtype, device = torch.Generator().manual_seed(0), model.activation_dtype, model.norm.weight.device
    seen = set()
    for name, weight in model.named_parameters():
        for matrix in weight.flatten(0, -3) if weight.ndim > 2 else (weight,):
            own = wide(matrix).dtype if "router" in name else dtype
            if matrix.ndim != 2 or (*matrix.shape, own) in seen or name.startswith("embed_tokens") and model.lm_head:
                continue
            seen.add((*matrix.shape, own))
            x_TI = torch.randn(3 * ROWS, matrix.shape[1], generator=generator).to(device, own)
            order = torch.randperm(len(x_TI), generator=generator).to(device)
            if not torch.equal(product(x_TI, matrix)[order], product(x_TI[order], matrix)):
                raise RuntimeError(
                    f"rollout.exact=true cannot be kept on this machine: rows of a product with {name} "
                    f"{tuple(matrix.shape)} depend on their place. Set it to false."
                )
    config = model.config
    lengths = [2 * TILE + 3, 5, TILE]
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(sum(lengths), n, config.head_dim, generator=generator).to(device, dtype) for n in heads)
    alone = [
        Packed([length]).attend_exactly(*parts)
        for length, *parts in zip(lengths, *(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    if not torch.equal(torch.cat(alone), Packed(lengths).attend_exactly(q, k, v)):
        raise RuntimeError(
            "rollout.exact=true cannot be kept on this machine: batched products depend on their number. "
            "Set it to false."
        )
    text = [token for token in range(min(config.vocab_size, 1000)) if token not in config.vision_pool_token_ids]
    place_T = torch.randint(len(text), (sum(lengths),), generator=generator)
    token_T = torch.tensor(text, device=device)[place_T.to(device)]

    def masses_of(token_T: Tensor, lengths: list[int]) -> Tensor:
        position_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        hidden_TD = model(token_T, position_T.expand(3, -1), Packed(lengths), stats=False).hidden_TD
        x_TV = wide(model.logits(hidden_TD))
        return masses((x_TV - x_TV.amax(1, keepdim=True)).exp())[1]

    alone = [masses_of(part, [len(part)]) for part in token_T.split(lengths)]
    if not torch.equal(torch.cat(alone), masses_of(token_T, lengths)):
        raise RuntimeError(
            "rollout.exact=true cannot be kept on this machine: sums along a row depend on how many rows there are. "
            "Set it to false."
        )
