"""Which frames are seen, what is drawn on them, and the one error for clips that cannot be honoured."""

import ast
import io
import os
import wave
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_model import video
from ernie_model.images import CLIP_MEAN, CLIP_STD, MediaError, image_patches
from ernie_model.video import (
    ClipChoice,
    Frames,
    FrameSampling,
    VideoSettings,
    choose_frames,
    draw_timestamp,
    font_file,
    frame_indices,
    probe,
    timestamp,
    video_patches,
)

TRANSFORMERS = FrameSampling.TRANSFORMERS
SMALL = dict(min_pixels=56 * 56, max_pixels=56 * 56)
UNSTAMPED = VideoSettings(draw_timestamps=False, **SMALL)


@lru_cache
def transformers_function(name: str):
    """A method of transformers' video processor, cut out of its source: importing the module needs torchvision."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "models/ernie4_5_vl_moe/video_processing_ernie4_5_vl_moe.py"
    tree = ast.parse(source.read_text("utf-8"))
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    namespace = {"torch": torch, "VideoMetadata": object}
    exec(compile(ast.Module([function], []), str(source), "exec"), namespace)
    return namespace[name]


# -------------------------------------------------------------------------------------------------------------- frames


def test_transformers_rule_on_the_examples_of_the_reference():
    every, two = VideoSettings(sampling=TRANSFORMERS), VideoSettings(sampling=TRANSFORMERS, fps=2)
    assert len(frame_indices(300, 30, every)) == 180
    assert frame_indices(300, 30, every)[:6] == [0, 1, 3, 5, 6, 8]
    assert frame_indices(300, 30, two) == list(range(0, 300, 15))
    assert len(frame_indices(1000, 25, two)) == 80
    assert len(frame_indices(61, 30, two)) == 16
    assert frame_indices(5, 30, every) == frame_indices(5, 30, two) == [0, 1, 2, 3, 4]


@given(
    st.integers(1, 2000),
    st.floats(1, 120),
    st.one_of(st.none(), st.floats(0.1, 60)),
    st.one_of(st.none(), st.integers(16, 180)),
)
def test_transformers_rule_equals_transformers(total, rate, fps, num_frames):
    fps = None if num_frames else fps
    theirs = transformers_function("sample_frames")
    processor = SimpleNamespace(num_frames=None, min_frames=16, max_frames=180)
    settings = VideoSettings(sampling=TRANSFORMERS, fps=fps, num_frames=num_frames)
    if num_frames and num_frames > total:  # transformers gives up; a short clip is no reason to
        assert frame_indices(total, rate, settings) == list(range(total))
        return
    metadata = SimpleNamespace(total_num_frames=total, fps=rate)
    wanted = theirs(processor, metadata, fps=fps, num_frames=num_frames).tolist()
    assert frame_indices(total, rate, settings) == [index for index in wanted if index < total]


def test_transformers_rule_stays_inside_the_clip():
    """Of a clip of 196 frames, transformers asks for frame 196: 196 / (196 / 180) is a little above 180."""
    assert 196 in torch.arange(0, 196, 196 / 180).int()
    indices = frame_indices(196, 30, VideoSettings(sampling=TRANSFORMERS))
    assert (len(indices), indices[-1]) == (180, 194)


def test_two_fps_rule_by_hand():
    settings = VideoSettings()
    # 10 s at 10 fps: 20 frames, every half second.
    assert frame_indices(100, 10, settings) == list(range(0, 100, 5))
    # 9 s at 25 fps: 18 frames; 12.5 rounds to 12 and 37.5 to 38, halves to even.
    assert frame_indices(225, 25, settings)[:5] == [0, 12, 25, 38, 50]
    # 2 s: 4 frames would be too few, so 16 equal intervals of 60 / 16 = 3.75 frames, the first frame of each.
    assert frame_indices(60, 30, settings) == [0, 3, 7, 11, 15, 18, 22, 26, 30, 33, 37, 41, 45, 48, 52, 56]
    # 400 s: 800 would be too many, so 180 intervals of 10000 / 180 = 55.55... frames.
    indices = frame_indices(10000, 25, settings)
    assert (len(indices), indices[:3], indices[-1]) == (180, [0, 55, 111], 9944)
    # 5 frames: all of them, never one twice.
    assert frame_indices(5, 30, settings) == [0, 1, 2, 3, 4]
    assert frame_indices(1, 30, settings) == [0]
    # A number of frames goes before everything else.
    assert frame_indices(100, 10, VideoSettings(num_frames=20)) == list(range(0, 100, 5))
    assert frame_indices(100, 10, VideoSettings(fps=5)) == list(range(0, 100, 2))


@given(st.integers(1, 5000), st.floats(1, 120), st.sampled_from(list(FrameSampling)))
def test_indices_are_ascending_and_inside_the_clip(total, rate, sampling):
    indices = frame_indices(total, rate, VideoSettings(sampling=sampling))
    assert indices == sorted(set(indices))
    assert indices[0] == 0 and indices[-1] < total
    assert min(16, total) <= len(indices) <= 181  # 181: transformers' rule may round up once


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(fps=2, num_frames=20), "exclude each other"),
        (dict(fps=0), "above 0"),
        (dict(num_frames=4), "between min_frames"),
        (dict(min_frames=20, max_frames=10), "at most max_frames"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        VideoSettings(**options)


# ---------------------------------------------------------------------------------------------------------- timestamps


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (0, "time: 00:00:00.00"),
        (2.5, "time: 00:00:02.50"),
        (3725.5, "time: 01:02:05.50"),
        (59.999, "time: 00:00:60.00"),
        (100 * 3600, "time: 100:00:00.00"),
    ],
)
def test_timestamps_read_like_this(seconds, wanted):
    assert timestamp(seconds) == wanted
    assert transformers_function("_convert_timestamp")(None, seconds) == wanted


def test_the_time_is_drawn_in_the_corner():
    grey = Image.new("RGB", (400, 200), (128, 128, 128))
    stamped = np.asarray(draw_timestamp(grey, 2.5))
    drawn_YX = np.argwhere((stamped != 128).any(axis=-1))
    assert np.asarray(grey).min() == 128, "the original must not be drawn on"
    assert drawn_YX.max(axis=0)[0] < 40, "text of 20 pixels stays in the top rows"
    assert 100 < drawn_YX.max(axis=0)[1] < 250
    assert drawn_YX.min(axis=0).max() < 12
    assert (stamped == 0).all(axis=-1).any(), "black fill"
    assert (stamped == 255).all(axis=-1).any(), "white border"
    assert not np.array_equal(stamped, np.asarray(draw_timestamp(grey, 3.5)))


def test_the_size_of_the_text_follows_the_short_side():
    heights = []
    for side in (200, 400):
        stamped = np.asarray(draw_timestamp(Image.new("RGB", (1000, side), (128, 128, 128)), 0))
        heights.append(np.ptp(np.argwhere((stamped != 128).any(axis=-1))[:, 0]))
    assert 1.7 < heights[1] / heights[0] < 2.3


def test_a_tiny_frame_can_be_stamped():
    assert draw_timestamp(Image.new("RGB", (4, 4)), 0).size == (4, 4)


def test_the_saved_font_draws_what_the_built_in_font_draws(tmp_path):
    name, content = font_file(VideoSettings())
    (tmp_path / name).write_bytes(content)
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    assert np.array_equal(draw_timestamp(grey, 7), draw_timestamp(grey, 7, tmp_path / name))
    assert font_file(VideoSettings(font=tmp_path / name)) == (name, content)


# --------------------------------------------------------------------------------------------------------------- files


def write_clip(path: Path, values: list[int], *, fps: int = 10, size: tuple[int, int] = (64, 64)) -> Path:
    """A clip whose i-th frame is grey with the given value: exactly so in a .mov, nearly so in an .mp4."""
    lossless = path.suffix == ".mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png" if lossless else "mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        for value in values:
            pixel_HW3 = np.full((size[1], size[0], 3), value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixel_HW3, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(patch_PX: np.ndarray, grid) -> list[float]:
    """Mean value of each frame, 0..255."""
    frame_N3 = patch_PX.reshape(grid[0], -1, 3, 196).mean(axis=(1, 3))
    return ((frame_N3 * CLIP_STD + CLIP_MEAN) * 255).mean(axis=1).round(1).tolist()


def test_frames_of_a_clip_in_order_and_the_last_of_an_odd_number_twice(tmp_path):
    for name, error in (("a.mov", 0.1), ("a.mp4", 5)):
        path = write_clip(tmp_path / name, [20, 60, 100, 140, 180])
        assert probe(path) == video.Clip(5, 10.0)
        patch_PX, grid = video_patches(path, UNSTAMPED)
        assert grid == (6, 4, 4)
        assert patch_PX.shape == (6 * 16, 588) and patch_PX.dtype == np.float32
        np.testing.assert_allclose(brightness(patch_PX, grid), [20, 60, 100, 140, 180, 180], atol=error)
        assert np.array_equal(patch_PX[-16:], patch_PX[-32:-16])


def test_the_chosen_frames_are_decoded(tmp_path):
    """40 frames at 10 fps last 4 s: 8 frames would be too few, so the first of 16 intervals of 2.5 frames."""
    path = write_clip(tmp_path / "a.mov", [5 * i + 20 for i in range(40)])
    assert brightness(*video_patches(path, UNSTAMPED)) == [5 * int(2.5 * i) + 20 for i in range(16)]
    every = VideoSettings(draw_timestamps=False, sampling=TRANSFORMERS, **SMALL)
    assert video_patches(path, every)[1] == (40, 4, 4)


def test_frames_are_stamped_with_their_time_before_resizing(tmp_path):
    """A clip from a file equals its frames as pictures, each stamped and cut like an image."""
    path = write_clip(tmp_path / "a.mp4", [50, 100, 150], size=(320, 240))
    with av.open(str(path)) as container:
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    settings = VideoSettings(min_pixels=112 * 140, max_pixels=112 * 140)
    patch_PX, grid = video_patches(path, settings)
    by_hand = [image_patches(draw_timestamp(frame, i / 10), settings)[0] for i, frame in enumerate(frames)]
    assert grid[0] == 4
    assert np.array_equal(patch_PX, np.concatenate([*by_hand, by_hand[-1]]))


def test_a_stretch_at_its_own_rate(tmp_path):
    """40 frames at 10 fps; frame i begins at i / 10 s. From 0.7 s to 2 s are frames 7 to 19, and not frame 20."""
    path = write_clip(tmp_path / "a.mov", [5 * i + 20 for i in range(40)])

    def frames(**choice):
        seen = brightness(*video_patches(path, UNSTAMPED, choice=ClipChoice(**choice)))
        return [round(value - 20) // 5 for value in seen]

    assert frames(start_s=0.7, end_s=2, fps=10) == [*range(7, 20), 19]  # 13 frames: the last one twice
    assert frames(start_s=0.7, end_s=2) == [*range(7, 20), 19]  # fewer than 16: all there are
    assert frames(fps=1) == [0, 10, 20, 30]  # below min_frames, because it is asked for
    assert frames(num_frames=4, start_s=2) == [20, 25, 30, 35]
    assert frames(start_s=3.95, end_s=3.97) == [39, 39]
    assert frames(end_s=4.9, num_frames=2) == [0, 20]  # as people round
    assert frames() == [int(2.5 * i) for i in range(16)]


def test_a_stretch_shows_the_time_of_the_whole_video(tmp_path):
    path = write_clip(tmp_path / "a.mov", [100] * 40, size=(320, 240))
    settings = VideoSettings(min_pixels=112 * 140, max_pixels=112 * 140)
    patch_PX, _ = video_patches(path, settings, choice=ClipChoice(start_s=3, num_frames=2))
    first = draw_timestamp(Image.new("RGB", (320, 240), (100, 100, 100)), 3.0)
    assert np.array_equal(patch_PX[: len(patch_PX) // 2], image_patches(first, settings)[0])


@pytest.mark.parametrize(
    "choice, problem",
    [
        (dict(start_s=4), "start_s is 4, but the video is 4.00 s long"),
        (dict(start_s=1, end_s=5), "end_s is 5, but the video is 4.00 s long"),
        (dict(num_frames=181), "num_frames is 181, and at most 180 are used"),
    ],
)
def test_a_stretch_outside_the_video_is_named(choice, problem, tmp_path):
    path = write_clip(tmp_path / "door.mov", [100] * 40)
    with pytest.raises(MediaError, match=f"door.mov.*{problem}"):
        video_patches(path, UNSTAMPED, choice=ClipChoice(**choice))
    images = [Image.new("RGB", (64, 64))] * 40
    with pytest.raises(MediaError, match=problem):
        video_patches(Frames(images, fps=10), UNSTAMPED, choice=ClipChoice(**choice))


def test_a_rate_above_the_limit_gives_the_limit_spread_evenly():
    indices = video.choose_frames(1000, 10, UNSTAMPED, ClipChoice(fps=10, start_s=10), "a.mov")
    assert (len(indices), indices[0], indices[-1]) == (180, 100, 995)


def test_a_stretch_begins_with_its_frame_in_spite_of_rounding():
    assert 0.28 * 25 > 7
    assert video.choose_frames(100, 25, UNSTAMPED, ClipChoice(start_s=0.28, end_s=0.56), "a.mov") == [*range(7, 14)]


def test_frames_that_were_chosen_cannot_be_chosen_again():
    frames = Frames([Image.new("RGB", (64, 64))] * 2, seconds=[0, 1])
    with pytest.raises(MediaError, match="have been chosen already"):
        video_patches(frames, UNSTAMPED, choice=ClipChoice(fps=1))


def test_bytes_are_a_clip_too(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [20, 60])
    wanted, _ = video_patches(path, UNSTAMPED)
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), str(path)):
        assert np.array_equal(video_patches(source, UNSTAMPED)[0], wanted)


def test_frames_are_a_clip_too():
    images = [Image.new("RGB", (64, 64), (value,) * 3) for value in range(0, 80, 2)]
    every = video_patches(Frames(images, seconds=[0.5] * 40), UNSTAMPED)  # chosen already
    assert brightness(*every) == list(range(0, 80, 2))
    chosen = video_patches(Frames(images, fps=10), UNSTAMPED)
    assert brightness(*chosen) == [2 * int(2.5 * i) for i in range(16)]
    stamped = VideoSettings(**SMALL)
    at_three = video_patches(Frames(images[:1], seconds=[3.0]), stamped)[0]
    assert np.array_equal(at_three[:16], image_patches(draw_timestamp(images[0], 3.0), stamped)[0])
    # Without any timing: 24 frames per second, as in transformers.
    untimed = video_patches(Frames(images[:2]), stamped)[0]
    assert np.array_equal(untimed[16:], image_patches(draw_timestamp(images[1], 1 / 24), stamped)[0])


def test_a_clip_from_a_phone_is_turned_upright(tmp_path):
    """The file says "turn by 90 degrees clockwise"; the left half, white, comes to the top."""
    path = tmp_path / "a.mp4"
    pixel_HW3 = np.zeros((64, 128, 3), dtype=np.uint8)
    pixel_HW3[:, :64] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixel_HW3, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    # The 3 x 3 matrix of the track header: 16.16 numbers, 40 bytes after the box's name.
    matrix = content.index(b"tkhd") + 4 + 40
    one = (1 << 16).to_bytes(4, "big", signed=True)
    minus, zero = (-1 << 16).to_bytes(4, "big", signed=True), bytes(4)
    assert content[matrix : matrix + 20] == one + zero * 3 + one
    content[matrix : matrix + 20] = zero + one + zero + minus + zero
    picture = np.asarray(next(video.decode_frames(bytes(content), [0])))
    assert picture.shape == (128, 64, 3)
    assert picture[10].mean() > 240 and picture[-10].mean() < 15


def smooth_clip(path: Path, values: Iterable[int], key_every: int, b_frames: int = 0) -> Path:
    """A clip with a key frame every so often, as cameras write them, and nowhere else."""
    options = {"g": str(key_every), "bf": str(b_frames), "qscale": "1", "sc_threshold": "1000000000"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for value in values:
            pixel_HW3 = np.full((64, 64, 3), value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixel_HW3, format="rgb24")))
        container.mux(stream.encode())
    return path


def repeated(path: Path, clip: Path, times: int, rate: int = 10) -> Path:
    """The packets of `clip`, again and again, `rate` frames per second."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, rate)
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
        for number in range(times * len(packets)):
            content, is_key = packets[number % len(packets)]
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.duration = 1
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, rate), stream, is_key
            target.mux(packet)
    return path


