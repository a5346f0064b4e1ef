"""What the pages for people share: one HTML file each, which needs nothing else: no network, no other files.

Whatever comes from data or a model is escaped: `text` in HTML, `script_json` in a script.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).parent / "assets"
LOSSLESS = 160 * 160
"""Pictures of at most this many pixels are stored as PNG, others as JPEG."""


def head(title: str, styles: Sequence[str]) -> str:
    """Up to the beginning of the body. `styles`: files of train/assets, later ones over earlier ones."""
    css = "\n".join((ASSETS / name).read_text("utf-8") for name in styles)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title><style>{css}</style></head><body>"
    )


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


def script_json(value: object) -> str:
    """JSON inside a script element, which only `</` could end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def encode_picture(picture: Image.Image, size: tuple[int, int] | None = None) -> tuple[bytes, str]:
    """A picture's file, and which kind it is: png or jpeg. `size`: what it is resized to."""
    picture = picture.convert("RGB")
    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    kind = "png" if picture.width * picture.height <= LOSSLESS else "jpeg"
    file = io.BytesIO()
    picture.save(file, format=kind, **({} if kind == "png" else {"quality": 88}))
    return file.getvalue(), kind


def fitted(size: tuple[int, int], limit: int) -> tuple[int, int]:
    """The size, shrunk until its longer side is at most `limit`."""
    shrink = min(1.0, limit / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def data_url(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"
