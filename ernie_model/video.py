"""Video file -> chosen frames with drawn timestamps -> rows of normalised patches.

    choose frames        transformers' rule, or two frames per second (Baidu's own processor)
    draw the timestamp   "time: 00:00:02.50" in the top left corner, before resizing
    make it even         the resampler merges frames in pairs; of an odd number the last one is used twice
    cut                  every frame as an image (images.py) with the limits of videos; grid (t, h, w), t = frames

The font is the checkpoint's own (`Roboto-Regular.ttf` in the released folders). Where there is none, Pillow's built-in
font draws (Aileron, public domain, needs Pillow with FreeType), and the processor saves that very font with the model,
so that whoever loads the folder draws the same pixels.

Source: reference 4.3.

Shape letters:  N frames   P patches   X numbers in a patch
"""

import io
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from ernie_model.images import MediaError, PixelSettings, load_image, picture_patches, resized_size
from ernie_model.rope import Grid

FALLBACK_FPS = 24.0  # of frames that come without any timing, as in transformers
BUILT_IN_FONT = "Aileron-Regular.ttf"

VideoFile = str | Path | bytes | io.BytesIO
"""A path, or the content of a video file."""


def file_name(file: VideoFile) -> str:
    """What to call a video in errors."""
    return "video" if isinstance(file, bytes | io.BytesIO) else str(file)


class FrameSampling(Enum):
    """Which frames of a clip the model sees (reference 4.3, trap 7.16)."""

    TWO_FPS = "two_fps"
    """What Baidu's processor does: `fps` (2) frames per second, but at least 16 and at most 180 spread evenly."""
    TRANSFORMERS = "transformers"
    """What transformers does: all frames unless `fps` is given, clamped to 16..180 and spread evenly."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings(PixelSettings):
    min_pixels: int = 299 * 28 * 28
    """Of one frame, as `max_pixels`."""
    max_pixels: int = 1196 * 28 * 28
    sampling: FrameSampling = FrameSampling.TWO_FPS
    fps: float | None = None
    """Frames per second to choose. None: 2 for TWO_FPS, all frames for TRANSFORMERS."""
    num_frames: int | None = None
    """Choose exactly this many frames instead (fewer if the clip is shorter)."""
    min_frames: int = 16
    max_frames: int = 180
    draw_timestamps: bool = True
    font: Path | None = None
    """A TrueType file; None draws with Pillow's built-in font."""

    def __post_init__(self):
        super().__post_init__()
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"fps ({self.fps}) and num_frames ({self.num_frames}) exclude each other; give one.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be above 0.")
        if not 0 < self.min_frames <= self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must be above 0 and at most max_frames.")
        if self.num_frames is not None and not self.min_frames <= self.num_frames <= self.max_frames:
            raise ValueError(
                f"num_frames is {self.num_frames}; it must lie between min_frames ({self.min_frames}) and max_frames "
                f"({self.max_frames})."
            )


@dataclass(frozen=True)
class Frames:
    """A clip that somebody has decoded already.

    With `fps`, `images` is the whole clip and frames are chosen from it as from a file. With `seconds`, the choice has
    been made: every frame is used and shows its own time. With neither, the clip counts as 24 frames per second.
    """

    images: Sequence[Image.Image | str | Path]
    fps: float | None = None
    seconds: Sequence[float] | None = None
    name: str = field(default="frames", kw_only=True)

    def __post_init__(self):
        if self.seconds is not None and len(self.seconds) != len(self.images):
            raise MediaError(self.name, f"has {len(self.images)} frames, but {len(self.seconds)} times.")


@dataclass(frozen=True, kw_only=True)
class ClipChoice:
    """What one conversation asks of one of its videos; None leaves it to the settings.

    A rate or number that is asked for is kept below the settings' `min_frames` too. Above `max_frames`, a rate gives
    `max_frames` spread evenly, as in any long clip, and a number is refused.
    """

    fps: float | None = None
    num_frames: int | None = None
    start_s: float | None = None
    """Seconds into the video where the clip begins."""
    end_s: float | None = None
    """Seconds into the video where it ends; up to a second behind the video's end, as people round."""


