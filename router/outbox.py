"""Bytes on their way to a client that may read slower than the workers generate, or leave."""

from __future__ import annotations

import asyncio

from tandem.common.errors import TandemError

LIMIT = 256  # pieces that may wait; behind them the legs wait


class Outbox:
    """One producer, one consumer. `put` never blocks; a producer that goes on without `room` is not stopped."""

    def __init__(self) -> None:
        self.error: TandemError | None = None  # why the producer ended, if not regularly
        self._pieces: list[bytes] = []
        self._closed = False
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()

    def put(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._filled.set()

    def close(self, error: TandemError | None = None) -> None:
        """The first one counts."""
        if not self._closed:
            self._closed, self.error = True, error
            self._filled.set()

    async def room(self) -> None:
        """Wait until the consumer has caught up; how long it may take is the consumer's to limit."""
        while len(self._pieces) >= LIMIT:
            self._drained.clear()
            await self._drained.wait()

    async def take(self, timeout: float) -> bytes | None:
        """Everything that waits, joined; b"" after `timeout` seconds of silence; None when closed and empty."""
        if not self._pieces and not self._closed:
            self._filled.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._filled.wait()
            except TimeoutError:
                return b""
        if not self._pieces:
            return None
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._drained.set()
        return data
