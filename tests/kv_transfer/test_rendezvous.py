from __future__ import annotations

import threading
import time

import pytest

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Message, Rendezvous
from tandem.kv_transfer.rendezvous import MAX_KEYS, MAX_VALUE_BYTES, Mailbox


class Recorder:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def listen(self, on_message, on_close) -> None: ...

    def close(self) -> None: ...


def soon() -> float:
    return time.monotonic() + 5.0


def test_what_one_end_publishes_the_other_takes():
    channel = Recorder()
    here, there = Mailbox(channel), Mailbox(Recorder())
    here.publish("k", b"v")
    assert channel.sent == [Rendezvous("k", b"v")]
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.append(there.take("k", soon())))
    thread.start()
    there.deliver(Rendezvous("k", b"v"))
    thread.join(5.0)
    assert taken == [b"v"] and here.has("k") and not here.has("other")


def test_take_fails_at_its_deadline_and_when_closed():
    box = Mailbox(Recorder())
    with pytest.raises(TransferFailed, match="did not publish 'k' in time"):
        box.take("k", time.monotonic() + 0.02)
    box.close()
    with pytest.raises(TransferFailed, match="closed"):
        box.take("k", soon())


def test_a_peer_cannot_fill_the_memory():
    box = Mailbox(Recorder())
    with pytest.raises(TransferFailed):
        box.deliver(Rendezvous("k", bytes(MAX_VALUE_BYTES + 1)))
    with pytest.raises(TransferFailed):
        box.deliver(Rendezvous("k" * (MAX_VALUE_BYTES + 1), b""))
    for number in range(MAX_KEYS):
        box.deliver(Rendezvous(str(number), b""))
    box.deliver(Rendezvous("0", b"again"))
    with pytest.raises(TransferFailed, match="more than"):
        box.deliver(Rendezvous("one more", b""))