# ----------------------------------------------------------------------------------------------------- frame sampling


def choose_frames(num_frames: int, fps: float, settings: VideoSettings, choice: ClipChoice, name: str) -> list[int]:
    """Which of a video's frames to use, of the stretch and as densely as `choice` says; see `frame_indices`.

    Raises:
        MediaError: the video does not have what is asked for.
    """
    if choice.num_frames is not None and choice.num_frames > settings.max_frames:
        raise MediaError(name, f"num_frames is {choice.num_frames}, and at most {settings.max_frames} are used.")
    duration = num_frames / fps
    start, end = choice.start_s or 0.0, duration if choice.end_s is None else choice.end_s
    if start >= duration or end >= duration + 1:
        asked = f"start_s is {choice.start_s}" if start >= duration else f"end_s is {choice.end_s}"
        raise MediaError(name, f"{asked}, but the video is {duration:.2f} s long.")
    # Frame i is shown from second i / fps on. The stretch has its first frame even if it is shorter than one. (A
    # millionth less, because 0.28 * 25 is a little more than 7.)
    first = min(math.ceil(start * fps - 1e-6), num_frames - 1)
    last = max(first + 1, min(math.ceil(end * fps - 1e-6), num_frames))
    if choice.fps is not None or choice.num_frames is not None:
        settings = replace(settings, fps=choice.fps, num_frames=choice.num_frames, min_frames=1)
    return [first + index for index in frame_indices(last - first, fps, settings)]


def frame_indices(num_frames: int, fps: float, settings: VideoSettings) -> list[int]:
    """Which of a clip's frames to use.

    Args:
        num_frames: frames in the clip, at least 1.
        fps: frames per second of the clip.

    Returns:
        Ascending indices below `num_frames`.
    """
    if settings.sampling is FrameSampling.TRANSFORMERS:
        return _transformers_indices(num_frames, fps, settings)
    return _two_fps_indices(num_frames, fps, settings)


def _transformers_indices(total: int, fps: float, settings: VideoSettings) -> list[int]:
    if settings.num_frames is not None:
        count: float = min(settings.num_frames, total)
    else:
        wanted = total if settings.fps is None else total / fps * settings.fps
        count = min(max(wanted, settings.min_frames), settings.max_frames, total)
    # torch, not numpy: the original rounds to float32 before it truncates, and so must we. That rounding may yield one
    # index more than `count`; and for some lengths (196 frames) one that lies behind the clip, which we leave out.
    return [index for index in torch.arange(0, total, total / count).int().tolist() if index < total]


def _two_fps_indices(total: int, fps: float, settings: VideoSettings) -> list[int]:
    target_fps = settings.fps or 2.0
    duration = total / fps
    expected = int(duration * target_fps)
    count = settings.num_frames
    if count is None and expected < settings.min_frames:
        count = settings.min_frames
    elif count is None and expected > settings.max_frames:
        count = settings.max_frames
    if count is not None:  # the first frame of each of `count` equal intervals
        return np.linspace(0, total, min(count, total) + 1).astype(int)[:-1].tolist()
    seconds_N = np.arange(0, duration, 1 / target_fps)
    return [index for index in np.around(seconds_N * fps).astype(int).tolist() if index < total]


# --------------------------------------------------------------------------------------------------------- timestamps


def timestamp(seconds: float) -> str:
    """ "time: HH:MM:SS.ss", with transformers' rounding: 59.999 s is 00:00:60.00."""
    hours, rest = seconds // 3600, seconds % 3600
    return f"time: {int(hours):02d}:{int(rest // 60):02d}:{rest % 60:05.02f}"


