"""What the addresses in a request lead to.

    data:image/png;base64,...     decoded
    file:///photos/a.png          opened, if it lies in `media_root`, links followed; else refused
    https://...                   refused; with `fetch` fetched from public addresses only (data/fetch.py), and not kept
    anything else                 refused

A client is not trusted: errors tell nothing about files outside `media_root`, not even whether they exist.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from data.conversation import PartKind
from data.fetch import Fetcher
from data.media import MediaFolder, media_name
from ernie_model.images import MediaError
from ernie_model.inference.server.settings import Limits
from ernie_model.video import probe

MAX_ADDRESS = 4096
MAX_FPS = 240
"""A video with more frames than its longest duration has at this rate is refused, whatever its header says."""


@dataclass(kw_only=True)
class MediaLimits(Limits):
    """With those of single files."""

    image_mib: float = 64.0
    """One encoded image."""
    video_mib: float = 256.0
    """One encoded video."""
    video_s: float = 300.0
    """Length of one video."""
    fetch_s: float = 30.0
    """Time to fetch one address."""


@dataclass(frozen=True, kw_only=True)
class MediaDoor:
    """A `MediaOpener` of the server."""

    media_root: Path | None = None
    """The folder whose files may be named; None: no file may."""
    fetch: bool = False
    """May https addresses be fetched?"""
    limits: MediaLimits = field(default_factory=MediaLimits)

    def image(self, url: str, max_pixels: int) -> Image.Image:
        """Raises MediaError."""
        media = self._allowed(url)
        with tempfile.TemporaryDirectory(prefix="ernie-serve-") as cache:
            return replace(self._folder(Path(cache)), max_image_pixels=max_pixels).open_image(media)

    def video(self, url: str) -> Path | bytes:
        """Raises MediaError."""
        media = self._allowed(url)
        with tempfile.TemporaryDirectory(prefix="ernie-serve-") as cache:
            file = self._folder(Path(cache)).file(PartKind.VIDEO, media)
            if isinstance(file, Path) and file.is_relative_to(cache):
                file = file.read_bytes()
        try:
            clip = probe(file)
        except MediaError as error:
            raise MediaError(media_name(media), error.problem) from error
        seconds = clip.num_frames / clip.fps
        most_s = self.limits.video_s
        if seconds > most_s or clip.num_frames > most_s * MAX_FPS:
            raise MediaError(
                media_name(media),
                f"{seconds:.1f} s long ({clip.num_frames} frames), and at most {most_s:g} s are looked at. "
                "Cut the video.",
            )
        return file

    def _folder(self, cache: Path) -> MediaFolder:
        return MediaFolder(
            root=self.media_root,
            fetch=self.fetch,
            fetcher=Fetcher(cache=cache, max_seconds=self.limits.fetch_s),
            max_image_bytes=int(self.limits.image_mib * 2**20),
            max_video_bytes=int(self.limits.video_mib * 2**20),
        )

    def _allowed(self, url: str) -> str:
        """What `MediaFolder` takes: the URL, or the path of a file inside its folder."""
        scheme, colon, rest = url.partition(":")
        scheme = scheme.lower()
        if scheme == "data":
            return f"data:{rest}"
        name = url if len(url) <= 200 else f"{url[:200]}..."
        if not colon or scheme not in ("file", "https"):
            raise MediaError(name, "only data: URLs, and where allowed file:// and https:// addresses, are opened.")
        if len(url) > MAX_ADDRESS:
            raise MediaError(name, f"an address of {len(url):,} characters, and at most {MAX_ADDRESS:,} are read.")
        if scheme == "file":
            return str(self._inside(url, name))
        if not self.fetch:
            raise MediaError(name, "this server fetches no addresses. Send the content as a data: URL.")
        return f"https:{rest}"

    def _inside(self, url: str, name: str) -> Path:
        if self.media_root is None:
            raise MediaError(name, "this server opens no files. Send the content as a data: URL.")
        root = self.media_root.resolve()
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                raise ValueError("use file:///FOLDER/NAME")
            real = Path(unquote(parts.path, errors="strict")).resolve()  # follows links, which must not lead out either
            inside = real.is_relative_to(root)
            found = inside and real.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
            problem = error.strerror if isinstance(error, OSError) else error
            raise MediaError(name, f"not a usable path ({problem}).") from error
        if not inside:
            raise MediaError(name, "lies outside the folder whose files this server opens.")
        if not found:
            raise MediaError(name, "no such file.")
        return real
