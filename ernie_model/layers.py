"""The small layers every part of the model uses.

Precision policy, in one place: a weight is cast to the dtype of the activations it meets, so float32 master weights can
be used by a bfloat16 forward without autocast. Statistics, softmax and rotations are computed `wide`: in float32, or
in float64 when the model is float64.

Shape letters:  T tokens   D width   F hidden width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def cast(weight: Tensor, like: Tensor) -> Tensor:
    """`weight` in the dtype of the activations; no copy when they agree."""
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, unused):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.unused = unused.shape, unused.dtype, unused.device  # ZeRO-3 takes the values away afterwards
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype, device = ctx.unused
        return grad, torch.zeros((), dtype=dtype, device=device).expand(shape) if ctx.needs_input_grad[1] else None


def touch(x: Tensor, *unused: Tensor) -> Tensor:
    """`x`, and a gradient of zero, instead of none at all, for tensors that had nothing to compute.

    Where ranks sum gradients they wait for each other parameter by parameter: every rank must have one for each,
    and all in the same order. The backward pass comes by the last one first, as if they had been used one by one.
    """
    for one in unused:
        x = _Touch.apply(x, one)  # pyright: ignore[reportAssignmentType]
    return x


class Linear(nn.Linear):
    """`nn.Linear` whose weight follows the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, cast(self.weight, input), None if self.bias is None else cast(self.bias, input))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose weight follows the dtype of its input. Vision tower and resampler only (eps 1e-6)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, cast(self.weight, input), cast(self.bias, input), self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and the number by which each row was multiplied."""
    x_wide = wide(x)
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    # The order of the casts is the reference's: round first, then multiply by the weight (reference 2.7).
    return (x_wide * scale).to(x.dtype) * cast(weight, x), scale


class _RMSNorm(torch.autograd.Function):
    """Saves the input and one number per row; the naive graph keeps three copies of the input."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normed = wide(x) * scale
        grad_wide = wide(grad)
        # y = w * n,  n = x * s,  s = (mean(x^2) + eps)^-1/2   =>   dx = s * (w*g - n * mean(w*g*n))
        grad_weight = (grad_wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        inner = grad_wide * wide(weight)
        mean = (inner * normed).mean(-1, keepdim=True)
        grad_x = inner.sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (reference 2.7)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            if x.dtype == self.weight.dtype and wide(x) is x:  # torch's own would not round before the weight
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            return _rms_norm(x, self.weight, self.eps)[0]
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up, keeping only the two inputs."""

    @staticmethod
    def forward(ctx, gate, up):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)  # in place
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The SwiGLU activation: silu(gate) * up."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return _SiluMul.apply(gate, up)  # pyright: ignore[reportReturnType]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense MLP and the shared experts."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x_TD), self.up_proj(x_TD)))
