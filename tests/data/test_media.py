"""The door for images and videos: who gets in."""

import base64
import io
import struct
import zlib

import pytest
from PIL import Image, ImageFile

from data.conversation import Conversation, Message, Part
from data.encode import encode
from data.media import MediaFolder
from ernie_model.images import MediaError
from ernie_model.video import Clip
from tests.ernie_model.test_video import write_clip


@pytest.fixture
def folder(tmp_path, png):
    """root/a.png, root/sub/b.png, and a file next to root."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for path in (root / "a.png", root / "sub" / "b.png", tmp_path / "secret.png"):
        path.write_bytes(png)
    return MediaFolder(root)


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def refused(folder, media):
    with pytest.raises(MediaError) as error:
        folder.open_image(media)
    return str(error.value)


def test_paths_inside_bytes_and_data_urls(folder, png):
    inside = str(folder.root / "a.png")
    for media in ("a.png", "sub/b.png", "./sub/../a.png", inside, png, data_url(png)):
        image = folder.open_image(media)
        assert (image.size, image.mode) == ((8, 8), "RGB")


def test_an_image_keeps_its_name_for_later_errors(folder):
    assert folder.open_image("sub/b.png").filename == "sub/b.png"


def test_paths_that_lead_out_are_refused(folder, tmp_path):
    (tmp_path / "root2").mkdir()  # a name that begins like the folder's
    (tmp_path / "root2" / "secret.png").write_bytes((tmp_path / "secret.png").read_bytes())
    (folder.root / "link.png").symlink_to(tmp_path / "secret.png")
    (folder.root / "way").symlink_to(tmp_path)
    outside = ("../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "../root2/secret.png")
    for path in (*outside, "link.png", "way/secret.png"):
        message = refused(folder, path)
        assert message.startswith(f"{path}: lies outside the media folder")
        assert "data.media_root" in message


def test_a_link_inside_the_folder_is_fine(folder):
    (folder.root / "link.png").symlink_to(folder.root / "a.png")

    assert folder.open_image("link.png").size == (8, 8)


def test_addresses_are_not_fetched(folder):
    for url in ("http://example.org/a.png", "file:///etc/passwd", "ftp://x/a.png"):
        assert f"{url}: {url.split(':')[0]}: addresses are not fetched. Download" in refused(folder, url)


def test_files_that_are_not_there_or_empty(folder):
    (folder.root / "empty.png").write_bytes(b"")
    assert refused(folder, "none.png").startswith("none.png: no such file in the media folder")
    assert refused(folder, "sub").startswith("sub: no such file")
    assert refused(folder, "empty.png") == "empty.png: the file is empty (0 bytes)."
    assert "not a usable path" in refused(folder, "a\0.png")
    assert "no folder" in refused(MediaFolder(None), "a.png")


def test_files_that_are_no_whole_image(folder, png):
    (folder.root / "cut.png").write_bytes(png[:45])  # in the middle of its pixels
    (folder.root / "text.png").write_bytes(b"hello")
    (folder.root / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("cut.png", "text.png", "page.png"):
        assert refused(folder, name).startswith(f"{name}: cannot be")


def test_other_formats_of_pillow_are_refused(folder):
    """Pillow reads some fifty; we open those that hold pixels and nothing else, and that people have."""
    Image.new("RGB", (16, 16)).save(folder.root / "a.ico")

    assert "a.ico: cannot be read as an image" in refused(folder, "a.ico")


def test_broken_data_urls(folder, png):
    assert "base64 text is broken" in refused(folder, "data:image/png;base64,@@@")
    assert "only data: URLs of the form" in refused(folder, "data:image/png,abc")
    assert "the file is empty" in refused(folder, "data:image/png;base64,")


@pytest.mark.parametrize("name", ["png", "jpg", "mpo", "webp", "gif", "bmp", "tiff", "ppm"])
def test_every_promised_format_opens(folder, name):
    picture = Image.new("RGB", (16, 8), (200, 0, 0))
    more = {"save_all": True, "append_images": [picture]} if name == "mpo" else {}
    picture.save(folder.root / f"a.{name}", **more)
    assert folder.open_image(f"a.{name}").size == (16, 8)


def test_a_file_of_another_kind_is_told_the_formats(folder):
    (folder.root / "a.txt").write_text("hello")
    message = refused(folder, "a.txt")
    assert "UnidentifiedImageError" in message and "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM" in message


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_unfolds(folder, side):
    """9,000 is above our limit and below Pillow's; 20,000 is above Pillow's own."""
    (folder.root / "bomb.png").write_bytes(png_of_size(side, side))

    message = refused(folder, "bomb.png")

    assert message.startswith("bomb.png: ")
    assert "at most 64,000,000 are read" in message or "decompression bomb" in message


def test_the_limits(folder, png):
    small = MediaFolder(folder.root, max_image_pixels=63)
    assert "a.png: 8 x 8 pixels, and at most 63 are read. Shrink the image." in refused(small, "a.png")
    assert MediaFolder(folder.root, max_image_pixels=64).open_image("a.png").size == (8, 8)
    light = MediaFolder(folder.root, max_image_bytes=10)
    for media in ("a.png", png, data_url(png)):
        assert "and at most 10 are read. Shrink the file." in refused(light, media)


def test_a_video_is_checked_and_left_to_the_processor(folder, png):
    assert folder.open_video("a.png") == (folder.root / "a.png").resolve()
    assert folder.open_video(png) == png
    with pytest.raises(MediaError, match="and at most 10 are read"):
        MediaFolder(folder.root, max_video_bytes=10).open_video("a.png")
    with pytest.raises(MediaError, match="lies outside"):
        folder.open_video("../secret.png")


def test_an_error_names_file_and_record(folder, processor):
    (folder.root / "cut.jpg").write_bytes(jpeg()[:200])
    user = Message(role="user", parts=(Part.of_image("cut.jpg"),))
    conversation = Conversation(id="r5", messages=(user, Message(role="assistant", parts=(Part.of_text("x"),))))

    with pytest.raises(MediaError, match=r"^cut.jpg: .*\(In record 'r5'.\)"):
        encode(conversation, processor, media=folder)


# --------------------------------------------------------------------------------------------------------------- sizes


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def turned(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (16, 8)).save(file, format=format, exif=exif)
    return file.getvalue()


def png_with_late_note(kind: bytes, content: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 8)).save(file, format="PNG")
    end = len(file.getvalue()) - 12
    return file.getvalue()[:end] + chunk(kind, content) + file.getvalue()[end:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "late"])
def test_a_size_is_that_of_the_opened_picture(folder, format, orientation):
    content = turned("JPEG" if format == "late" else format, orientation)
    if format == "late":  # the EXIF of a JPEG, behind the pixels of a PNG
        content = png_with_late_note(b"eXIf", content[content.index(b"Exif\0\0") + 6 :].split(b"\xff\xdb")[0])

    assert folder.image_size(content) == folder.open_image(content).size
    assert folder.image_size(content) == ((16, 8) if orientation < 5 else (8, 16))


def test_a_size_is_read_without_the_pixels(folder, monkeypatch):
    for content in (turned("JPEG", 6), turned("PNG", 6), png_with_late_note(b"tEXt", b"Date\0today")):
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            assert sorted(folder.image_size(content)) == [8, 16]
    message = r"at most 64,000,000 are read"
    with pytest.raises(MediaError, match=message):
        folder.image_size(png_of_size(9_000, 9_000))
    with pytest.raises(MediaError, match="cannot be read as an image"):
        folder.image_size(b"text")


def test_the_size_of_a_video(folder):
    write_clip(folder.root / "a.mp4", [20, 60, 100], size=(64, 48))

    assert folder.video_size("a.mp4") == (Clip(3, 10.0), (64, 48))
    with pytest.raises(MediaError, match="a.png: the video has no frames|a.png: cannot be decoded|a.txt"):
        (folder.root / "a.txt").write_text("hello")
        folder.video_size("a.txt")


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, format="JPEG")
    return file.getvalue()


def test_an_error_names_no_place_in_memory(folder):
    message = refused(folder, "data:image/png;base64,AAAA")
    assert "cannot identify image file)" in message and "0x" not in message
