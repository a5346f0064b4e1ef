"""Image file -> RGB picture -> rows of normalised patches.

    load_image("scan.png")           decode, turn upright, drop transparency          PIL image, RGB
    image_patches(image, settings)   resize, normalise, cut into 14x14 patches        patch_PX, grid (1, h, w)

The size is chosen so that both sides are multiples of 28 = patch 14 x merge 2 and the area stays within limits; the
pixels equal those of transformers' PIL back-end. Rows of `patch_PX` are in merge-block order: the four patches that
the resampler merges into one token are neighbours.

      columns ->   0  1  2  3            rows of patch_PX, for a grid of 2 x 4 patches:
      row 0        a  b  e  f            a b c d e f g h
      row 1        c  d  g  h            |token 0|token 1|

Source: reference 2.1, 4.1, 4.2.

Shape letters:  P patches   X numbers in a patch (channel, y, x)   H W pixels
"""

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

if TYPE_CHECKING:  # it imports torch, which the process of a tool has no use for
    from ernie_model.rope import Grid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


class MediaError(Exception):
    """An image or video that cannot be honoured.

    Attributes:
        file: path, or a description such as "image 2 of message 3" for media that never was a file.
        problem: what is wrong with it.
    """

    def __init__(self, file: str | Path, problem: str | None = None):
        """Also takes one text, "file: problem"."""
        if problem is None:
            file, _, problem = str(file).partition(": ")
        super().__init__(str(file), problem)
        self.file = str(file)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" if self.problem else self.file


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """How a picture, or one frame of a video, becomes patches."""

    min_pixels: int
    """Smallest area after resizing, in pixels."""
    max_pixels: int
    """Largest area after resizing, in pixels."""
    patch_size: int = 14
    merge_size: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels ({self.min_pixels}) must be above 0 and at most max_pixels ({self.max_pixels})."
            )
        if self.max_pixels < self.factor**2:
            raise ValueError(
                f"max_pixels ({self.max_pixels}) is smaller than one token, which covers {self.factor} x {self.factor} "
                f"pixels; use at least {self.factor**2}."
            )

    @property
    def factor(self) -> int:
        """Pixels along the side of one token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True)
class ImageSettings(PixelSettings):
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 6177 * 28 * 28


@dataclass(frozen=True)
class ImageSize:
    """Stands for a picture where only its size matters: it takes as many tokens, and has no pixels."""

    width: int
    height: int
    filename: str = ""
    """What errors call the picture."""


@dataclass(frozen=True)
class KnownGrid:
    """Stands for an image or a video that has been cut already: it takes as many tokens, and has no pixels."""

    grid: "Grid"
    filename: str = ""


# ----------------------------------------------------------------------------------------------------------- decoding


def reason(error: Exception) -> str:
    """What a decoder says, without the place in memory of the bytes that it read."""
    return f"{type(error).__name__}: {error}".partition(" <_io.")[0]


def load_image(source: Image.Image | str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decode an image to an upright RGB picture.

    The orientation that a camera notes in EXIF is applied, so the model sees what a person sees in a viewer (and boxes
    drawn in a viewer fit). Transparent parts become white. 16-bit images keep their upper 8 bits. Of an animation, the
    first frame counts.

    Args:
        source: a picture, which is returned itself where nothing needs to be done; a path; the bytes of a file.
        name: what to call it in errors; default the path.

    Raises:
        MediaError: missing, empty, truncated, not an image, or so large that it is refused as a decompression bomb.
    """
    if isinstance(source, Image.Image):
        name = name or str(getattr(source, "filename", "") or "image")
    elif isinstance(source, bytes):
        name = name or "image"
    else:
        name = name or str(source)
        path = Path(source)
        if not path.is_file():
            raise MediaError(name, "there is no such file.")
        if path.stat().st_size == 0:
            raise MediaError(name, "the file is empty (0 bytes).")
    try:
        if isinstance(source, Image.Image):
            upright = source.getexif().get(ExifTags.Base.Orientation, 1) == 1
            in_memory = type(source) is Image.Image  # not a file that somebody is going to close
            return _to_rgb(source if upright and in_memory else ImageOps.exif_transpose(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # decoders meet hostile bytes: OSError, SyntaxError, ValueError, struct.error, ...
        raise MediaError(name, f"cannot be decoded as an image ({reason(error)}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ValueError(f"the picture has {image.width} x {image.height} pixels")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # 16-bit grey; PIL's own conversion clips everything above 255 to white
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image, dtype=np.float64))).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(value_HW: np.ndarray) -> np.ndarray:
    """Grey values of unknown range: 0..1, 0..255 or 0..65535, told apart by the largest one."""
    largest = float(np.nanmax(value_HW))
    scale = 255.0 if largest <= 1.0 else 1.0 if largest <= 255.0 else 255.0 / 65535.0
    return np.clip(np.nan_to_num(value_HW) * scale, 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- size and patches


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width after resizing: multiples of `factor`, area within limits, shape nearly kept (reference 4.1).

    Halves round to the even multiple (Python's `round`): 42 / 28 = 1.5 becomes 2, 70 / 28 = 2.5 becomes 2.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"the picture has {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other. "
            "Crop it, or leave it out."
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resized_size(image: Image.Image | ImageSize, settings: PixelSettings, name: str) -> tuple[int, int]:
    """(height, width) of `image` after resizing.

    Raises:
        MediaError: the picture is too long and thin.
    """
    try:
        return smart_resize(
            image.height,
            image.width,
            factor=settings.factor,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
        )
    except ValueError as error:
        raise MediaError(name, str(error)) from error


def image_patches(image: Image.Image, settings: PixelSettings, name: str = "image") -> tuple[np.ndarray, "Grid"]:
    """Patches of one RGB picture.

    Returns:
        patch_PX float32 in merge-block order, and the grid (1, rows, columns).

    Raises:
        MediaError: the picture is too long and thin.
    """
    height, width = resized_size(image, settings, name)
    patch_PX = picture_patches(image, height, width, settings)
    return patch_PX, (1, height // settings.patch_size, width // settings.patch_size)


def picture_patches(image: Image.Image, height: int, width: int, settings: PixelSettings) -> np.ndarray:
    """Resize an RGB picture to `height` x `width` and cut it: float32 (P, X) in merge-block order."""
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    patch_P3Y = _cut(np.asarray(resized), settings.patch_size, settings.merge_size)
    # Pixels are one of 256 values, so normalisation is a look-up: exact, and the float work is 768 numbers per process.
    table_3 = _normalised(settings.mean, settings.std)
    out_P3Y = np.empty(patch_P3Y.shape, dtype=np.float32)
    for channel in range(3):
        out_P3Y[:, channel] = table_3[channel][patch_P3Y[:, channel]]
    return out_P3Y.reshape(len(out_P3Y), -1)


def _cut(pixel_HW3: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """(H, W, 3) -> (P, 3, patch * patch): block row, block column, row and column in the block; channel, y, x."""
    height, width, _ = pixel_HW3.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    split = pixel_HW3.reshape(rows, merge, patch, columns, merge, patch, 3)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * merge * merge, 3, patch * patch)


def pictures(patch_PX: np.ndarray, grid: "Grid", settings: PixelSettings) -> list[Image.Image]:
    """The frames that patches were cut from, as the model sees them: the inverse of `picture_patches`, pixel by pixel.

    Args:
        patch_PX: the patches of one image or video, in merge-block order.
        grid: its (frames, rows, columns) in patches.
    """
    frames, rows, columns = grid
    patch, merge = settings.patch_size, settings.merge_size
    unit_PX = patch_PX.reshape(-1, 3, patch * patch) * np.asarray(settings.std, dtype=np.float32)[:, None]
    pixel_PX = np.clip(np.rint((unit_PX + np.asarray(settings.mean, dtype=np.float32)[:, None]) * 255), 0, 255).astype(
        np.uint8
    )
    split = pixel_PX.reshape(frames, rows // merge, columns // merge, merge, merge, 3, patch, patch)
    pixel_NHW3 = split.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(frames, rows * patch, columns * patch, 3)
    return [Image.fromarray(pixel_HW3) for pixel_HW3 in pixel_NHW3]


@lru_cache
def _normalised(mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """(3, 256) float32: the normalised value of every pixel value, rounded exactly where transformers rounds."""
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return np.stack([(unit - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
