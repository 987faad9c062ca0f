"""A TCP proxy that is a bad network: slow, narrow, cut one way, flipping bits, ending connections.

    client ──up──► proxy ──up──► target          per connection and direction:
    client ◄─down─ proxy ◄─down─ target          read ─► queue of (when it is due, bytes) ─► faults ─► write

Faults may be changed while it runs, and act on connections that are open as on those that come. It runs on a thread
of its own with an event loop of its own. What it decides by chance comes from one seed.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tandem.common.errors import ConfigError

Direction = Literal["up", "down"]  # to the target, to the client
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

PIECE = 64 << 10  # bytes read at a time
PIECES_IN_FLIGHT = 256  # read and not yet written, per connection and direction; behind them the sender waits
SLICES = 50  # a second, at which a narrow link passes bytes
TIMEOUT = 5.0  # seconds for the loop to do what it is asked
FLUSH = 1.0  # seconds that a connection's last bytes get to leave
_LINGER_RESET = struct.pack("ii", 1, 0)  # close() then sends RST


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one direction suffers. Bytes count from 0, per connection, from its begin or from when this was set."""

    delay: float = 0.0  # seconds that every byte is under way
    jitter: float = 0.0  # … and up to so many more, by chance; the order stays
    rate_bytes_per_s: float | None = None
    drop: bool = False  # a black hole: nothing passes. As after lost packets, it arrives once this is healed
    corrupt_at: int | None = None  # one bit of this byte is flipped
    corrupt_every: int | None = None  # one bit of every so manyth byte is flipped
    truncate_at: int | None = None  # so many bytes pass, then both ends see the connection closed
    reset: bool = False  # RST to both ends, also of connections that come
    half_close: bool = False  # end of stream in this direction, the other goes on

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        counts = (self.delay, self.jitter, self.corrupt_at or 0, self.truncate_at or 0)
        if min(counts) < 0 or min(self.rate_bytes_per_s or 1, self.corrupt_every or 1) <= 0:
            raise ConfigError(f"{self}: no number of a fault is negative")


HEALTHY = Fault()


@dataclass(eq=False, slots=True)
class _Lane:
    """One direction of one connection."""

    direction: Direction
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    queue: asyncio.Queue[tuple[float, bytes]]  # b"" is the end
    passed: int = 0  # bytes since the fault was set
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # another fault


