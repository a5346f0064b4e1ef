"""What a client may make the server open: nothing but what was allowed."""

import base64
import io
import socket
import struct
import threading
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from ernie_model.images import MediaError
from train.serving.media import MediaDoor, MediaLimits

MANY = 10**9


def png_file(width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, format="PNG")
    return file.getvalue()


def url_of(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video_file(frames: int, rate: int = 10, size: int = 32) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((size, size, 3), number * 5 % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "shown"
    (folder / "in side").mkdir(parents=True)
    (folder / "in side" / "a.png").write_bytes(png_file())
    (tmp_path / "secret.png").write_bytes(png_file())
    (tmp_path / "shown-too").mkdir()
    (tmp_path / "shown-too" / "a.png").write_bytes(png_file())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "way-out").symlink_to(tmp_path)
    return folder


@pytest.fixture
def door(root):
    return MediaDoor(media_root=root, fetch=True, limits=MediaLimits(fetch_s=2))


# ---------------------------------------------------------------------------------------------------------- data URLs


def test_a_data_url_is_decoded_whatever_the_case_of_its_scheme(door):
    for url in (url_of(png_file()), "DATA" + url_of(png_file())[4:]):
        image = door.image(url, MANY)
        assert image.mode == "RGB" and image.size == (8, 8) and image.getpixel((0, 0)) == (200, 10, 10)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (url_of(png_that_claims(60_000, 60_000)), "pixels"),
        (url_of(png_that_claims(2**31 - 1, 2**31 - 1)), "pixels"),
        (url_of(png_file(200, 200)[:-30]), "cannot be"),
        (url_of(b""), "empty"),
        (url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be read as an image"),  # Pillow would run Ghostscript on it
        (url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot be read as an image"),
        ("data:image/png;base64,iVBOR!!!", "base64 text is broken"),
        ("data:image/png;base64,abc", "base64 text is broken"),
        ("data:image/png,rawbytes", "data:image/png;base64"),
        ("data:", "data:image/png;base64"),
    ],
)
def test_data_urls_that_are_refused(door, url, message):
    with pytest.raises(MediaError, match=message) as error:
        door.image(url, 64_000_000)
    assert len(str(error.value)) < 500


def test_a_picture_of_more_pixels_than_are_left_is_refused_before_it_is_decoded(door):
    with pytest.raises(MediaError, match="8 x 8 pixels, and at most 63 are read"):
        door.image(url_of(png_file()), 63)
    assert door.image(url_of(png_file()), 64).size == (8, 8)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_in_the_folder_is_opened(door, root):
    for url in (f"file://{root}/in%20side/a.png", f"FILE://localhost{root}/in side/a.png"):
        assert door.image(url, MANY).size == (8, 8)


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret.png",
        "{root}/%2e%2e/secret.png",
        "{root}/in side/../../secret.png",
        "{root}/link.png",
        "{root}/way-out/secret.png",
        "{root}-too/a.png",
        "{root}/../no-such-file.png",
        "/etc/passwd",
        "/proc/self/environ",
        "",
        "/",
    ],
)
def test_a_file_elsewhere_is_refused_whether_it_exists_or_not(door, root, path):
    with pytest.raises(MediaError, match="lies outside the folder whose files this server opens") as error:
        door.image("file://" + path.format(root=root), MANY)
    assert "secret" not in error.value.problem and str(root) not in error.value.problem


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://{root}/b.png", "no such file"),
        ("file://{root}/in side", "no such file"),
        ("file://{root}/a%00.png", "not a usable path"),
        ("file://{root}/" + "a" * 3000, "not a usable path|no such file"),
        ("file://{root}/" + "a" * 5000, "an address of 5,"),
        ("file://elsewhere{root}/in side/a.png", "use file:///FOLDER/NAME"),
        ("file://{root}/in side/a.png?x=1", "use file:///FOLDER/NAME"),
        ("{root}/in side/a.png", "only data: URLs"),
        ("ftp://host/a.png", "only data: URLs"),
        ("http://93.184.216.34/a.png", "only data: URLs"),
        ("gopher://127.0.0.1:11211/_stats", "only data: URLs"),
    ],
)
def test_addresses_that_are_refused(door, root, url, message):
    with pytest.raises(MediaError, match=message) as error:
        door.image(url.format(root=root), MANY)
    assert len(str(error.value)) < 600


