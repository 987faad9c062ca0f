"""HTTP/1.1 to one server at little cost a token: an event is read, parsed and timed in the socket's own callback, and
no task is woken in between. What goes wrong ends up in the answer: a load that fails in part is a result too."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import httpx

from tandem.cluster.bench.answer import Answer
from tandem.common.errors import ConfigError

GET_WITHIN = 10.0  # seconds
REUSE_WITHIN = 1.0  # seconds; servers close idle connections after five, most of them


def get(url: str, api_key: str | None) -> dict[str, Any]:
    """A JSON object, outside of what is measured. Raises ConfigError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=GET_WITHIN, trust_env=False).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        raise ConfigError(f"no answer from {url}: {str(exc) or type(exc).__name__}; is the server running?") from exc
    if not isinstance(answer, dict):
        raise ConfigError(f"{url} answers with something else than a JSON object")
    return cast(dict[str, Any], answer)


class Client:
    """Connections are kept and reused. Use as an asynchronous context, inside one event loop."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        """Raises ConfigError for what is no URL."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"{url!r} is not a URL: {exc}") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not a URL; write http://HOST:PORT or NAME=http://HOST:PORT")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname, port or (443 if self._ssl else 80))
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{key}Content-Type: application/json\r\n"
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.transport.abort()

    async def post(self, path: str, body: bytes, answer: Answer) -> None:
        """Fill `answer`. Of a server or a network that fails it says so itself; nothing is raised."""
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n".encode(
            "latin-1"
        )
        answer.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange(head + body, answer)
        except TimeoutError:
            answer.fail("timeout", f"no end within {self._timeout:g} s")
        except OSError as exc:
            answer.fail("connect", str(exc) or type(exc).__name__)
        answer.finish()

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        kept = self._kept()
        connection = kept or await self._connect()
        try:
            await connection.ask(request, answer)
            if connection is kept and connection.unheard:  # it closed behind its last answer: RFC 9112, 9.3.1
                answer.failure = None
                connection = await self._connect()
                await connection.ask(request, answer)
        except BaseException:
            connection.transport.abort()
            raise
        if connection.reusable:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)

    def _kept(self) -> _Connection | None:
        """Not one that has been idle for long: the server may be closing it at this very moment, and a request that is
        lost to that would look like a failure of the server."""
        while self._idle:
            connection = self._idle.pop()
            if time.monotonic() - connection.idle_since < REUSE_WITHIN and not connection.transport.is_closing():
                return connection
            connection.transport.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        host, port = self._address
        _, connection = await loop.create_connection(lambda: _Connection(self._idle), host, port, ssl=self._ssl)
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time. `ask` ends with the answer, or with the connection."""

    transport: asyncio.Transport
    _parser: httptools.HttpResponseParser
    _answer: Answer

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._done: asyncio.Future[None] | None = None
        self._status = 0
        self._refusal = b""
        self._now = 0.0
        self.reusable = False
        self.idle_since = 0.0

    async def ask(self, request: bytes, answer: Answer) -> None:
        self._answer = answer
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._status, self._refusal, self.reusable = 0, b"", False
        self.transport.write(request)
        await self._done

    @property
    def unheard(self) -> bool:
        """It was lost before the first byte of an answer."""
        return self._status == 0 and self.transport.is_closing()

    # ----------------------------------------------------------------------------------------------- from the transport
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():  # nobody asked
            self.transport.abort()
            return
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            cause = exc.__context__ or exc
            self._answer.fail("malformed", f"{type(cause).__name__}: {cause}, in {data[:80]!r}")
            self.transport.abort()
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self in self._idle:
            self._idle.remove(self)
        if self._done is None or self._done.done():
            return
        if self._status in (0, 200) and not self._answer.complete:
            reason = f": {exc}" if exc else ""
            self._answer.fail("disconnect", f"connection lost after {sum(self._answer.counts)} tokens{reason}")
        self._end()

    def _end(self) -> None:
        if self._done is None or self._done.done():
            return
        if self._status not in (0, 200):
            self._answer.fail(f"HTTP {self._status}", self._refusal.decode(errors="replace"))
        self._done.set_result(None)

    # -------------------------------------------------------------------------------------------------- from the parser
    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._answer.feed(body, self._now)
        else:
            self._refusal += body

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if not self.reusable:
            self.transport.close()
        self._end()
