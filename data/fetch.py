"""Media from the web, for those who switch it on (`data.fetch=true`).

    https://host/a.jpg ─► look host up, once ─► all addresses public? ─► connect to one of them, as `host` ─► cache
                               ▲                                                  │
                               └──────────────── redirect, at most 5 ─────────────┘

A record comes from somebody else, so its address is not trusted: it could name a service inside our own network. Only
https is spoken, only public addresses are connected to (also after a redirect), and the address that was checked is
the one that is connected to: the name is not looked up again. That cannot be switched off. Proxies of the environment
are not used, as they would look the name up themselves.

What has been fetched is kept under the hash of its address, so a second epoch and a resumed run see the same bytes, and
nothing is fetched twice.
"""

import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from ernie_model.atomic import atomic_write
from ernie_model.images import MediaError

_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # a gateway turns the last 32 bits into an IPv4 address

Address = tuple[int, tuple]
"""Family, and what a socket of that family connects to."""


def default_cache() -> Path:
    """`ernie-train/media` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie-train" / "media"


@dataclass(frozen=True)
class Fetcher:
    """Fetches files over https into `cache`."""

    cache: Path = field(default_factory=default_cache)
    max_seconds: float = 60.0
    """For one file, redirects included; looking the name up is left to the system's own limit."""
    max_redirects: int = 5

    def fetch(self, url: str, max_bytes: int) -> Path:
        """The file behind `url`. Raises MediaError, naming the address, for whatever cannot be honoured."""
        target = self.cache / hashlib.sha256(url.encode()).hexdigest()
        if not target.is_file():
            try:
                content = self._download(url, max_bytes)
                atomic_write(target, content)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise MediaError(url, f"cannot be fetched ({type(error).__name__}: {error}).") from error
        return target

    def _download(self, url: str, max_bytes: int) -> bytes:
        deadline = time.monotonic() + self.max_seconds
        at = url
        for _ in range(self.max_redirects + 1):
            connection, path = _connection(url, at, deadline)
            try:
                connection.request("GET", path, headers={"User-Agent": "ernie-train", "Accept-Encoding": "identity"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308) and (location := answer.getheader("Location")):
                    at = urljoin(at, location)
                    continue
                if answer.status != 200:
                    raise MediaError(url, f"the server answers {answer.status} {answer.reason}.")
                return self._read(url, connection, answer, max_bytes, deadline)
            finally:
                connection.close()
        raise MediaError(url, f"is redirected more than {self.max_redirects} times.")

    def _read(
        self,
        url: str,
        connection: http.client.HTTPConnection,
        answer: http.client.HTTPResponse,
        max_bytes: int,
        deadline: float,
    ) -> bytes:
        content, expected = bytearray(), answer.length  # None: it ends where the connection does
        while expected is None or len(content) < expected:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MediaError(url, f"fetching takes longer than {self.max_seconds:g} seconds.")
            if connection.sock is not None:  # None: the answer has taken it over, to close it at its end
                connection.sock.settimeout(left)
            chunk = answer.read1(_CHUNK)  # what is there, so that a server that drips does not hold us beyond the time
            content += chunk
            if len(content) > max_bytes or (expected or 0) > max_bytes:
                raise MediaError(url, f"more than {max_bytes:,} bytes, the most that are read. Shrink the file.")
            if not chunk:
                break
        if expected is not None and len(content) < expected:
            raise MediaError(url, f"the connection ended after {len(content):,} of {expected:,} bytes.")
        return bytes(content)


def check_url(url: str, at: str) -> tuple[str, int, str]:
    """Host, port and path of `at`, where `url` (what errors name) has led. Raises MediaError unless it is https."""
    try:
        parts = urlsplit(at)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MediaError(url, f"is not an address ({error}).") from error
    if parts.scheme != "https":
        led = "" if at == url else f" leads to {at[:200]}, and"
        raise MediaError(url, f"{led} only https addresses are fetched.".strip())
    if not host or parts.username is not None or not at.isascii() or any(ord(letter) <= 32 for letter in at):
        raise MediaError(url, "is not an address of the form https://host/path.")
    return host, port or 443, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def public_addresses(url: str, host: str, port: int) -> list[Address]:
    """Where `host` is. Raises MediaError if any of its addresses is not on the public internet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError(url, f"the host {host} cannot be found ({error}).") from error
    for _, _, _, _, where in found:
        if not is_public(str(where[0])):
            raise MediaError(
                url,
                f"the host {host} is at {where[0]}, which is not on the public internet. Such addresses are never "
                "fetched: download the file into the dataset's folder and name its path.",
            )
    return [(family, where) for family, _, _, _, where in found]


def is_public(text: str) -> bool:
    """Is this address on the public internet? An IPv6 address that carries an IPv4 address is judged by both."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        carried = [one for one in inner if one is not None]
        if carried:
            return all(is_public(str(one)) for one in carried)
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Connection(http.client.HTTPSConnection):
    """To an address that has been checked; the certificate must be that of the name."""

    def __init__(self, host: str, port: int, addresses: list[Address], timeout: float):
        super().__init__(host, port, timeout=timeout, context=tls_context())
        self._addresses = addresses
        self._patience = timeout

    def connect(self) -> None:
        for number, (family, where) in enumerate(self._addresses, start=1):
            plain = socket.socket(family, socket.SOCK_STREAM)
            try:
                plain.settimeout(self._patience)
                plain.connect(where)
                self.sock = tls_context().wrap_socket(plain, server_hostname=self.host)
                return
            except OSError:
                plain.close()
                if number == len(self._addresses):
                    raise


def _connection(url: str, at: str, deadline: float) -> tuple[_Connection, str]:
    host, port, path = check_url(url, at)
    addresses = public_addresses(url, host, port)
    return _Connection(host, port, addresses, max(0.001, deadline - time.monotonic())), path


def tls_context() -> ssl.SSLContext:
    """The system's certificates, and nothing less than what Python asks for by default."""
    return ssl.create_default_context()
