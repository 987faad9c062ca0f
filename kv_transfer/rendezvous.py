"""Small values the two ends of a pair exchange over their authenticated channel while a connector sets itself up."""

from __future__ import annotations

import threading
import time

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Rendezvous
from tandem.kv_transfer.base import Channel

MAX_KEYS = 256
MAX_VALUE_BYTES = 64 << 10


class Mailbox:
    """A replicated dictionary: what either end publishes, both ends hold. Thread-safe.

    The channel keeps the order, and every key has one writer, so replication needs no agreement.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def publish(self, key: str, value: bytes) -> None:
        """Raises TransferFailed when the channel is closed."""
        self._store(key, value)
        self._channel.send(Rendezvous(key, value))

    def deliver(self, message: Rendezvous) -> None:
        """Keep what the peer published. Raises TransferFailed if it publishes more than a connector ever needs."""
        if len(message.value) > MAX_VALUE_BYTES or len(message.key) > MAX_VALUE_BYTES:
            raise TransferFailed(f"the peer published a rendezvous value of {len(message.value)} bytes")
        self._store(message.key, message.value)

    def take(self, key: str, deadline: float) -> bytes:
        """The value of `key`, once either end has published it, at the latest at `deadline` (time.monotonic()).

        Raises TransferFailed at the deadline, or when closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._values, deadline - time.monotonic())
            if self._closed:
                raise TransferFailed("the link was closed while its data path was being set up")
            if key not in self._values:
                raise TransferFailed(f"the peer did not publish {key!r} in time; its connector is not answering")
            return self._values[key]

    def has(self, key: str) -> bool:
        with self._changed:
            return key in self._values

    def close(self) -> None:
        """Make every `take`, present and future, fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _store(self, key: str, value: bytes) -> None:
        with self._changed:
            if key not in self._values and len(self._values) >= MAX_KEYS:
                raise TransferFailed(f"more than {MAX_KEYS} rendezvous keys on one link")
            self._values[key] = value
            self._changed.notify_all()
