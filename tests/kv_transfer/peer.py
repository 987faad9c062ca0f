"""The other end of a pair in the tests: in this process, or in a process of its own (`python peer.py FD`).

D's end here does what a decode worker does: it grants what it is asked for, keeps the account (Landing), and copies
what a two-sided connector received. And it reports: for each frame a Manifest with the SHA-256 of every row, for a
verified Manifest one with the SHA-256 of every granted block as it lies in the cache, then an Ack; else an Abort.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

import msgpack
import torch
from torch import Tensor

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Abort, Ack, Frame, Grant, Manifest, Message, Refuse, Reserve, decode, encode
from tandem.common.kv_layout import KVLayout
from tandem.engine.kv_cache import PagedKVCache
from tandem.kv_transfer.base import Channel, Receiver, Sender
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.landing import Landing
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.registry import CONNECTORS

UNTOUCHED = 0xEE  # every byte of D's cache before anything lands
CONTENT = b"content"  # the ticket of a Reserve that D answers with the SHA-256 of its whole cache


class SocketChannel:
    """A Channel over a stream socket: length-prefixed messages. To a stopped peer it takes a few hundred messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        data = encode(message)
        try:
            with self._lock:
                self._sock.sendall(len(data).to_bytes(4, "big") + data)
        except OSError as exc:
            raise TransferFailed("channel closed") from exc

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        threading.Thread(target=self._read, args=(on_message, on_close), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer was first
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        with contextlib.suppress(OSError), self._sock, self._sock.makefile("rb") as stream:
            while head := stream.read(4):
                on_message(decode(stream.read(int.from_bytes(head, "big"))))
        on_close("socket closed")


def sha256_rows(rows: Tensor) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(row.cpu().numpy().tobytes()).digest() for row in rows)


def make_store(layout: KVLayout, num_blocks: int, device: torch.device, fill: int = 0) -> PagedKVCache:
    store = PagedKVCache(layout, num_blocks, device)
    store.memory.fill_(fill)
    return store


def context_of(channel: Channel, store: PagedKVCache) -> Context:
    return Context(channel, store.layout, store.memory.device, memory=store.memory, fd=store.fd)


def wish(transfer_id: bytes, generation: int, first_block: int, blocks: Sequence[int]) -> Reserve:
    """Asks this D for these very blocks."""
    ticket = msgpack.packb([generation, first_block, *blocks])
    assert ticket is not None
    return Reserve(transfer_id, ticket, 0)


class Decoder:
    """D's end of a link."""

    def __init__(
        self, context: Context, receiver: Receiver, store: PagedKVCache, on_lost: Callable[[str], None], timeout: float
    ) -> None:
        self.store = store
        self.seen: list[Message] = []  # what it was given, in order
        self.landings: dict[bytes, tuple[Landing, list[int]]] = {}
        self.link = LandLink(context, receiver, self.on_message, self.on_frame, on_lost, timeout)

    def on_message(self, message: Message) -> None:
        self.seen.append(message)
        if isinstance(message, Reserve) and message.ticket == CONTENT:
            content = hashlib.sha256(self.store.memory.cpu().numpy().tobytes()).hexdigest()
            self.link.post(Refuse(message.transfer_id, False, content))
        elif isinstance(message, Reserve):
            generation, first_block, *blocks = msgpack.unpackb(message.ticket)
            self.grant(message.transfer_id, generation, first_block, blocks)
        elif isinstance(message, Abort):
            self.forget(message.transfer_id)
        elif isinstance(message, Manifest):
            self.finish(message)

    def grant(self, transfer_id: bytes, generation: int, first_block: int, blocks: list[int]) -> Grant:
        layout = self.store.layout
        targets = tuple(blocks) if self.link.one_sided else ()
        grant = Grant(transfer_id, generation, first_block, len(blocks), layout.block_size, targets)
        self.landings[transfer_id] = Landing(grant, blocks, 0, (), layout), blocks
        self.link.grant(grant, blocks)
        return grant

    def on_frame(self, frame: Frame, payload: Payload) -> None:
        self.seen.append(frame)
        try:
            local = self.landings[frame.transfer_id][0].accept(frame)
        except TransferFailed as exc:
            self.abort(frame, exc)
            return
        if not self.link.one_sided:
            self.store.write(local, payload.tensor(), frame.first_layer, frame.num_layers)
        rows, layers = sha256_rows(payload.tensor()), (frame.first_layer, frame.num_layers)
        self.link.post(Manifest(frame.transfer_id, frame.generation, frame.first_block, rows, frame.digests, layers))

    def finish(self, manifest: Manifest) -> None:
        landing, blocks = self.landings[manifest.transfer_id]
        try:
            landing.verify(manifest)
        except TransferFailed as exc:
            self.abort(manifest, exc)
            return
        rows = sha256_rows(self.store.read(blocks))
        self.link.post(Manifest(manifest.transfer_id, manifest.generation, 0, rows, (), ()))
        self.link.post(Ack(manifest.transfer_id, manifest.generation))
        self.forget(manifest.transfer_id)

    def abort(self, message: Frame | Manifest, exc: TransferFailed) -> None:
        self.forget(message.transfer_id)
        self.link.post(Abort(message.transfer_id, message.generation, exc.message))

    def forget(self, transfer_id: bytes) -> None:
        self.landings.pop(transfer_id, None)
        self.link.revoke(transfer_id)


