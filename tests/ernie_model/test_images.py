"""Sizes, pixels, decoding, and the one error for pictures that cannot be honoured."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_model.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImageSettings,
    MediaError,
    image_patches,
    load_image,
    picture_patches,
    pictures,
    smart_resize,
)
from ernie_model.video import VideoSettings

IMAGE_LIMITS = (3136, 4842768)
FRAME_LIMITS = (234416, 937664)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(height, width))


# --------------------------------------------------------------------------------------------------------------- size

# Height x width -> image size and tokens, frame size and tokens per frame pair: the table of reference 4.1.
SIZES = {
    (14, 14): ((56, 56), 4, (504, 504), 324),
    (28, 28): ((56, 56), 4, (504, 504), 324),
    (50, 50): ((56, 56), 4, (504, 504), 324),
    (42, 70): ((56, 56), 4, (392, 644), 322),
    (100, 100): ((112, 112), 16, (504, 504), 324),
    (224, 224): ((224, 224), 64, (504, 504), 324),
    (480, 640): ((476, 644), 391, (476, 644), 391),
    (1080, 1920): ((1092, 1932), 2691, (700, 1288), 1150),
    (2160, 3840): ((1624, 2912), 6032, (700, 1288), 1150),
    (4000, 3000): ((2520, 1904), 6120, (1092, 812), 1131),
    (10, 1990): ((28, 812), 29, (56, 6832), 488),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_the_reference(size):
    image_size, image_tokens, frame_size, frame_tokens = SIZES[size]
    for wanted, tokens, (low, high) in (
        (image_size, image_tokens, IMAGE_LIMITS),
        (frame_size, frame_tokens, FRAME_LIMITS),
    ):
        assert smart_resize(*size, factor=28, min_pixels=low, max_pixels=high) == wanted
        assert wanted[0] * wanted[1] // 784 == tokens


def test_the_limits_are_the_defaults():
    image, video = ImageSettings(), VideoSettings()
    assert (image.min_pixels, image.max_pixels) == IMAGE_LIMITS
    assert (video.min_pixels, video.max_pixels) == FRAME_LIMITS


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([IMAGE_LIMITS, FRAME_LIMITS]))
def test_sizes_equal_transformers(height, width, limits):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import smart_resize as theirs

    low, high = limits
    try:
        wanted = theirs(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(ValueError, match="at most 200 times"):
            smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
    else:
        assert smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == wanted


def test_two_hundred_to_one_is_allowed_and_more_is_not():
    settings = ImageSettings()
    assert image_patches(picture(1, 200), settings)[1][0] == 1
    with pytest.raises(MediaError, match=r"strip\.png: the picture has 201 x 1 pixels.*200 times") as caught:
        image_patches(picture(1, 201), settings, "strip.png")
    assert caught.value.file == "strip.png"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(min_pixels=0), "min_pixels"),
        (dict(min_pixels=5000, max_pixels=4000), "at most max_pixels"),
        (dict(min_pixels=1, max_pixels=783), "smaller than one token"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        ImageSettings(**options)


# ------------------------------------------------------------------------------------------------------------- pixels


def test_patches_are_in_merge_block_order_and_channel_major():
    """2 x 4 patches painted a..h; the four patches of a token are neighbours (reference 2.1)."""
    painted = np.array([["a", "b", "e", "f"], ["c", "d", "g", "h"]])
    value = {letter: 10 * (i + 1) for i, letter in enumerate("abcdefgh")}
    pixel_HW = np.vectorize(value.get)(painted).repeat(14, axis=0).repeat(14, axis=1).astype(np.uint8)
    pixel_HW3 = np.stack([pixel_HW, pixel_HW + 1, pixel_HW + 2], axis=-1)
    pixel_HW3[0, 1] = (200, 201, 202)  # patch a, y = 0, x = 1
    patch_PX, grid = image_patches(Image.fromarray(pixel_HW3), ImageSettings(min_pixels=784))
    assert grid == (1, 2, 4)
    assert patch_PX.shape == (8, 588)
    back_P3YX = patch_PX.reshape(8, 3, 14, 14) * np.reshape(CLIP_STD, (3, 1, 1)) + np.reshape(CLIP_MEAN, (3, 1, 1))
    back_P3YX = np.round(back_P3YX * 255).astype(int)
    for patch, letter in enumerate("abcdefgh"):
        for channel in range(3):
            assert back_P3YX[patch, channel, 13, 13] == value[letter] + channel
    assert back_P3YX[0, :, 0, 1].tolist() == [200, 201, 202]
    assert back_P3YX[0, 0, 1, 0] == value["a"]


def test_one_pixel_by_hand():
    """(100 / 255 - 0.48145466) / 0.26862954 = -0.33242..."""
    grey = Image.new("RGB", (56, 56), (100, 100, 100))
    patch_PX, _ = image_patches(grey, ImageSettings())
    np.testing.assert_allclose(patch_PX[0, 0], (100 / 255 - 0.48145466) / 0.26862954, rtol=1e-6)
    np.testing.assert_allclose(patch_PX[0, 587], (100 / 255 - 0.40821073) / 0.27577711, rtol=1e-6)


@pytest.mark.parametrize("size", [(56, 56), (100, 100), (37, 300), (480, 640), (2100, 2400), (42, 70)])
def test_pixels_equal_transformers(size):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    image = picture(*size)
    theirs = Ernie4_5_VLMoeImageProcessorPil()(images=[image], return_tensors="np")
    patch_PX, grid = image_patches(image, ImageSettings())
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert patch_PX.dtype == np.float32
    np.testing.assert_allclose(patch_PX, theirs["pixel_values"], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- decoding


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_a_picture_may_come_as_path_bytes_or_picture(tmp_path):
    path = save(picture(20, 30), tmp_path / "a.png")
    wanted = noise(20, 30)
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert np.array_equal(np.asarray(load_image(source)), wanted)


def test_a_photograph_is_turned_upright(tmp_path):
    """EXIF orientation 6: the camera was held so that the first row of the file is the right side of the picture."""
    pixel_HW3 = np.zeros((2, 3, 3), dtype=np.uint8)
    pixel_HW3[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.fromarray(pixel_HW3), tmp_path / "a.png", exif=exif)
    upright = np.asarray(load_image(path))
    assert upright.shape == (3, 2, 3)
    assert upright[:, :, 0].tolist() == [[0, 255]] * 3


def make_modes() -> dict[str, Image.Image]:
    rgba = Image.fromarray(noise(20, 30, 4))
    palette = picture(20, 30).quantize(16)
    transparent = picture(20, 30).quantize(16)
    transparent.info["transparency"] = 3
    return {
        "L": picture(20, 30).convert("L"),
        "1": picture(20, 30).convert("1"),
        "P": palette,
        "P transparent": transparent,
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "CMYK": picture(20, 30).convert("CMYK"),
        "YCbCr": picture(20, 30).convert("YCbCr"),
    }


@pytest.mark.parametrize("mode", make_modes())
def test_every_mode_becomes_rgb_as_in_transformers(mode):
    from transformers.image_transforms import convert_to_rgb

    image = make_modes()[mode]
    ours = load_image(image)
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), convert_to_rgb(image, return_numpy=True))


def test_transparent_parts_become_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.unique(np.asarray(load_image(clear))).tolist() == [255]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert np.asarray(load_image(half)).flatten().tolist() == [127, 127, 127]


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    """A 16-bit grey PNG; Pillow's own conversion would turn everything above 255 white."""
    grey_HW = np.array([[0, 255, 256, 0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)
    path = save(Image.fromarray(grey_HW), tmp_path / "a.png")
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]


@pytest.mark.parametrize(("top", "wanted"), [(1.0, [0, 127, 255]), (255.0, [0, 127, 255]), (65535.0, [0, 127, 255])])
def test_grey_of_other_ranges_is_scaled(top, wanted):
    grey = Image.fromarray(np.array([[0.0, top / 2, top]], dtype=np.float32))
    assert grey.mode == "F"
    assert np.asarray(load_image(grey))[0, :, 2].tolist() == wanted


def test_the_first_picture_of_an_animation_counts(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(red, tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert np.asarray(load_image(path))[0, 0].tolist() == [255, 0, 0]


# -------------------------------------------------------------------------------------------------------------- errors


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that unfold into width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_files() -> dict[str, bytes]:
    stream = io.BytesIO()
    picture(64, 64).save(stream, "JPEG")
    jpeg = stream.getvalue()
    stream = io.BytesIO()
    picture(64, 64).save(stream, "PNG")
    png = bytearray(stream.getvalue())
    png[60:70] = b"0123456789"
    return {
        "empty.png": b"",
        "text.png": b"this is no picture",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "flipped.png": bytes(png),
        "bomb.png": png_that_claims(100_000, 100_000),
        "zero.png": png_that_claims(0, 10),
    }


@pytest.mark.parametrize("name", broken_files())
def test_files_that_cannot_be_honoured_are_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(MediaError, match=name) as caught:
        load_image(path)
    assert caught.value.file == str(path)
    with pytest.raises(MediaError, match="record 7"):
        load_image(path.read_bytes(), "record 7")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"gone\.png: there is no such file"):
        load_image(tmp_path / "gone.png")


def test_an_empty_picture_is_refused():
    with pytest.raises(MediaError, match="0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


def test_the_error_travels_between_processes():
    error = MediaError("a.png", "is broken.")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.file, again.problem) == ("a.png: is broken.", "a.png", "is broken.")
    whole = MediaError("a.png: is broken.")
    assert (str(whole), whole.file, whole.problem) == ("a.png: is broken.", "a.png", "is broken.")


def test_pictures_are_what_patches_were_cut_from():
    """Every value of every channel survives, and every frame, row and column finds its place again."""
    generator = np.random.default_rng(0)
    settings = ImageSettings()
    frames = [Image.fromarray(generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)) for _ in range(3)]
    patch_PX = np.concatenate([picture_patches(frame, 56, 84, settings) for frame in frames])
    assert {value for frame in frames for value in frame.tobytes()} == set(range(256))
    back = pictures(patch_PX, (3, 4, 6), settings)
    assert [frame.tobytes() for frame in back] == [frame.tobytes() for frame in frames]