def test_without_a_folder_no_file_is_opened(root):
    with pytest.raises(MediaError, match="this server opens no files. Send the content as a data: URL."):
        MediaDoor().image(f"file://{root}/in side/a.png", MANY)


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def listener():
    """Counts who connects to this machine."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    met, stop = [], threading.Event()

    def accept():
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            met.append(connection)
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1], met
    stop.set()
    thread.join()
    server.close()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",  # the same in decimal,
        "0x7f000001",  # in hexadecimal,
        "0177.0.0.1",  # in octal,
        "127.1",  # and short
        "0.0.0.0",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "169.254.169.254",
        "10.0.0.7",
        "192.168.0.1",
        "172.16.5.5",
        "[fe80::1]",
        "[fd00::1]",
        "inside.test",
    ],
)
def test_no_private_address_is_ever_connected_to(door, listener, host, monkeypatch):
    port, met = listener
    lookup = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: lookup("127.0.0.1" if name == "inside.test" else name, *a, **k)
    )
    with pytest.raises(MediaError, match="not on the public internet|cannot be found"):
        door.image(f"https://{host}:{port}/a.png", MANY)
    assert met == []


def test_addresses_are_not_fetched_unless_it_is_switched_on(listener):
    port, met = listener
    with pytest.raises(MediaError, match="this server fetches no addresses. Send the content as a data: URL."):
        MediaDoor().image(f"https://127.0.0.1:{port}/a.png", MANY)
    assert met == []


def test_what_was_fetched_is_not_kept(door, monkeypatch, tmp_path):
    """The same address may show something else next time; and whoever asks for many must not fill the disk."""
    from data import fetch

    asked = []

    def download(self, url, max_bytes):
        asked.append(url)
        return png_file()

    monkeypatch.setattr(fetch.Fetcher, "_download", download)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    for _ in range(2):
        assert door.image("HTTPS://example.org/a.png", MANY).size == (8, 8)
    assert asked == ["https://example.org/a.png"] * 2 and list((tmp_path / "temporary").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- videos


def test_a_video_is_measured_before_it_is_decoded(root):
    door = MediaDoor(media_root=root, limits=MediaLimits(video_s=2))
    content = video_file(20)
    (root / "a.mp4").write_bytes(content)
    assert door.video(url_of(content, "video/mp4")) == content
    assert door.video(f"file://{root}/a.mp4") == root / "a.mp4"
    with pytest.raises(MediaError, match=r"2\.1 s long \(21 frames\), and at most 2 s are looked at. Cut the video."):
        door.video(url_of(video_file(21), "video/mp4"))
    with pytest.raises(MediaError, match="and at most 100 are read"):
        MediaDoor(limits=MediaLimits(video_mib=100 / 2**20)).video(url_of(content, "video/mp4"))


def test_a_video_that_leads_elsewhere_is_refused(door, root, listener):
    """FFmpeg would open what playlists name, and listen on the network for what an SDP file describes."""
    port, met = listener
    address = f"http://127.0.0.1:{port}/a.ts"
    (root / "a.ts").write_bytes(video_file(3))
    files = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXTINF:9,\na.ts\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile a.ts\nfile {address}\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
        for url in (url_of(text.encode(), "video/mp4"), f"file://{root}/{name}"):
            with pytest.raises(MediaError, match="cannot be decoded as a video"):
                door.video(url)
    assert met == []


def test_frames_of_too_many_pixels_are_not_decoded(door, monkeypatch):
    from ernie_model import video

    content = video_file(3, size=64)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 63 * 64)
    with pytest.raises(MediaError, match="frames of 64 x 64 pixels, and at most 4,032 are decoded"):
        door.video(url_of(content, "video/mp4"))
