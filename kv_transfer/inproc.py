"""P and D in one process: a channel made of two queues, and a connector that copies payloads."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame, Message, decode, encode
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload

logger = logging.getLogger(__name__)


class InprocChannel:
    """One end of `channel_pair()`. Messages go through the real codec, so both ends see what a network peer would."""

    def __init__(self, inbox: queue.SimpleQueue[bytes | None], outbox: queue.SimpleQueue[bytes | None]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._lock = threading.Lock()
        self._closed = False
        self.peer: InprocChannel | None = None  # the other end

    def send(self, message: Message) -> None:
        data = encode(message)
        with self._lock:
            if self._closed:
                raise TransferFailed("the channel to the peer is closed")
            self._outbox.put(data)

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        threading.Thread(target=self._deliver, args=(on_message, on_close), name="inproc-channel", daemon=True).start()

    def close(self) -> None:
        """End both directions; what was sent before is still delivered to the peer."""
        for end in (self, self.peer):
            if end is not None:
                end._end()

    def _end(self) -> None:
        with self._lock:
            self._closed = True
        self._inbox.put(None)

    def _deliver(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        reason = "the peer closed the channel"
        try:
            while (data := self._inbox.get()) is not None:
                on_message(decode(data))
        except Exception as exc:
            logger.exception("channel callback failed")
            reason = f"channel failed: {exc!r}"
        self.close()
        on_close(reason)


def channel_pair() -> tuple[InprocChannel, InprocChannel]:
    """Two connected Channels within this process."""
    one: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    left, right = InprocChannel(one, two), InprocChannel(two, one)
    left.peer, right.peer = right, left
    return left, right


class _Pipe:
    """Holds at most one payload. `put` returns when the other end has taken it, as on a two-sided network."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._payload: Payload | None = None
        self._closed = False

    def put(self, payload: Payload, timeout: float) -> None:
        with self._changed:
            self._payload = payload
            self._changed.notify_all()
            self._wait(lambda: self._payload is None, timeout, "D did not take the payload")

    def take(self, timeout: float) -> Payload:
        with self._changed:
            self._wait(lambda: self._payload is not None, timeout, "P did not send the announced payload")
            payload = self._payload
            assert payload is not None
            taken = Payload.whole(payload.tensor().clone())
            self._payload = None
            self._changed.notify_all()
        return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], timeout: float, fault: str) -> None:
        self._changed.wait_for(lambda: self._closed or done(), timeout)
        if self._closed:
            raise TransferFailed("the in-process data path was closed")
        if not done():
            self._payload = None
            raise TransferFailed(f"{fault} within {timeout:g} s")


# Pipes of this process by the token their sender publishes; a pipe lives as long as one of its ends.
_pipes: WeakValueDictionary[bytes, _Pipe] = WeakValueDictionary()


def domain(context: Context) -> str:
    return str(os.getpid())


class _End:
    one_sided = False

    def __init__(self, context: Context) -> None:
        self._mailbox = context.mailbox
        self._pipe = _Pipe()
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._pipe.close()


class InprocSender(_End):
    """Shows D the payload, which copies it."""

    def open(self, timeout: float) -> None:
        token = secrets.token_bytes(16)
        _pipes[token] = self._pipe
        self._mailbox.publish("inproc/pipe", token)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self._pipe.put(payload, timeout)


class InprocReceiver(_End):
    def open(self, timeout: float) -> None:
        pipe = _pipes.get(self._mailbox.take("inproc/pipe", time.monotonic() + timeout))
        if pipe is None:
            raise TransferFailed("the inproc connector needs both workers in one process; use --kv-connector auto")
        self._pipe = pipe
        if self._closed:  # by another thread, which may have closed the pipe this one replaced
            raise TransferFailed("the link was closed while its data path was being set up")

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        return self._pipe.take(timeout)
