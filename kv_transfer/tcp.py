"""The `tcp` connector: several streams from P to D, which need nothing but an address that P can reach.

    D   listens on Context.host, an ephemeral port ── address, random token ──► P, over the pair's channel
    P   connects STREAMS times

    stream   D → P  nonce                          a stranger at either end proves nothing, gets no payload, and
             P → D  its number, nonce, proof       holds nobody up: who does not prove itself in HELLO_SECONDS is
             D → P  proof                          hung up on

    frame    pieces of PIECE_BYTES, dealt out to the streams in turn: piece k goes over stream k mod STREAMS
    piece    header (frame's number, offset, length) · bytes

A proof is an HMAC-SHA-256 of both nonces under the token. Payloads are neither encrypted nor authenticated: the
digests in the frames protect what lands. A stream that failed once is between two bytes of something: it is closed.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from numpy.typing import NDArray

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.rendezvous import Mailbox

STREAMS = 4
PIECE_BYTES = 1 << 20
GATHER_BELOW = 32 << 10  # bytes; shorter rows are copied together first, which is faster than a buffer for each
HELLO_SECONDS = 5.0
MAX_GUESTS = 32  # who may be proving themselves at a time; the others wait to be accepted
USER_TIMEOUT = 10_000  # ms a host may leave bytes unacknowledged before the kernel gives it up
_BUFFERS = 64  # of one sendmsg

_HEADER = struct.Struct("!QQQ")  # frame's number, offset, length
_NONCE_BYTES, _PROOF_BYTES = 16, 32

# One stream's part in something. It yields whenever its socket has to be waited for, and never blocks.
Job = Generator[None, None, int | None]


def domain(context: Context) -> str:
    return "tcp/1"  # of what is written on the wire


@dataclass(frozen=True, slots=True)
class _Address:
    """Where D waits for P's streams, and the secret that both know then."""

    host: str  # numeric
    port: int
    token: bytes = field(repr=False)

    def publish(self, mailbox: Mailbox) -> None:
        mailbox.publish("tcp/token", self.token)
        mailbox.publish("tcp/address", f"{self.host} {self.port}".encode())

    @classmethod
    def take(cls, mailbox: Mailbox, deadline: float) -> _Address:
        """Raises TransferFailed."""
        text, token = mailbox.take("tcp/address", deadline), mailbox.take("tcp/token", deadline)
        with contextlib.suppress(ValueError):
            host, port = text.decode().split(" ")
            if 0 < int(port) < 1 << 16:
                return cls(str(ipaddress.ip_address(host)), int(port), token)
        raise TransferFailed("KV data path: the peer's address cannot be read; it speaks another protocol version")

    def proof(self, role: bytes, nonces: bytes, number: int) -> bytes:
        return hmac.digest(self.token, role + nonces + bytes([number]), "sha256")


