"""Resampler: 2x2 patches become one token, and so do two frames of a video (reference 2.3).

Shape letters:  P patches   C vision width   Q = P/4 merged patches   M media tokens   D text width
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie_model.config import ErnieConfig
from ernie_model.layers import LayerNorm, Linear, RMSNorm
from ernie_model.rope import Grid


class ResamplerMLP(nn.Module):
    """LayerNorm(fc2(gelu(fc1(x)))), exact gelu."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc1 = Linear(inputs, outputs)
        self.fc2 = Linear(outputs, outputs)
        self.ln = LayerNorm(outputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.fc2(F.gelu(self.fc1(x))))


class Resampler(nn.Module):
    def __init__(self, config: ErnieConfig):
        super().__init__()
        assert config.vision is not None
        merged = config.vision.hidden_size * config.vision.spatial_merge_size**2
        self.spatial_linear = ResamplerMLP(merged, merged)
        self.temporal_linear = ResamplerMLP(2 * merged, merged)
        self.mlp = Linear(merged, config.hidden_size)
        self.after_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(P, C) -> (M, D), items in order."""
        # Patches come in merge-block order: four consecutive rows are one 2x2 block.
        x_QC = self.spatial_linear(x_PC.reshape(x_PC.shape[0] // 4, -1))
        return self.after_norm(self.mlp(self.temporal_linear(_pair_frames(x_QC, grids))))


def _pair_frames(x_QC: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Concatenate frames 2i and 2i+1 of a video; an image is its own partner."""
    if all(frames == 1 for frames, _, _ in grids):
        return torch.cat((x_QC, x_QC), dim=-1)
    pairs = []
    for item, (frames, rows, columns) in zip(x_QC.split([t * h * w // 4 for t, h, w in grids]), grids, strict=True):
        per_frame = item.unflatten(0, (frames, rows * columns // 4))
        first, second = (per_frame, per_frame) if frames == 1 else (per_frame[0::2], per_frame[1::2])
        pairs.append(torch.cat((first, second), dim=-1).flatten(0, 1))
    return torch.cat(pairs)
