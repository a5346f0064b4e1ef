"""Fetching: from a server on this machine that stands in for the web, and from nowhere else."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from data import fetch
from data.fetch import Fetcher, is_public, public_addresses
from data.media import MediaFolder
from ernie_model.images import MediaError


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # where clouds hand out keys
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",  # 127.0.0.1 behind a NAT64 gateway
        "2002:7f00:1::",  # 127.0.0.1 in 6to4
    ],
)
def test_addresses_that_are_never_connected_to(address, monkeypatch):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answers = [(socket.AF_INET, 1, 6, "", ("93.184.216.34", 443)), (family, 1, 6, "", (address, 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)

    assert not is_public(address)
    with pytest.raises(MediaError, match="which is not on the public internet. Such addresses are never"):
        public_addresses("https://two.example/a.png", "two.example", 443)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://", "not an address of the form"),
        ("https://user:secret@host/a.png", "not an address of the form"),
        ("https://host/a b.png", "not an address of the form"),
        ("https://h\u00f6st/a.png", "not an address of the form"),
        ("https://host:99999/a.png", "is not an address"),
        ("https://[::1/a.png", "is not an address"),
        ("https://127.0.0.1/a.png", "is at 127.0.0.1, which is not on the public internet"),
        ("https://[::1]:8000/a.png", "is at ::1, which is not"),
        ("https://2130706433/a.png", "is at 127.0.0.1, which is not"),
        ("https://localhost/a.png", "is not on the public internet"),
    ],
)
def test_addresses_that_are_refused_before_anything_is_sent(url, message, tmp_path):
    with pytest.raises(MediaError, match=message) as error:
        MediaFolder(None, fetch=True, fetcher=Fetcher(tmp_path)).open_image(url)
    assert error.value.file == url


def test_fetching_is_off_unless_it_is_switched_on():
    with pytest.raises(MediaError, match="https: addresses are not fetched, as data.fetch is false.* data.fetch=true"):
        MediaFolder(None).open_image("https://example.org/a.png")
    with pytest.raises(MediaError, match="http: addresses are not fetched. Download the file") as error:
        MediaFolder(None, fetch=True).open_image("http://example.org/a.png")
    assert "data.fetch" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- a stand-in web


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=web.test "
        f"-addext subjectAltName=DNS:web.test -keyout {files[0]} -out {files[1]}".split(),
        check=True,
        capture_output=True,
    )
    return files


@pytest.fixture
def web(certificate, monkeypatch, png):
    """https://web.test:<port>, whose name leads to this machine; `is_public` lets 127.0.0.1 pass, and nothing else."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            elif self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif self.path == "/gone":
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(png) + (self.path == "/cut")))
                self.end_headers()
                self.wfile.write(png)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):  # the client hangs up on what it refuses
            pass

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    lookup, judge = socket.getaddrinfo, fetch.is_public
    names = {"web.test": "127.0.0.1", "other.test": "127.0.0.1", "inside.test": "10.0.0.1"}
    looked_up = []

    def resolve(host, port, **options):
        looked_up.append(host)
        return lookup(names.get(host, host), port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or judge(address))
    monkeypatch.setattr(fetch, "tls_context", lambda: ssl.create_default_context(cafile=str(certificate[1])))
    port = server.server_address[1]
    yield SimpleNamespace(url=f"https://web.test:{port}", port=port, seen=seen, looked_up=looked_up)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    return MediaFolder(None, fetch=True, fetcher=Fetcher(tmp_path / "cache"))


def test_a_picture_is_fetched_once_and_its_name_looked_up_once(web, folder, png):
    for _ in range(2):
        assert folder.open_image(f"{web.url}/a.png?size=1").size == (8, 8)

    assert web.seen == ["/a.png?size=1"] and web.looked_up == ["web.test"]
    (kept,) = folder.fetcher.cache.iterdir()
    assert kept.read_bytes() == png


def test_redirects_are_followed_and_checked_again(web, folder):
    assert folder.open_image(f"{web.url}/to/{web.url}/a.png").size == (8, 8)
    for target, message in {
        "https://inside.test/a.png": "the host inside.test is at 10.0.0.1, which is not on the public internet",
        f"http://web.test:{web.port}/a.png": "leads to http://web.test.*only https addresses are fetched",
        "file:///etc/passwd": "leads to file:///etc/passwd, and only https",
    }.items():
        with pytest.raises(MediaError, match=message):
            folder.open_image(f"{web.url}/to/{target}")
    with pytest.raises(MediaError, match="is redirected more than 5 times"):
        folder.open_image(f"{web.url}/" + "to//" * 7)


def test_a_certificate_of_another_name_is_refused(web, folder):
    with pytest.raises(MediaError, match="cannot be fetched .*certificate"):
        folder.open_image(f"https://other.test:{web.port}/a.png")
    assert web.seen == []


def test_what_goes_wrong_on_the_way_is_named_and_not_kept(web, folder, tmp_path):
    small = MediaFolder(None, fetch=True, fetcher=folder.fetcher, max_image_bytes=20)
    slow = MediaFolder(None, fetch=True, fetcher=Fetcher(folder.fetcher.cache, max_seconds=0.3))
    for opened, path, message in (
        (folder, "/gone", "the server answers 404 Not Found"),
        (folder, "/cut", r"the connection ended after \d+ of \d+ bytes"),
        (small, "/a.png", "more than 20 bytes"),
        (small, "/drip", "more than 20 bytes"),
        (slow, "/drip", "takes longer than 0.3 seconds"),
    ):
        with pytest.raises(MediaError, match=f"^{web.url}{path}: .*{message}"):
            opened.open_image(web.url + path)
    assert not folder.fetcher.cache.exists() or not list(folder.fetcher.cache.iterdir())
    with pytest.raises(MediaError, match="cannot be fetched .*refused"):
        folder.open_image("https://web.test:9/a.png")
