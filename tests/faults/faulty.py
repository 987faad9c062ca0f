"""A sender that does what drivers and bugs do: flips bits, repeats, swaps, stalls; and a link that loses packets."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tandem.cluster.fault_proxy import HEALTHY, FaultProxy
from tandem.common.handoff import Frame
from tandem.kv_transfer.base import Sender
from tandem.kv_transfer.payload import Payload

SO_ATTACH_FILTER, SO_MEMINFO = 26, 55  # Linux
DROPS = 8  # where SO_MEMINFO counts the packets that a filter dropped
RANDOM = 0xFFFFF000 + 56  # where a filter finds a fresh random number

Fault = Callable[[Frame, Payload], Payload | None]
"""The payload to move instead; None: as it is."""


@dataclass(eq=False)
class FaultySender:
    """Wraps the sender of a link. `fault` sees every payload before it moves."""

    inner: Sender
    fault: Fault = field(default=lambda frame, payload: None)
    hold: threading.Event | None = None  # when set: a send waits for it before the first byte moves
    held: threading.Event = field(default_factory=threading.Event)  # a send waits

    @property
    def one_sided(self) -> bool:
        return self.inner.one_sided

    def open(self, timeout: float) -> None:
        self.inner.open(timeout)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        hold = self.hold
        if hold is not None:
            self.held.set()
            assert hold.wait(30.0), "nobody let the payload go"
        self.inner.send(frame, self.fault(frame, payload) or payload, targets, timeout)

    def close(self) -> None:
        self.inner.close()


def flipped(payload: Payload, bit: int) -> Payload:
    """A copy with one bit changed; `bit` counts over the whole payload."""
    copy = payload.tensor().clone()
    copy.view(-1)[bit // 8] ^= 1 << bit % 8
    return Payload.whole(copy)


class BadLink(FaultProxy):
    """Counts what its faults strike, and can lose packets as they come in, before TCP sees them."""

    def __init__(self, host: str, port: int) -> None:
        self.struck = 0  # pieces held up, slowed or spoiled, and connections reset
        self.loss = 0.0  # share of the packets
        super().__init__(host, port)

    async def _pass(self, lane: Any, piece: bytes) -> bytes:
        self.struck += self._faults[lane.direction] != HEALTHY
        return await super()._pass(lane, piece)

    def _strike(self, lane: Any) -> None:
        self.struck += self._faults[lane.direction].reset
        if sys.platform == "linux":
            _lose(socket_of(lane), self.loss)
        super()._strike(lane)

    @property
    def dropped(self) -> int:
        """Packets, of the connections that are open."""
        options = [socket_of(lane).getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36) for lane in self._lanes]
        return sum(struct.unpack("9I", option)[DROPS] for option in options)


def socket_of(lane: Any) -> Any:
    return lane.writer.get_extra_info("socket")


def _lose(sock: Any, loss: float) -> None:
    """A program for the kernel: take a random number; return 0, which drops the packet, or all of it."""
    steps = [(0x20, 0, 0, RANDOM), (0x35, 1, 0, int(loss * 0xFFFFFFFF)), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    with suppress(OSError):  # it was closed meanwhile
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(steps), ctypes.addressof(program)))