def draw_timestamp(image: Image.Image, seconds: float, font_file: Path | None = None) -> Image.Image:
    """A copy of `image` with the time in its top left corner: black with a white border, a tenth of the short side."""
    size = max(1, int(min(image.size) * 0.1))
    stamped = image.copy()
    ImageDraw.Draw(stamped).text(
        (0, 0),
        timestamp(seconds),
        font=_font(font_file, size),
        fill=(0, 0, 0),
        stroke_width=int(size * 0.1),
        stroke_fill=(255, 255, 255),
    )
    return stamped


@lru_cache
def _font(font_file: Path | None, size: int) -> ImageFont.FreeTypeFont:
    # Not `load_default` itself, which lays out text without kerning: the file must draw the same as the built-in font.
    return ImageFont.truetype(io.BytesIO(_built_in_font()) if font_file is None else str(font_file), size)


@lru_cache
def _built_in_font() -> bytes:
    """The TrueType file inside Pillow."""
    font = ImageFont.load_default(10)
    if not isinstance(font, ImageFont.FreeTypeFont) or not isinstance(font.path, io.BytesIO):
        raise RuntimeError(
            "this Pillow has no built-in TrueType font to draw timestamps with. Install the usual wheel, put "
            "Roboto-Regular.ttf into the checkpoint's folder, or set draw_timestamps to False."
        )
    return font.path.getvalue()


def font_file(settings: VideoSettings) -> tuple[str, bytes]:
    """Name and content of the TrueType file that `settings` draw with, to be saved beside the model."""
    if settings.font is not None:
        return settings.font.name, settings.font.read_bytes()
    return BUILT_IN_FONT, _built_in_font()


# ----------------------------------------------------------------------------------------------------------- decoding


SEEK_GAP = 100
"""How many frames that nobody wants are decoded rather than jumped over: a jump costs some frames too."""


@dataclass(frozen=True)
class SeekTable:
    """Where a decoder may begin. Times are in the container's own unit, ascending."""

    time_N: Sequence[int]
    """When each frame is shown."""
    key_times: Sequence[int]
    """Of the frames that can be decoded without those before them."""


@dataclass(frozen=True)
class Clip:
    """What has to be known about a video file before frames are chosen."""

    num_frames: int
    fps: float
    table: SeekTable | None = field(default=None, compare=False, repr=False)
    """None: the container does not say when each frame is shown; such a file is decoded from its beginning."""


def probe(file: VideoFile) -> Clip:
    """Count the frames of a video without decoding them, and read its frame rate.

    The packets are counted because containers state the number of frames wrongly or not at all.

    Raises:
        MediaError: missing, empty, not a video, or without a single frame.
    """
    try:
        with _open(file) as container:
            stream = _video_stream(container, file)
            rate = stream.average_rate or stream.guessed_rate
            count, times, keys = 0, array("q"), array("q")
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                count += 1
                if packet.pts is not None:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
    except (FFmpegError, ValueError, EOFError) as error:
        raise _undecodable(file, error) from error
    if count == 0:
        raise MediaError(file_name(file), "the video has no frames.")
    whole = len(times) == len(set(times)) == count
    table = SeekTable(array("q", sorted(times)), array("q", sorted(keys))) if whole else None
    return Clip(count, float(rate) if rate else FALLBACK_FPS, table)


def decode_frames(file: VideoFile, indices: Sequence[int], table: SeekTable | None = None) -> Iterator[Image.Image]:
    """Yield the frames with the given ascending indices, upright, as RGB pictures; fewer if the file ends before.

    With a table, what lies between them is jumped over where that saves work, so that a few frames of a long film cost
    little more than those of a short one. Fewer frames come also where the table does not agree with the file.

    Raises:
        MediaError: the file cannot be decoded.
    """
    if table is not None:
        yield from _decode_jumping(file, indices, table)
        return
    wanted, last = set(indices), max(indices)
    try:
        with _open(file) as container:
            stream = _video_stream(container, file)
            stream.thread_type = "AUTO"
            for index, frame in enumerate(_decoded(container, stream)):
                if index in wanted:
                    yield _upright(frame)
                if index == last:
                    return
    except (FFmpegError, ValueError, EOFError) as error:
        raise _undecodable(file, error) from error