# ------------------------------------------------------------------------------------------- the process of its own


def report(connector: str, channel: Channel, store: PagedKVCache) -> Decoder:
    """D."""
    context = context_of(channel, store)
    decoder = Decoder(context, CONNECTORS[connector]().receiver(context), store, lambda reason: None, 20.0)
    decoder.link.open()
    return decoder


def stop() -> None:
    """The whole process, and not one step later than here: a signal to the process may stop another thread first."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def stop_in_receive(connector: str, channel: Channel, store: PagedKVCache) -> Decoder:
    """D, which stops (SIGSTOP) when the first header is there and nothing has been received."""
    context = context_of(channel, store)

    class Stopping:
        def __init__(self, inner: Receiver) -> None:
            self.one_sided, self.open, self.close = inner.one_sided, inner.open, inner.close

        def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
            stop()
            raise TransferFailed("continued")

    receiver = Stopping(CONNECTORS[connector]().receiver(context))
    decoder = Decoder(context, receiver, store, lambda reason: None, 20.0)
    decoder.link.open()
    return decoder


def stop_in_send(connector: str, channel: Channel, store: PagedKVCache) -> PushLink:
    """P, which stops with the first payload half out: its header sent (two-sided), or its bytes written (one-sided)."""
    context = context_of(channel, store)
    payload = Payload(store.memory, [0], 0, store.layout.block_bytes)

    class Stopping:
        def __init__(self, inner: Sender) -> None:
            self.inner, self.one_sided, self.open, self.close = inner, inner.one_sided, inner.open, inner.close

        def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
            if self.one_sided:
                self.inner.send(frame, payload, targets, timeout)
            stop()

    def on_message(message: Message) -> None:
        if isinstance(message, Grant):
            link.push(message.transfer_id, 1, Piece(0, payload, 0, store.layout.layers, message.targets))

    link = PushLink(context, Stopping(CONNECTORS[connector]().sender(context)), on_message, lambda reason: None, 20.0)
    link.open()
    link.reserve(wish(b"t" * 16, 1, 0, [0]))
    return link


def serve(control: socket.socket) -> None:
    """One request per packet: mode, connector, device, blocks and layout; the pair's socket comes along with it."""
    modes = {mode.__name__: mode for mode in (report, stop_in_receive, stop_in_send)}
    kept: list[object] = []
    while True:
        data, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not data:
            return
        mode, connector, device, num_blocks, dtype, *shape = data.decode().split()
        layout = KVLayout("test", dtype, *map(int, shape))
        store = make_store(layout, int(num_blocks), torch.device(device), UNTOUCHED)
        kept.append(modes[mode](connector, SocketChannel(socket.socket(fileno=fds[0])), store))


def fork(control: socket.socket) -> None:
    """A process for each socket that comes, without the seconds it takes to import torch. Answers with its number."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            serve(socket.socket(fileno=fds[0]))
            os._exit(0)
        os.close(fds[0])
        control.send(str(pid).encode())


if __name__ == "__main__":
    fork(socket.socket(fileno=int(sys.argv[1])))
