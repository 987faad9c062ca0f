"""The other end of a pair in the tests: in this process, or in a process of its own (`python peer.py FD`).

D's end here reports what it got: for each frame a Manifest with the SHA-256 of every row, for a Manifest an Ack.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Ack, Frame, Manifest, Message, decode, encode
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel, Receiver
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.registry import create_receiver, create_sender

CPU = torch.device("cpu")


class SocketChannel:
    """A Channel over a stream socket: length-prefixed messages."""

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


def sha256_rows(payload: Tensor) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(row.numpy().tobytes()).digest() for row in payload)


def reporting_link(
    channel: Channel, receiver: Receiver, on_lost: Callable[[str], None], timeout: float, seen: list[Message]
) -> LandLink:
    def on_frame(frame: Frame, payload: Tensor) -> None:
        seen.append(frame)
        rows = sha256_rows(payload)
        link.post(Manifest(frame.transfer_id, frame.generation, frame.first_block, rows, frame.digests, ()))

    def on_message(message: Message) -> None:
        seen.append(message)
        if isinstance(message, Manifest):
            link.post(Ack(message.transfer_id, message.generation))

    link = LandLink(channel, receiver, on_message, on_frame, on_lost, timeout)
    return link


# ------------------------------------------------------------------------------------------- the process of its own


def stop_in_receive(connector: str, channel: Channel, layout: KVLayout) -> None:
    """D stops (SIGSTOP) when the first header is there and nothing has been received."""

    class Stopping:
        def __init__(self, inner: Receiver) -> None:
            self.layout, self.open, self.rendezvous, self.close = layout, inner.open, inner.rendezvous, inner.close

        def receive(self, frame: Frame, timeout: float) -> Tensor:
            os.kill(os.getpid(), signal.SIGSTOP)
            raise TransferFailed("continued")

    reporting_link(channel, Stopping(create_receiver(connector, Context(channel, layout, CPU))), print, 20.0, []).open()


def stop_in_send(connector: str, channel: Channel, layout: KVLayout) -> None:
    """P opens the data path, sends a header, and stops before the payload."""
    sender = create_sender(connector, Context(channel, layout, CPU))
    channel.listen(sender.rendezvous, print)  # pyright: ignore[reportArgumentType]  # D sends nothing else here
    sender.open(20.0)
    channel.send(Frame(b"t" * 16, 1, 0, 1, 0, layout.layers, layout.block_bytes, (b"d" * 16,)))
    os.kill(os.getpid(), signal.SIGSTOP)


def report(connector: str, channel: Channel, layout: KVLayout) -> None:
    receiver = create_receiver(connector, Context(channel, layout, CPU))
    reporting_link(channel, receiver, lambda reason: None, 20.0, []).open()


def main(control: socket.socket) -> None:
    """One request per line-sized packet: mode, connector and layout; the pair's socket comes along with it."""
    modes = {mode.__name__: mode for mode in (report, stop_in_receive, stop_in_send)}
    while True:
        data, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not data:
            return
        mode, connector, dtype, *shape = data.decode().split()
        layout = KVLayout("test", dtype, *map(int, shape))
        modes[mode](connector, SocketChannel(socket.socket(fileno=fds[0])), layout)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