def test_three_hours_are_sampled_and_not_decoded_whole(tmp_path, monkeypatch):
    decoded, original = [], video._decoded

    def watched(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", watched)
    clip = smooth_clip(tmp_path / "short.mp4", range(0, 200, 10), key_every=20)
    path = repeated(tmp_path / "long.mp4", clip, times=3 * 3600 // 2)

    assert probe(path) == video.Clip(108_000, 10.0)
    patch_PX, grid = video_patches(path, UNSTAMPED)

    assert grid == (180, 4, 4)  # every 600th frame: each is the first of a group of 20
    np.testing.assert_allclose(brightness(patch_PX, grid), [0] * 180, atol=5)
    assert len(decoded) == 180
    late = ClipChoice(start_s=10_000.7, end_s=10_002.7)
    wanted = choose_frames(108_000, 10.0, UNSTAMPED, late, "clip")
    values = brightness(*video_patches(path, UNSTAMPED, choice=late))
    np.testing.assert_allclose(values[: len(wanted)], [10 * (index % 20) for index in wanted], atol=8)
    assert len(decoded) <= 180 + 40


@pytest.mark.parametrize("b_frames", [0, 2])
def test_jumping_finds_the_frames_that_decoding_all_finds(tmp_path, monkeypatch, b_frames):
    """With B-frames, packets lie in another order than frames are shown."""
    monkeypatch.setattr(video, "SEEK_GAP", 0)
    path = smooth_clip(tmp_path / "a.mp4", range(0, 200, 2), key_every=12, b_frames=b_frames)
    clip = probe(path)
    assert clip.num_frames == 100 and clip.table is not None and 8 <= len(clip.table.key_times) <= 10
    every = [np.asarray(picture) for picture in video.decode_frames(path, range(100))]

    for start in (0, 5, 11, 12, 13, 95):
        for step in (1, 7, 12, 30):
            indices = range(start, 100, step)
            jumped = [np.asarray(picture) for picture in video.decode_frames(path, indices, clip.table)]
            assert len(jumped) == len(indices)
            assert all(np.array_equal(picture, every[index]) for picture, index in zip(jumped, indices, strict=True))


def test_a_table_that_does_not_agree_with_the_file_is_noticed(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mov", [20, 60, 100])
    table = video.SeekTable([0, 1, 2], [0, 1, 2])  # times in another unit
    monkeypatch.setattr(video, "probe", lambda file: video.Clip(3, 10.0, table))
    assert brightness(*video_patches(path, UNSTAMPED)) == [20, 60, 100, 100]


def test_fewer_frames_than_packets_is_noticed(tmp_path, monkeypatch):
    """A container may promise frames that do not decode: then the choice is made among those that exist."""
    path = write_clip(tmp_path / "a.mov", [20, 60, 100])
    monkeypatch.setattr(video, "probe", lambda file: video.Clip(40, 10.0))
    assert brightness(*video_patches(path, UNSTAMPED)) == [20, 60, 100, 100]


# -------------------------------------------------------------------------------------------------------------- errors


def broken_clips(tmp_path: Path) -> dict[str, bytes]:
    whole = write_clip(tmp_path / "whole.mp4", list(range(0, 200, 10))).read_bytes()
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(1600))
    empty = tmp_path / "no_frames.mp4"
    with av.open(str(empty), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return {
        "empty.mp4": b"",
        "text.mp4": b"this is no film",
        "half.mp4": whole[: len(whole) // 2],  # the index is at the end
        "sound.wav": sound.getvalue(),
        "none.mp4": empty.read_bytes(),
    }


@pytest.mark.parametrize("name", ["empty.mp4", "text.mp4", "half.mp4", "sound.wav", "none.mp4"])
def test_clips_that_cannot_be_honoured_are_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_clips(tmp_path)[name])
    with pytest.raises(MediaError, match=name) as caught:
        video_patches(path, UNSTAMPED)
    assert caught.value.file == str(path)


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"gone\.mp4: there is no such file"):
        video_patches(tmp_path / "gone.mp4", UNSTAMPED)


def test_frames_without_a_frame_or_with_a_broken_one_are_named(tmp_path):
    with pytest.raises(MediaError, match="clip 3: the video has no frames"):
        video_patches(Frames([], name="clip 3"), UNSTAMPED)
    with pytest.raises(MediaError, match="2 frames, but 1 times"):
        Frames(["a.png", "b.png"], seconds=[0.0])
    with pytest.raises(MediaError, match=r"b\.png: there is no such file"):
        video_patches(Frames([tmp_path / "b.png"]), UNSTAMPED)


def test_a_clip_that_is_too_long_and_thin_is_named(tmp_path):
    path = write_clip(tmp_path / "thin.mp4", [1, 2], size=(4000, 16))
    with pytest.raises(MediaError, match=r"thin\.mp4: the picture has 4000 x 16 pixels"):
        video_patches(path, UNSTAMPED)


# ---------------------------------------------------------------------------------------------------------- real clips

CLIPS = os.environ.get("ERNIE_TEST_MEDIA")


@pytest.mark.skipif(not CLIPS, reason="set ERNIE_TEST_MEDIA to a folder with .mp4 and .avi files")
def test_real_clips_are_read():
    paths = sorted(path for path in Path(str(CLIPS)).iterdir() if path.suffix in (".mp4", ".avi"))
    assert paths
    for path in paths:
        clip = probe(path)
        patch_PX, (frames, rows, columns) = video_patches(path, VideoSettings(**SMALL))
        assert clip.fps > 1 and clip.num_frames > 1
        assert frames % 2 == 0 and len(patch_PX) == frames * rows * columns
        assert 0 <= frames - len(frame_indices(clip.num_frames, clip.fps, VideoSettings())) <= 1
        assert np.isfinite(patch_PX).all() and patch_PX.std() > 0.1
