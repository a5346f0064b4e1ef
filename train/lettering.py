"""Text in pictures, in whatever fonts the machine has."""

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

# The font that comes with Pillow covers Latin; these cover more, where they are installed.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "msyh.ttc",
    "DejaVuSans.ttf",
)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def text_width(text: str, size: int) -> float:
    font, text = _typeset(text, size)
    return font.getlength(text)


def write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str) -> None:
    font, text = _typeset(text, size)
    pen.text(at, text, font=font, fill=colour)


def _typeset(text: str, size: int) -> tuple[Font, str]:
    """The first font that has every letter; where none has, letters that cannot be drawn are spelled U+4E03."""
    fonts = _fonts(size)
    for font in fonts:
        if all(_has(font, letter) for letter in text):
            return font, text
    font = fonts[0]
    return font, "".join(letter if _has(font, letter) else f"U+{ord(letter):04X}" for letter in text)


@lru_cache
def _fonts(size: int) -> tuple[Font, ...]:
    fonts: list[Font] = [ImageFont.load_default(size)]
    for name in WIDE_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(fonts)


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    # A letter that a font lacks is drawn as its "missing" box, the same for each. U+10FFFF is never a letter.
    return letter.isspace() or _picture(font, letter) != _picture(font, "\U0010ffff")


def _picture(font: Font, letter: str) -> bytes:
    canvas = Image.new("L", (64, 64))
    ImageDraw.Draw(canvas).text((8, 8), letter, font=font, fill=255)
    return canvas.tobytes()