def _decode_jumping(file: VideoFile, indices: Sequence[int], table: SeekTable) -> Iterator[Image.Image]:
    """`decode_frames` by the times of frames."""
    try:
        with _open(file) as container:
            stream = _video_stream(container, file)
            stream.thread_type = "AUTO"
            frames, position = _decoded(container, stream), -1  # index of the frame decoded last
            for index in indices:
                wanted = table.time_N[index]
                key = bisect_right(table.key_times, wanted) - 1
                if key >= 0 and bisect_left(table.time_N, table.key_times[key]) - position > SEEK_GAP:
                    frames.close()
                    container.seek(table.key_times[key], stream=stream)
                    frames = _decoded(container, stream)
                # Frames before the wanted one: those behind the place where decoding began.
                frame = next((frame for frame in frames if frame.pts is None or frame.pts >= wanted), None)
                if frame is None or frame.pts != wanted:
                    return
                position = index
                yield _upright(frame)
    except (FFmpegError, ValueError, EOFError) as error:
        raise _undecodable(file, error) from error


def _decoded(container: InputContainer, stream: VideoStream) -> Generator[av.VideoFrame, None, None]:
    """The frames from where the container stands, in the order they are shown."""
    yield from container.decode(stream)


CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,asf,ogg,gif,apng,"
    "webp,nut,mxf,wtv,yuv4mpegpipe,wav,mp3,flac,aac"
)
"""Containers that hold their own frames; and sound, which is then refused in words of its own.

FFmpeg would also open lists of other files and addresses (HLS, DASH, concat) and descriptions of streams to listen for
(SDP): a video must not lead anywhere else."""
MAX_FRAME_PIXELS = 64_000_000
"""Width times height of a frame; a larger one is not decoded."""
_OPTIONS = {"format_whitelist": CONTAINERS, "max_pixels": str(MAX_FRAME_PIXELS)}


def _open(file: VideoFile) -> InputContainer:
    if isinstance(file, bytes | io.BytesIO):
        content = file if isinstance(file, bytes) else file.getvalue()
        # a new stream: every reader starts at the beginning
        return av.open(io.BytesIO(content), mode="r", options=_OPTIONS)
    if not Path(file).is_file():
        raise MediaError(file, "there is no such file.")
    if Path(file).stat().st_size == 0:
        raise MediaError(file, "the file is empty (0 bytes).")
    return av.open(str(file), mode="r", options=_OPTIONS)


def _video_stream(container: InputContainer, file: VideoFile) -> VideoStream:
    if not container.streams.video:
        raise MediaError(file_name(file), "the file holds no video stream.")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise MediaError(
            file_name(file),
            f"frames of {stream.width} x {stream.height} pixels, and at most {MAX_FRAME_PIXELS:,} are decoded. "
            "Shrink the video.",
        )
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # the header may say less than there is
    return stream


def _undecodable(file: VideoFile, error: Exception) -> MediaError:
    return MediaError(file_name(file), f"cannot be decoded as a video ({type(error).__name__}: {error}).")


