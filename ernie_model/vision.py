"""Vision tower: patches -> one feature per patch (reference 2.2).

Every frame of every image and video is attended to on its own; time enters only later, in the resampler and in the
text positions.

Shape letters:  P patches   X numbers in a patch   C vision width   N heads   H head width
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ernie_model.config import VisionConfig
from ernie_model.context import Packed
from ernie_model.layers import LayerNorm, Linear
from ernie_model.recompute import Runner, keep_activations
from ernie_model.rope import Grid, Rotation, rotate_vision, vision_rotation


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)  # all queries, all keys, all values
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PC: Tensor, rotation: Rotation, frames: Packed) -> Tensor:
        q_PNH, k_PNH, v_PNH = self.qkv(x_PC).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q_PNH, k_PNH = rotate_vision(q_PNH, rotation), rotate_vision(k_PNH, rotation)
        return self.proj(frames.attend(q_PNH, k_PNH, v_PNH).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x_PC)))


class _QuickGelu(torch.autograd.Function):
    """Keeps the input only."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return torch.sigmoid(1.702 * x).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        # x * s(ax)  ->  s + a x s (1 - s), and silu'(y) = s + y s (1 - s) at y = ax is the same expression
        scaled = 1.702 * x
        return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=scaled)  # in place


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return _QuickGelu.apply(x)  # pyright: ignore[reportReturnType]


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_PC: Tensor, rotation: Rotation, frames: Packed) -> Tensor:
        x_PC = x_PC + self.attn(self.norm1(x_PC), rotation, frames)
        return x_PC + self.mlp(self.norm2(x_PC))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.ln = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.run_block: Runner = keep_activations  # the seam: what blocks keep for the backward pass (recompute.py)

    def forward(self, patch_PX: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(P, X) pixels in merge-block order -> (P, C) features."""
        x_PC = self.patch_embed(patch_PX)
        rotation = vision_rotation(grids, self.config.head_dim, dtype=x_PC.dtype, device=x_PC.device)
        frames = Packed([h * w for t, h, w in grids for _ in range(t)], causal=False)
        for block in self.blocks:
            x_PC = self.run_block(block, x_PC, rotation, frames)
        return self.ln(x_PC)
