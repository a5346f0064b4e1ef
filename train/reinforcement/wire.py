"""JSON over HTTP, one connection for each request: what talking to an inference server takes, and no more.

No state is kept between requests, so event loops may come and go, a server that restarts is no special case, and a task
that is cancelled closes its connection, by which vLLM knows that nobody waits any more.
"""

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CONNECT_S = 10.0


class Unreachable(Exception):
    """No answer came: refused, broken off, or none in time. Nobody knows what became of the request."""


class Reply(NamedTuple):
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Raises ValueError: it is no JSON."""
        return json.loads(self.body)

    def said(self, longest: int = 400) -> str:
        """What an error page says, for people."""
        try:
            found = self.json()
            found = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
            found = found.get("message", found) if isinstance(found, dict) else found
        except ValueError:
            found = self.body.decode("utf-8", "replace")
        text = found if isinstance(found, str) else json.dumps(found)
        return text if len(text) <= longest else f"{text[:longest]} ..."


async def ask(
    base: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """
    Args:
        base: http://host:port, perhaps with a path.
        body: sent as JSON; None sends nothing.

    Raises:
        Unreachable: no whole answer within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _exchange(base, method, path, body, headers or {})
    except TimeoutError as error:
        raise Unreachable(f"no answer within {timeout_s:g} s") from error
    except (OSError, EOFError, ValueError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error


async def _exchange(base: str, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
    url = urlsplit(base)
    secure = url.scheme == "https"
    connecting = asyncio.open_connection(
        url.hostname, url.port or (443 if secure else 80), ssl=ssl.create_default_context() if secure else None
    )
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await connecting
    try:
        payload = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": url.netloc.rpartition("@")[2], "Connection": "close", "Accept": "application/json", **headers}
        if body is not None:
            lines |= {"Content-Type": "application/json"}
        lines["Content-Length"] = str(len(payload))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"{method} {url.path.rstrip('/')}{path} HTTP/1.1\r\n{head}\r\n".encode() + payload)
        await writer.drain()
        return await _reply(reader)
    finally:
        writer.transport.abort()  # closing in good order would wait for a peer that may be gone


async def _reply(reader: asyncio.StreamReader) -> Reply:
    while True:
        _, status, *_ = (await _line(reader)).split(" ", 2)
        fields: dict[str, str] = {}
        while line := await _line(reader):
            name, _, value = line.partition(":")
            fields[name.strip().lower()] = value.strip()
        if not status.startswith("1"):  # 100 Continue precedes the answer
            break
    if fields.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int((await _line(reader)).partition(";")[0], 16):
            parts.append(await reader.readexactly(size))
            await _line(reader)
        return Reply(int(status), b"".join(parts))
    if "content-length" in fields:
        return Reply(int(status), await reader.readexactly(int(fields["content-length"])))
    return Reply(int(status), await reader.read())


async def _line(reader: asyncio.StreamReader) -> str:
    line = await reader.readuntil(b"\n")  # EOFError: the peer has closed
    return line.decode("latin-1").rstrip("\r\n")
