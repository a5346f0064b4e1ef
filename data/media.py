"""The only door through which images and videos enter.

    a reference in a record              what becomes of it
      "images/0001.png"                  opened inside the media folder
      "data:image/png;base64,iVBO..."    decoded
      b"\\x89PNG..."                      opened (bytes of an encoded file, from a task)
      "../secret.png", a link outwards   refused: it leaves the media folder
      "https://..."                      refused, unless fetching is switched on (fetch.py)

Size is looked at before anything is decoded, so a small file that unfolds into gigabytes is refused too. Pixels are
decoded here, not later, so that a broken file fails with its name.
"""

import base64
import binascii
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from data.conversation import Media, PartKind
from data.fetch import Fetcher
from ernie_model.images import MediaError, load_image, reason
from ernie_model.video import Clip, decode_frames, probe

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are pixels and nothing else. Pillow would also open PostScript, by running another program on it.
Its JPEG reader also opens MPO, the JPEG with a second picture that phones write; naming MPO here is an error."""

ORIENTATION = 0x0112
"""EXIF's tag for how a picture is to be turned; 5 to 8 exchange width and height."""

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.ASCII)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")  # two letters or more: "C:" is a drive


@dataclass(frozen=True)
class MediaFolder:
    """Opens what the records of one dataset refer to. `root` is the folder that their paths are relative to."""

    root: Path | None
    """None: no path may be opened, only bytes and data: URLs."""
    fetch: bool = False
    """May https addresses be fetched? `fetcher` does it, and says within which limits."""
    fetcher: Fetcher = field(default_factory=Fetcher)
    max_image_pixels: int = 64_000_000
    """Width times height of an image, before any resizing; a 64-megapixel RGB image takes 192 MB decoded."""
    max_image_bytes: int = 64 * 2**20
    max_video_bytes: int = 4 * 2**30

    def open(self, kind: PartKind, media: Media) -> Image.Image | Path | bytes:
        """What `Processor.encode` takes: a decoded RGB image; for a video, the path of the checked file, or its bytes.

        Raises MediaError, naming the file, for whatever cannot be honoured.
        """
        return self.open_image(media) if kind is PartKind.IMAGE else self.open_video(media)

    def open_image(self, media: Media) -> Image.Image:
        """Upright, RGB (see ernie_model/images.py)."""
        with self._opened(media) as (image, name):
            picture = load_image(image, name)
        picture.filename = name  # type: ignore[attr-defined]  # errors further on call the picture by it
        return picture

    def image_size(self, media: Media) -> tuple[int, int]:
        """Width and height of the upright picture, from the header alone: the pixels behind it may still be broken."""
        with self._opened(media) as (image, _):
            width, height = image.size
            if image.format == "TIFF":
                return width, height  # Pillow turns these by itself
            # Pillow decodes a PNG to look for a note behind its pixels, where hardly anybody puts one.
            early = (
                isinstance(image, ImageFile.ImageFile) and image.format == "PNG" and not _png_has_late_note(image.fp)
            )
            exif = Image.Image.getexif(image) if early else image.getexif()
        return (height, width) if exif.get(ORIENTATION, 1) >= 5 else (width, height)

    def video_size(self, media: Media) -> tuple[Clip, tuple[int, int]]:
        """Number of frames and rate, and the width and height of the upright first frame, the only one decoded."""
        file = self.open_video(media)
        try:
            clip = probe(file)
            return clip, next(decode_frames(file, [0])).size
        except StopIteration:
            raise MediaError(media_name(media), "the video has no frames that can be decoded.") from None
        except MediaError as error:
            raise MediaError(media_name(media), error.problem) from error

    @contextmanager
    def _opened(self, media: Media) -> Iterator[tuple[Image.Image, str]]:
        """A picture whose header has been read and found acceptable, and what an error calls it."""
        file, name = self._file(media, self.max_image_bytes)
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=IMAGE_FORMATS) as image:
                self._check_pixels(name, image.size)
                yield image, name
        except MediaError:
            raise
        except Exception as error:  # Pillow's readers raise a dozen types: OSError, SyntaxError, struct.error, ...
            raise MediaError(
                name,
                f"cannot be read as an image ({reason(error)}). It must be a whole file of one of "
                f"these formats: {', '.join(IMAGE_FORMATS)}.",
            ) from error

    def open_video(self, media: Media) -> Path | bytes:
        """Its frames are decoded by the processor, which knows which of them it wants."""
        return self.file(PartKind.VIDEO, media)

    def file(self, kind: PartKind, media: Media) -> Path | bytes:
        """The path of the checked file, or its content; nothing is decoded."""
        return self._file(media, self.max_image_bytes if kind is PartKind.IMAGE else self.max_video_bytes)[0]

    def resolve(self, path: str) -> Path:
        """The real path of a file inside the media folder. Raises MediaError if it is not there, or not inside."""
        if scheme := _SCHEME.match(path):
            reason, way_out = ", as data.fetch is false", ", or set data.fetch=true"
            if scheme.group().lower() != "https:":
                reason = way_out = ""
            raise MediaError(
                path[:200],
                f"{scheme.group()} addresses are not fetched{reason}. Download the file into the dataset's folder and "
                f"name its path{way_out}.",
            )
        if self.root is None:
            raise MediaError(path[:200], "this dataset has no folder to look for files in.")
        root = self.root.resolve()
        try:
            real = (root / path).resolve()  # follows links, so that a link cannot lead out either
            inside = real.is_relative_to(root)
            found = inside and real.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
            raise MediaError(repr(path[:200]), f"not a usable path ({error}).") from error
        if not inside:
            raise MediaError(
                path,
                f"lies outside the media folder {root}. Move it inside, or set data.media_root to a folder that holds "
                "all media.",
            )
        if not found:
            raise MediaError(path, f"no such file in the media folder {root}. Check data.media_root.")
        return real

    def _file(self, media: Media, max_bytes: int) -> tuple[Path | bytes, str]:
        """A checked file or its content, and what an error calls it."""
        name = media_name(media)
        if isinstance(media, str) and not media.startswith("data:"):
            fetched = self.fetch and media[:8].lower() == "https://"
            path = self.fetcher.fetch(media, max_bytes) if fetched else self.resolve(media)
            _check_bytes(name, path.stat().st_size, max_bytes)
            return path, name
        if isinstance(media, str):
            # Before decoding it; four letters of base64 are three bytes.
            _check_bytes(name, len(media) * 3 // 4, max_bytes)
            media = _decode_data_url(media, name)
        _check_bytes(name, len(media), max_bytes)
        return media, name

    def _check_pixels(self, name: str, size: tuple[int, int]) -> None:
        width, height = size
        if width * height > self.max_image_pixels:
            raise MediaError(
                name,
                f"{width} x {height} pixels, and at most {self.max_image_pixels:,} are read. Shrink the image.",
            )


def _png_has_late_note(file: Any) -> bool:
    """Does a chunk behind the pixels of a PNG say how it is to be turned (EXIF, or what stands in for it)?

    Looks at the heads of the chunks only; the file's position stays.
    """
    position = file.tell()
    try:
        file.seek(len(b"\x89PNG\r\n\x1a\n"))
        behind_pixels = False
        while len(head := file.read(8)) == 8:
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            behind_pixels |= kind == b"IDAT"
            if behind_pixels and (kind == b"eXIf" or kind in (b"iTXt", b"tEXt", b"zTXt")):
                text = file.read(min(size, 24))
                if kind == b"eXIf" or text.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
                    return True
                size -= len(text)
            file.seek(size + 4, os.SEEK_CUR)  # 4: the checksum
        return False
    finally:
        file.seek(position)


def media_name(media: Media) -> str:
    """What errors call an image or video."""
    if isinstance(media, bytes):
        return f"<{len(media)} bytes in memory>"
    return f"{media[:40]}..." if media.startswith("data:") else media


def _check_bytes(name: str, size: int, max_bytes: int) -> None:
    if size == 0:
        raise MediaError(name, "the file is empty (0 bytes).")
    if size > max_bytes:
        raise MediaError(name, f"{size:,} bytes, and at most {max_bytes:,} are read. Shrink the file.")


def _decode_data_url(url: str, name: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None or not match["base64"]:
        raise MediaError(name, "only data: URLs of the form data:image/png;base64,... are understood.")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(name, f"the base64 text is broken ({error}).") from error


def data_url(content: bytes) -> str:
    """The content of an encoded image or video file as a data: URL."""
    return f"data:{_kind(content)[0]};base64,{base64.b64encode(content).decode('ascii')}"


def file_ending(content: bytes) -> str:
    """The ending that a file of this content would have."""
    return _kind(content)[1]


def is_address(media: Media) -> bool:
    """Is it neither bytes nor a path? `https://...`, `data:...`"""
    return isinstance(media, str) and _SCHEME.match(media) is not None


_KINDS = (
    (0, b"\xff\xd8", "image/jpeg", ".jpg"),
    (8, b"WEBP", "image/webp", ".webp"),
    (4, b"ftyp", "video/mp4", ".mp4"),
    (8, b"AVI ", "video/x-msvideo", ".avi"),
    (0, b"\x1aE\xdf\xa3", "video/webm", ".webm"),
)
"""Where a kind of file carries which mark. For other readers: `MediaFolder.open` looks at the content alone."""


def _kind(content: bytes) -> tuple[str, str]:
    for start, mark, kind, ending in _KINDS:
        if content[start : start + len(mark)] == mark:
            return kind, ending
    return "image/png", ".png"


def from_data_url(url: str) -> bytes | None:
    """The inverse of `data_url`. None for any other text, a broken URL too: opening that names what is wrong."""
    match = _DATA_URL.match(url)
    if match is None or not match["base64"]:
        return None
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        return None


def save_media(folder: Path, name: str, content: bytes) -> str:
    """Write an encoded file into `folder`; returns the path that a record in `folder` refers to it by."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        file.write(content)
    return os.path.normpath(name)
