"""Rotary positions: three-dimensional (time, height, width) for text, two-dimensional for the vision tower.

Text (reference 2.5, 2.6). Every token has a position triple. The first 44 of the 64 rotary frequencies alternate
between height and width, the last 20 belong to time; channels (2i, 2i+1) rotate together by frequency i. For text
tokens all three positions are equal, which makes this plain rotary embedding.

    ids       a  b  c [ image, 2 rows x 3 ] d
    time      0  1  2  3  3  3  3  3  3     6
    height    0  1  2  3  3  3  4  4  4     6
    width     0  1  2  3  4  5  3  4  5     6

Vision (reference 2.2). Each patch has a row and a column in its full grid; half of the angles follow the row, half the
column; channel i rotates with channel i + H/2.

Shape letters:  T tokens   P patches   N heads   H head width
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig, PositionAfterVideo
from ernie_model.layers import wide

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image (1 frame) or video, counted in patches."""


class Rotation(NamedTuple):
    cos: Tensor  # (T, H/2), float32 (float64 for a float64 model)
    sin: Tensor
    polar_T1C: Tensor | None = None
    """cos + i sin, (T, 1, H/2), where no gradient is wanted."""


def num_media_tokens(grid: Grid) -> int:
    """Tokens an image or video takes in the text: 2x2 patches make one token, and so do two frames of a video."""
    frames, rows, columns = grid
    return max(frames // 2, 1) * (rows // 2) * (columns // 2)


def check_grid(grid: Grid) -> None:
    """Raises ValueError for a grid the vision tower cannot take (reference 2.3)."""
    frames, rows, columns = grid
    if frames < 1 or rows < 2 or columns < 2 or rows % 2 or columns % 2 or (frames > 1 and frames % 2):
        raise ValueError(
            f"grid {grid} (frames, rows, columns in patches): rows and columns must be even and at least 2, and a "
            "video must have an even number of frames."
        )


def position_ids(token_T: Tensor, grids: Sequence[Grid], config: ErnieConfig) -> Tensor:
    """Position triples of one conversation, which starts at 0.

    Args:
        token_T: int64 token ids of one segment.
        grids: its images and videos, in order of appearance.

    Returns:
        (3, T) int64: time, height, width (reference 2.5).

    Raises:
        ValueError: placeholders and grids disagree.
    """
    is_media = torch.isin(token_T, torch.tensor(config.placeholder_token_ids, dtype=token_T.dtype)).tolist()
    pieces: list[Tensor] = []
    position, at, length = 0, 0, len(is_media)
    queue = list(grids)
    while at < length:
        if not is_media[at]:
            stop = at
            while stop < length and not is_media[stop]:
                stop += 1
            pieces.append(torch.arange(position, position + stop - at).expand(3, -1))
            position, at = position + stop - at, stop
            continue
        if not queue:
            raise ValueError(f"token {at} is a media placeholder, but all {len(grids)} images and videos are used up.")
        grid = queue.pop(0)
        check_grid(grid)
        count = num_media_tokens(grid)
        if at + count > length or not all(is_media[at : at + count]):
            raise ValueError(
                f"the item with grid {grid} needs {count} placeholders from token {at} on; there are fewer."
            )
        frames, rows, columns = max(grid[0] // 2, 1), grid[1] // 2, grid[2] // 2
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        pieces.append(torch.stack(axes).flatten(1) + position)
        longest = max(rows, columns)
        if config.position_after_video is PositionAfterVideo.LAST:
            longest = max(longest, frames)
        position, at = position + longest, at + count
    if queue:
        raise ValueError(f"{len(queue)} of {len(grids)} images and videos have no placeholder in the text.")
    return torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.int64)


def text_rotation(position_3T: Tensor, config: ErnieConfig, *, dtype: torch.dtype) -> Rotation:
    """Angles of every token; `dtype` is the model's, and decides between float32 and float64."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    frequency, axis = _frequencies(
        config.head_dim, config.rope_theta, config.mrope_section, compute, str(position_3T.device)
    )
    if axis is None:
        angle = position_3T[0].to(compute)[:, None] * frequency
    else:
        angle = position_3T.t().to(compute).index_select(1, axis) * frequency
    cos, sin = angle.cos(), angle.sin()
    return Rotation(cos, sin, None if torch.is_grad_enabled() else torch.complex(cos, sin)[:, None])


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _frequencies(
    head_dim: int, theta: float, section: tuple[int, int, int] | None, compute: torch.dtype, device: str
) -> tuple[Tensor, Tensor | None]:
    """Frequencies of the H/2 pairs, and which of time, height and width each of them follows (None: all time)."""
    steps = torch.arange(0, head_dim, 2, dtype=compute, device=device)
    frequency = 1.0 / (theta ** (steps / head_dim))
    if section is None:
        return frequency, None
    index = torch.arange(head_dim // 2, device=device)
    spatial = index < section[0] + section[1]
    # frequency i follows height (even i) or width (odd i) among the first, time among the last
    return frequency, torch.where(spatial, torch.where(index % 2 == 0, 1, 2), 0)


def vision_rotation(grids: Sequence[Grid], head_dim: int, *, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Angles of every patch, in merge-block order, the same for all frames of an item."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    spatial = head_dim // 2
    steps = torch.arange(0, spatial, 2, dtype=compute)
    frequency = 1.0 / (10000.0 ** (steps / spatial))
    angles = []
    for frames, rows, columns in grids:
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns)[None, :].expand(rows, columns)
        place = torch.stack((row, column), dim=-1)
        # (rows, columns) -> 2x2 blocks, row by row of blocks, row by row inside a block
        place = place.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2).to(compute)
        angle = (place[:, :, None] * frequency).flatten(1)
        angles.append(angle.repeat(frames, 1))
    angle = torch.cat(angles).to(device)
    return Rotation(angle.cos(), angle.sin())


class _RotatePairs(torch.autograd.Function):
    """Rotates channels (2i, 2i+1). A rotation's gradient is the opposite rotation, so nothing but angles is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate_pairs(grad, cos, -sin), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, torch.complex(cos, sin)[:, None])


def _turn(x: Tensor, polar_T1C: Tensor) -> Tensor:
    # (x0 + i x1)(cos + i sin) is the rotation of the pair, in one pass over memory
    pairs = torch.view_as_complex(wide(x).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * polar_T1C).flatten(-2).to(x.dtype)


def rotate_text(x_TNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate adjacent channel pairs (2i, 2i+1); in float32, result in the dtype of `x_TNH` (reference 2.6)."""
    if rotation.polar_T1C is not None:
        return _turn(x_TNH, rotation.polar_T1C)
    return _RotatePairs.apply(x_TNH, rotation.cos, rotation.sin)  # pyright: ignore[reportReturnType]


def rotate_vision(x_PNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate channels i and i + H/2; in float32, result in the dtype of `x_PNH` (reference 2.2)."""
    first, second = wide(x_PNH).chunk(2, dim=-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_PNH.dtype)
