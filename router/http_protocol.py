"""uvicorn's HTTP parser with what it lacks: a deadline and a size for the head of a request.

    connected ──► head arrives ──► headers complete: the application's turn ──► response ──► kept alive ──► head …
                  ▲ HEAD_TIMEOUT, MAX_HEAD_BYTES                                              ▲ uvicorn's timeout

Without them a client that sends a byte a minute, or headers without end, holds a connection or memory for ever.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT = 10.0  # seconds
MAX_HEAD_BYTES = 16 << 10


class BoundedHeadProtocol(HttpToolsProtocol):
    """Invariant: `_deadline` runs exactly while the head of a request is due."""

    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None:  # still no end of the head in sight
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's headers are too large.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

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
