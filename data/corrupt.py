"""Pictures made hard to read: what an answer that was looked up in the picture should then be less likely for.

    crop     a random 0 to 20 % of the picture, enlarged to its size      mDPO (arXiv 2406.11839); its own choice
    noise    every pixel at random
    blank    one grey

The size stays, so the conversation keeps its tokens and positions, and only pixels change. All frames of a video are
cropped alike. What is drawn depends on the record's id and the place of the picture in it alone.

Shape letters:  P patches   X numbers in a patch
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from ernie_model.images import PixelSettings, picture_patches, pictures
from ernie_model.processor import Processor
from ernie_model.rope import Grid


class Corrupt(Enum):
    """How a picture is made hard to read."""

    CROP = "crop"
    NOISE = "noise"
    BLANK = "blank"


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Raises DataError unless 0 <= keep_min <= keep_max <= 1."""

    kind: Corrupt = Corrupt.CROP
    keep_min: float = 0.0
    """Shares of the picture's area that a crop keeps; each is drawn evenly from keep_min to keep_max."""
    keep_max: float = 0.2

    def __post_init__(self):
        if not 0 <= self.keep_min <= self.keep_max <= 1:
            raise DataError(
                f"a corrupted picture keeps {self.keep_min} to {self.keep_max} of its area; 0 <= keep_min <= keep_max "
                "<= 1 must hold."
            )


def corrupted(
    patch_PX: Tensor, grids: Sequence[Grid], processor: Processor, corruption: Corruption, record: str
) -> Tensor:
    """The patches of other pictures of the same sizes. `record`: the id that fixes what is drawn."""
    out: list[np.ndarray] = []
    start = 0
    for number, grid in enumerate(grids):
        size = grid[0] * grid[1] * grid[2]
        seed = hashlib.blake2b(f"{number} {record}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        settings = processor.image if grid[0] == 1 else processor.video
        frames = pictures(patch_PX[start : start + size].numpy(), grid, settings)
        out += _frames(frames, corruption, rng, settings)
        start += size
    assert start == len(patch_PX), f"{record}: {len(patch_PX)} patches, and its grids have {start}"
    return torch.from_numpy(np.concatenate(out))


def _frames(
    frames: Sequence[Image.Image], corruption: Corruption, rng: np.random.Generator, settings: PixelSettings
) -> list[np.ndarray]:
    width, height = frames[0].size
    box = crop_box(width, height, rng.uniform(corruption.keep_min, corruption.keep_max), rng)
    out = []
    for frame in frames:
        if corruption.kind is Corrupt.CROP:
            frame = frame.crop(box)
        elif corruption.kind is Corrupt.NOISE:
            frame = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        else:
            frame = Image.new("RGB", (width, height), (128, 128, 128))
        out.append(picture_patches(frame, height, width, settings))
    return out


def crop_box(width: int, height: int, keep: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of the picture's shape, at a random place, with at most `keep` of its area.

    At least one pixel is kept: a picture cannot be of none.
    """
    side = math.sqrt(keep)
    crop_width, crop_height = max(1, math.floor(width * side)), max(1, math.floor(height * side))
    left = int(rng.integers(0, width - crop_width + 1))
    top = int(rng.integers(0, height - crop_height + 1))
    return left, top, left + crop_width, top + crop_height