def _upright(frame: av.VideoFrame) -> Image.Image:
    """RGB picture, turned as the file says: phones store portrait clips lying down."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turned = round(frame.rotation / 90) * 90 % 360  # counter-clockwise
    return image.rotate(turned, expand=True) if turned else image


# ------------------------------------------------------------------------------------------------------------ patches


def video_patches(
    source: Frames | VideoFile, settings: VideoSettings, name: str | None = None, choice: ClipChoice | None = None
) -> tuple[np.ndarray, Grid]:
    """Patches of one video, or of the stretch of it that `choice` names. Timestamps count from the video's beginning.

    Returns:
        patch_PX float32, frame after frame, each in merge-block order; and the grid (frames, rows, columns).

    Raises:
        MediaError: missing, corrupt, without frames, too long and thin, or without what `choice` asks for.
    """
    choice = choice or ClipChoice()
    if isinstance(source, Frames):
        name = name or source.name
        pictures, seconds = _choose_from(source, settings, name, choice)
        patch_PX, grid, _ = _cut_frames(pictures, seconds, settings, name)
        return patch_PX, grid
    name = name or file_name(source)
    try:
        return _patches_of_file(source, settings, name, choice)
    except MediaError as error:  # what opens the file cannot know that its bytes are, say, video 2 of message 3
        raise MediaError(name, error.problem) from error


def _patches_of_file(
    source: VideoFile, settings: VideoSettings, name: str, choice: ClipChoice
) -> tuple[np.ndarray, Grid]:
    clip = probe(source)
    indices = choose_frames(clip.num_frames, clip.fps, settings, choice, name)
    patches = _file_to_patches(source, indices, clip.fps, settings, name, clip.table)
    if patches is None:  # some packets hold no picture: choose again, among the frames that exist
        count = _count_decodable(source)
        if count == 0:
            raise MediaError(name, "the video has no frames that can be decoded.")
        indices = choose_frames(count, clip.fps, settings, choice, name)
        patches = _file_to_patches(source, indices, clip.fps, settings, name)
        assert patches is not None
    return patches


def _file_to_patches(
    file: VideoFile,
    indices: Sequence[int],
    fps: float,
    settings: VideoSettings,
    name: str,
    table: SeekTable | None = None,
) -> tuple[np.ndarray, Grid] | None:
    """None if the file holds fewer frames than `indices` asks for."""
    seconds = [index / fps for index in indices]
    patch_PX, grid, count = _cut_frames(decode_frames(file, indices, table), seconds, settings, name)
    return (patch_PX, grid) if count == len(indices) else None


def _cut_frames(
    pictures: Iterable[Image.Image], seconds: Sequence[float], settings: VideoSettings, name: str
) -> tuple[np.ndarray, Grid, int]:
    """Stamp, resize and cut frame by frame, so that only one of them is held at full size.

    Returns:
        patch_PX, the grid, and how many frames there were (before an odd last one was used twice).
    """
    patches: list[np.ndarray] = []
    height = width = 0
    for picture, second in zip(pictures, seconds, strict=False):
        if not patches:  # one size for the whole clip: the frames share a grid
            height, width = resized_size(picture, settings, name)
        stamped = draw_timestamp(picture, second, settings.font) if settings.draw_timestamps else picture
        patches.append(picture_patches(stamped, height, width, settings))
    count = len(patches)
    patches += patches[-1:] * (count % 2)
    grid = (len(patches), height // settings.patch_size, width // settings.patch_size)
    empty_PX = np.empty((0, 3 * settings.patch_size**2), dtype=np.float32)
    return np.concatenate([empty_PX, *patches]), grid, count


def _count_decodable(file: VideoFile) -> int:
    try:
        with _open(file) as container:
            return sum(1 for _ in container.decode(_video_stream(container, file)))
    except (FFmpegError, ValueError, EOFError) as error:
        raise _undecodable(file, error) from error


def _choose_from(
    source: Frames, settings: VideoSettings, name: str, choice: ClipChoice
) -> tuple[list[Image.Image], list[float]]:
    if not source.images:
        raise MediaError(name, "the video has no frames.")
    if source.seconds is not None:
        if choice != ClipChoice():
            raise MediaError(name, f"{choice} is asked for, but these frames have been chosen already.")
        chosen, seconds = list(source.images), list(source.seconds)
    else:
        fps = source.fps or FALLBACK_FPS
        indices = choose_frames(len(source.images), fps, settings, choice, name)
        chosen, seconds = [source.images[i] for i in indices], [i / fps for i in indices]
    return [load_image(image, None if isinstance(image, str | Path) else name) for image in chosen], seconds
