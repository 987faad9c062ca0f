"""A sender that does what networks, drivers and bugs do: flips bits, repeats, swaps, stalls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.common.handoff import Frame
from tandem.kv_transfer.base import Sender
from tandem.kv_transfer.payload import Payload

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
