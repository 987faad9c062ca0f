"""uvicorn's HTTP parser with what it lacks: bounds for the head of a request, a deadline for who takes no answer.

    connected ──► head arrives ──► headers complete: the application's turn ──► response ──► kept alive ──► head …
                  ▲ HEAD_TIMEOUT, MAX_HEAD_BYTES                               ▲ send_timeout ▲ uvicorn's timeout

Without them a client that sends a byte a minute, or headers without end, or that reads nothing, holds a connection
or memory for ever.
"""

from __future__ import annotations

import asyncio
import logging
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem.common.errors import Overloaded
from tandem.router.responses import error_response

log = logging.getLogger("tandem.router")

HEAD_TIMEOUT = 10.0  # seconds
MAX_HEAD_BYTES = 16 << 10
REFUSED_TIMEOUT = 1.0  # seconds that a connection too many may be silent
RESERVED_FILES = 256  # at most: for the connections to workers and Redis, and for refusing
_REFUSAL = error_response(Overloaded("this router has no room for another connection; try again", retry_after=1.0))


def max_connections() -> int:
    """Of clients. Were they allowed every file descriptor, none would be left to find a new worker with."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if files == resource.RLIM_INFINITY else files - min(RESERVED_FILES, files // 2)


class BoundedProtocol(HttpToolsProtocol):
    """Invariant: `_deadline` runs exactly while the head of a request is due, or anything of a connection that is one
    too many; `_send_deadline` exactly while bytes wait that the client's side of the connection does not take."""

    send_timeout = 30.0  # seconds
    max_connections = max_connections()
    _refused = False
    _deadline: asyncio.TimerHandle | None = None
    _send_deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that pause_writing tells of every byte that waits
        self._refused = len(self.connections) > self.max_connections
        if self._refused:  # with its first bytes: closed with bytes unread, it would be reset, and see no answer
            self._deadline = self.loop.call_later(REFUSED_TIMEOUT, transport.close)
        else:
            self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._refuse()
            return
        super().data_received(data)
        if self._deadline is not None:  # still no end of the head in sight
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's headers are too large.")

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            head = "".join(f"{name}: {value}\r\n" for name, value in _REFUSAL.headers.items())
            self.transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n" + head.encode())
            self.transport.write(b"\r\n" + bytes(_REFUSAL.body))
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_progress()

    def resume_writing(self) -> None:
        self._stop_sending()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_sending()
        super().connection_lost(exc)

    def _expect_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.call_later(self.send_timeout, self._check_progress, unsent)

    def _check_progress(self, unsent: int) -> None:
        """Nothing is written while writing is paused, so what waits can only become less."""
        if self.transport.get_write_buffer_size() < unsent:
            self._expect_progress()
        else:
            log.warning("a client took no byte for %g s; its connection was cut", self.send_timeout)
            self.transport.abort()  # close() would wait for the client

    def _stop_sending(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def _expect_head(self) -> None:
        self._stop()
        self._head_bytes = 0
        self._deadline = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def _too_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.close()
        else:  # the answer to the request before goes on
            self._expect_head()

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded_protocol(send_timeout: float) -> type[BoundedProtocol]:
    """A class for uvicorn, which makes one instance of it per connection. `send_timeout`: seconds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"send_timeout": send_timeout})