class _End:
    """The sockets of one end. One thread opens and moves; `close` may come from any other.

    A closed socket's number may be somebody else's at once. So while an operation is under way, `close` only shuts the
    sockets down, which wakes it, and the operation closes them behind itself.
    """

    one_sided = False

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._busy = False
        self._closed = False
        self._sockets: list[socket.socket] = []  # all there are; while setting up, the listener and guests too
        self._streams: list[socket.socket] = []  # in the order of their numbers
        self._frames = 0  # moved so far; the same at both ends, as headers arrive in order

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._busy:
                self._dispose()
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # not connected yet, or not any more
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _using(self, action: str) -> Generator[None]:
        """An operation on the sockets. When one fails there is no other. Raises TransferFailed."""
        with self._lock:
            if self._closed:
                raise TransferFailed("KV data path: closed")
            self._busy = True
        try:
            yield
        except (OSError, TransferFailed) as exc:
            reason = "closed meanwhile" if self._closed else exc
            self._closed = True
            raise TransferFailed(f"KV data path: {action} failed: {reason}") from exc
        finally:
            with self._lock:
                self._busy = False
                if self._closed:
                    self._dispose()

    def _move(self, jobs: Iterable[Job], event: int, deadline: float) -> None:
        _drive(dict(zip(self._streams, jobs, strict=True)), event, deadline)
        self._frames += 1

    def _own(self, sock: socket.socket) -> socket.socket:
        """From now on `close` reaches it. Buffers are left to the kernel; a size once set would be the limit."""
        with self._lock:
            self._sockets.append(sock)  # closed already? then it is disposed of with the others
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
        if self._closed:
            raise TransferFailed("closed")
        return sock

    def _disown(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.remove(sock)
            sock.close()

    def _dispose(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()


class TcpSender(_End):
    """Sends rows from where they lie; small ones, and those of a device, from one copy on the host."""

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        address = _Address.take(self._context.mailbox, deadline)
        with self._using(f"connecting to {address.host} port {address.port}"):
            self._streams = [self._connect(address, deadline) for _ in range(STREAMS)]
            jobs = [_introduce(sock, address, number) for number, sock in enumerate(self._streams)]
            _drive(dict(zip(self._streams, jobs, strict=True)), select.POLLIN, deadline)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        """Raises TransferFailed. Behind it the kernel has every byte, in memory of its own."""
        deadline = time.monotonic() + timeout
        with self._using(f"sending {payload.nbytes} bytes within {timeout:g} s"):
            pieces = list(_pieces(_runs(payload)))
            jobs = (_put(sock, self._frames, pieces[number::STREAMS]) for number, sock in enumerate(self._streams))
            self._move(jobs, select.POLLOUT, deadline)

    def _connect(self, address: _Address, deadline: float) -> socket.socket:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = self._own(socket.socket(family, socket.SOCK_STREAM))
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.connect((address.host, address.port))
        sock.setblocking(False)
        return sock


class TcpReceiver(_End):
    """Receives into fresh host memory (pinned, for a CUDA device); nothing is copied."""

    def open(self, timeout: float) -> None:
        """Raises TransferFailed, or ConfigError for a host that cannot be listened on."""
        deadline = time.monotonic() + timeout
        with self._using("waiting for the peer's streams"):
            listener = self._own(_listener(self._context.host))
            host, port = listener.getsockname()[:2]
            address = _Address(host, port, secrets.token_bytes(32))
            address.publish(self._context.mailbox)
            self._streams = self._welcome(listener, address, deadline)
            self._disown(listener)

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        shape = (frame.num_blocks, frame.num_bytes // frame.num_blocks)
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=self._context.device.type == "cuda")
        with self._using(f"receiving {frame.num_bytes} bytes within {timeout:g} s"):
            pieces = list(_pieces([_bytes(memory.numpy())]))
            jobs = (_take(sock, self._frames, pieces[number::STREAMS]) for number, sock in enumerate(self._streams))
            self._move(jobs, select.POLLIN, deadline)
        return Payload.whole(memory)

    def _welcome(self, listener: socket.socket, address: _Address, deadline: float) -> list[socket.socket]:
        """The streams that proved to be P's, by number; everybody else is hung up on."""
        guests: dict[socket.socket, _Guest] = {}
        streams: dict[int, socket.socket] = {}
        while len(streams) < STREAMS:
            until = min([deadline, *(guest.until for guest in guests.values())])
            doors = [listener] if len(guests) < MAX_GUESTS else []
            for sock in _readable([*doors, *guests], until):
                if sock is listener:
                    with contextlib.suppress(BlockingIOError, ConnectionError):  # who left while waiting
                        guest = self._own(listener.accept()[0])
                        guests[guest] = _Guest(_greet(guest, address))
                elif guests[sock].proves_itself():
                    streams[guests.pop(sock).number] = sock
            if time.monotonic() >= deadline:
                raise TransferFailed("the peer did not connect in time; it must be able to reach this end's --host")
            for sock in [sock for sock, guest in guests.items() if time.monotonic() >= guest.until]:
                del guests[sock]
                self._disown(sock)
        for sock in guests:
            self._disown(sock)
        return [streams[number] for number in range(STREAMS)]


class _Guest:
    """Somebody who connected to D and may prove to be P."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.until = time.monotonic() + HELLO_SECONDS
        self.number = -1  # of the stream it proved to be
        self.proves_itself()  # up to the first wait

    def proves_itself(self) -> bool:
        """Whether it has; call it when there is something to read."""
        try:
            next(self._job)
        except StopIteration as done:
            self.number = done.value
            return True
        except (OSError, TransferFailed):
            self.until = 0.0  # out
        return False


def _greet(sock: socket.socket, address: _Address) -> Job:
    """D's part: let P prove itself, then do so too. The stream's number. Raises TransferFailed."""
    mine, hello = secrets.token_bytes(_NONCE_BYTES), bytearray(1 + _NONCE_BYTES + _PROOF_BYTES)
    sock.sendall(mine)  # a few bytes always fit into an empty buffer
    yield from _fill(sock, memoryview(hello))
    number, nonces = hello[0], mine + bytes(hello[1 : 1 + _NONCE_BYTES])
    if number >= STREAMS or not hmac.compare_digest(hello[-_PROOF_BYTES:], address.proof(b"P", nonces, number)):
        raise TransferFailed("somebody who is not the peer connected")
    sock.sendall(address.proof(b"D", nonces, number))
    return number


def _introduce(sock: socket.socket, address: _Address, number: int) -> Job:
    """P's part, on one stream. Raises TransferFailed."""
    theirs, answer, mine = bytearray(_NONCE_BYTES), bytearray(_PROOF_BYTES), secrets.token_bytes(_NONCE_BYTES)
    yield from _fill(sock, memoryview(theirs))
    nonces = bytes(theirs) + mine
    sock.sendall(bytes([number]) + mine + address.proof(b"P", nonces, number))
    yield from _fill(sock, memoryview(answer))
    if not hmac.compare_digest(answer, address.proof(b"D", nonces, number)):
        raise TransferFailed("who listens there is not the peer")


def _put(sock: socket.socket, frame: int, pieces: Iterable[tuple[int, list[memoryview]]]) -> Job:
    buffers: deque[memoryview] = deque()
    for offset, parts in pieces:
        buffers.append(memoryview(_HEADER.pack(frame, offset, sum(map(len, parts)))))
        buffers.extend(parts)
    while buffers:
        yield
        with contextlib.suppress(BlockingIOError):
            sent = sock.sendmsg(islice(buffers, _BUFFERS))
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.popleft())
            if sent:
                buffers[0] = buffers[0][sent:]


def _take(sock: socket.socket, frame: int, pieces: Iterable[tuple[int, list[memoryview]]]) -> Job:
    """Not a byte is accepted behind a header that is not the expected one. Raises TransferFailed."""
    for offset, (part,) in pieces:
        header, expected = bytearray(_HEADER.size), (frame, offset, len(part))
        yield from _fill(sock, memoryview(header))
        if (got := _HEADER.unpack(header)) != expected:
            raise TransferFailed(f"the two ends are out of step: (frame, offset, length) is {got}, not {expected}")
        yield from _fill(sock, part)


def _fill(sock: socket.socket, rest: memoryview) -> Job:
    while rest:
        yield
        with contextlib.suppress(BlockingIOError):
            count = sock.recv_into(rest)
            if not count:
                raise TransferFailed("the peer closed the connection")
            rest = rest[count:]


def _drive(jobs: dict[socket.socket, Job], event: int, deadline: float) -> None:
    """Go on with each stream's job whenever its socket is ready. Raises TransferFailed at the deadline."""
    poll = select.poll()
    waiting: dict[int, Job] = {}
    for sock, job in jobs.items():
        if _goes_on(job):
            waiting[sock.fileno()] = job
            poll.register(sock, event)
    while waiting:
        ready = poll.poll(_milliseconds(deadline))
        if time.monotonic() >= deadline:
            raise TransferFailed("the peer was too slow, or does not answer")
        for fd, _ in ready:
            if not _goes_on(waiting[fd]):
                del waiting[fd]
                poll.unregister(fd)


def _goes_on(job: Job) -> bool:
    try:
        next(job)
    except StopIteration:
        return False
    return True


def _readable(sockets: list[socket.socket], until: float) -> list[socket.socket]:
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(_milliseconds(until))}
    return [sock for sock in sockets if sock.fileno() in ready]