class FaultProxy(AbstractContextManager["FaultProxy"]):
    """Listens on 127.0.0.1:`port` from the constructor on, until `close`. Raises ConfigError when it cannot."""

    def __init__(self, target_host: str, target_port: int, *, listen_port: int = 0, seed: int = 0) -> None:
        self._target = (target_host, target_port)
        self._random = random.Random(seed)
        self._faults: dict[Direction, Fault] = dict.fromkeys(DIRECTIONS, HEALTHY)
        self._lanes: set[_Lane] = set()
        self._serving: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        try:
            listener = socket.create_server(("127.0.0.1", listen_port))
        except OSError as exc:
            self._loop.close()
            raise ConfigError(f"cannot listen on 127.0.0.1:{listen_port}: {exc}; choose another port") from exc
        self.port: int = listener.getsockname()[1]
        listener.setblocking(False)
        self._thread.start()
        self._listener = listener
        self._loop.call_soon_threadsafe(self._loop.add_reader, listener, self._accept)

    def set(self, direction: Direction | Literal["both"], fault: Fault) -> None:
        """Instead of what was set before; in force when this returns. From any thread."""
        directions = DIRECTIONS if direction == "both" else (direction,)
        asyncio.run_coroutine_threadsafe(self._set(directions, fault), self._loop).result(TIMEOUT)

    def heal(self) -> None:
        """Both directions; what was held back passes."""
        self.set("both", HEALTHY)

    def close(self) -> None:
        """End every connection and the thread."""
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ on the loop

    async def _set(self, directions: Iterable[Direction], fault: Fault) -> None:
        for direction in directions:
            self._faults[direction] = fault
        for lane in [lane for lane in self._lanes if lane.direction in directions]:
            lane.passed = 0
            lane.changed.set()
            self._strike(lane)

    def _strike(self, lane: _Lane) -> None:
        """Faults that do not wait for bytes."""
        fault = self._faults[lane.direction]
        if fault.reset:
            _reset(lane.writer)
        elif fault.half_close:
            _end_of_stream(lane.writer)

    async def _shut_down(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _accept(self) -> None:
        with suppress(OSError):  # it has gone again
            near, _ = self._listener.accept()
            task = self._loop.create_task(self._serve(near))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            task.add_done_callback(lambda _: near.close())  # also when it never began

    async def _serve(self, near: socket.socket) -> None:
        near.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=near)
        try:
            if any(fault.reset for fault in self._faults.values()):
                _reset(writer)
            else:
                await self._relay(reader, writer)
        finally:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)  # as the target would
            return
        up = _Lane("up", reader, far_writer, asyncio.Queue(PIECES_IN_FLIGHT))
        down = _Lane("down", far_reader, writer, asyncio.Queue(PIECES_IN_FLIGHT))
        await self._join(up, down)

    async def _join(self, *lanes: _Lane) -> None:
        """Until both directions ended, or one was truncated or broke. Both are closed then, also when cancelled."""
        self._lanes.update(lanes)
        try:
            await self._carry(lanes)
            await asyncio.gather(*(_flush(lane.writer) for lane in lanes))
        finally:
            self._lanes.difference_update(lanes)
            for lane in lanes:
                lane.writer.transport.abort()

    async def _carry(self, lanes: Sequence[_Lane]) -> None:
        for lane in lanes:
            self._strike(lane)
        parts = [asyncio.create_task(part) for lane in lanes for part in (self._take(lane), self._give(lane))]
        try:
            with suppress(OSError):  # ConnectionError and friends: a broken end ends the other
                await asyncio.gather(*parts)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _take(self, lane: _Lane) -> None:
        while True:
            piece = await lane.reader.read(PIECE)
            fault = self._faults[lane.direction]
            later = fault.delay + self._random.uniform(0.0, fault.jitter)
            await lane.queue.put((self._loop.time() + later, piece))
            if not piece:
                return

    async def _give(self, lane: _Lane) -> None:
        while True:
            due, piece = await lane.queue.get()
            await asyncio.sleep(due - self._loop.time())
            if not piece:
                await self._opened(lane)
                _end_of_stream(lane.writer)
                return
            while piece:
                piece = await self._pass(lane, piece)

    async def _pass(self, lane: _Lane, piece: bytes) -> bytes:
        """Write as much as the fault of this moment lets through at once; what is left."""
        await self._opened(lane)
        fault = self._faults[lane.direction]
        if fault.half_close:
            return b""
        rate = fault.rate_bytes_per_s
        count = len(piece) if rate is None else min(len(piece), max(1, round(rate / SLICES)))
        if fault.truncate_at is not None:
            count = min(count, fault.truncate_at - lane.passed)
        lane.writer.write(self._corrupted(piece[:count], lane.passed, fault))
        await lane.writer.drain()
        lane.passed += count
        if fault.truncate_at is not None and lane.passed >= fault.truncate_at:
            raise ConnectionAbortedError("truncated on purpose")
        if rate is not None:
            await asyncio.sleep(count / rate)
        return piece[count:]

    async def _opened(self, lane: _Lane) -> None:
        """Wait while the direction is a black hole."""
        while self._faults[lane.direction].drop:
            lane.changed.clear()
            await lane.changed.wait()

    def _corrupted(self, piece: bytes, start: int, fault: Fault) -> bytes:
        wrong: list[int] = [] if fault.corrupt_at is None else [fault.corrupt_at - start]
        if fault.corrupt_every is not None:
            wrong += range(fault.corrupt_every - 1 - start % fault.corrupt_every, len(piece), fault.corrupt_every)
        changed = bytearray(piece)
        for index in wrong:
            if 0 <= index < len(piece):
                changed[index] ^= 1 << self._random.randrange(8)
        return bytes(changed)


async def _flush(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(FLUSH):
            await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    writer.transport.abort()


def _end_of_stream(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()


# ---------------------------------------------------------------------------------------------- the command

_NUMBERS: dict[str, type[float] | type[int]] = {
    "delay": float, "jitter": float, "rate_bytes_per_s": float,
    "corrupt_at": int, "corrupt_every": int, "truncate_at": int,
}  # fmt: skip
_FLAGS = ("drop", "reset", "half_close")


def parse_fault(line: str) -> tuple[Direction | Literal["both"], Fault]:
    """`up delay=0.2 jitter=0.1`, `both drop`, `down corrupt_every=64`, `heal`. Raises ConfigError."""
    direction, *settings = line.split() or [""]
    if direction == "heal" and not settings:
        return "both", HEALTHY
    if direction not in (*DIRECTIONS, "both"):
        raise ConfigError(f"{line!r} begins with none of up, down, both, heal")
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        try:
            values[name] = True if name in _FLAGS and not equals else _NUMBERS[name](value)
        except (KeyError, ValueError) as exc:
            known = ", ".join((*(f"{name}=N" for name in _NUMBERS), *_FLAGS))
            raise ConfigError(f"{setting!r} is no fault; the faults are {known}") from exc
    return direction, Fault(**values)


def run(target: str, listen_port: int, seed: int) -> None:
    """The proxy in the foreground, commanded by lines on stdin, until their end or Ctrl-C. Raises ConfigError."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{target!r} is no HOST:PORT")
    with FaultProxy(host, int(port), listen_port=listen_port, seed=seed) as proxy, suppress(KeyboardInterrupt):
        print(f"127.0.0.1:{proxy.port} -> {target}", flush=True)
        for line in filter(str.strip, sys.stdin):
            try:
                direction, fault = parse_fault(line)
            except ConfigError as exc:
                print(f"tandem: error: {exc.message}", file=sys.stderr, flush=True)
            else:
                proxy.set(direction, fault)
                print(f"{direction}: {fault}", flush=True)