def _runs(payload: Payload) -> Iterator[memoryview]:
    """The payload's bytes on the host, in order."""
    if payload.memory.device.type != "cpu":
        host = torch.empty((len(payload), payload.row_bytes), dtype=torch.uint8, pin_memory=True)
        yield _bytes(host.copy_(payload.tensor()).numpy())
    elif payload.row_bytes < GATHER_BELOW:
        yield _bytes(payload.tensor().numpy())
    else:
        memory = payload.memory.numpy()
        for row in payload.rows:
            yield _bytes(memory[row, payload.start : payload.stop])


def _pieces(runs: Iterable[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, its bytes in one or more parts) of each piece of a frame, in order."""
    offset, parts, room = 0, list[memoryview](), PIECE_BYTES
    for run in runs:
        while run:
            parts.append(run[:room])
            run = run[room:]
            room -= len(parts[-1])
            if not room:
                yield offset, parts
                offset, parts, room = offset + PIECE_BYTES, [], PIECE_BYTES
    if parts:
        yield offset, parts


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(cast(Any, array)).cast("B")  # numpy's stub hides its buffer


def _listener(host: str) -> socket.socket:
    """Raises ConfigError."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_unspecified:
            raise ConfigError(f"KV data path: {host} names no single address; give the worker's own with --host")
        return socket.create_server((str(where[0]), 0), family=family, backlog=STREAMS + MAX_GUESTS)
    except OSError as exc:
        raise ConfigError(f"KV data path: cannot listen on host {host!r}: {exc}") from exc


def _milliseconds(deadline: float) -> float:
    return max(0.0, (deadline - time.monotonic()) * 1000)
