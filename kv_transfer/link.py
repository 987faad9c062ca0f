"""What both ends of a link share: one thread, a queue of jobs, and the rule that a link is lost once."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

from tandem.common.errors import TandemError
from tandem.common.failpoints import failpoint
from tandem.common.handoff import Heartbeat, Message, Rendezvous
from tandem.kv_transfer.base import Receiver, Sender
from tandem.kv_transfer.context import Context

logger = logging.getLogger(__name__)

SILENCE = 5.0  # seconds without a message of the peer, heartbeats included, that end a link

Job = TypeVar("Job")
Path = TypeVar("Path", Sender, Receiver)


class Link(ABC, Generic[Job, Path]):
    """One end of one pair of incarnations.

        new ── open ──► serving ──┬─ close() by the owner ──────────────► ended, silently
                                  └─ channel closed, connector failed,
                                     deadline passed, peer silent or   ──► ended, on_lost(reason) once
                                     against the protocol, a bug

    Ending closes channel and connector, which unblocks the thread; a link never comes back, the owner makes a new one.
    Callbacks run on the link's or the channel's thread and must not block.
    """

    def __init__(self, context: Context, path: Path, on_lost: Callable[[str], None], timeout: float) -> None:
        self._context = context
        self._channel = context.channel
        self._path: Path = path
        self._on_lost = on_lost
        self._timeout = timeout  # seconds, for setting up and for each frame
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._heard = time.monotonic()  # when the peer was last heard of
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def open(self) -> None:
        """Start the thread, which sets the data path up; returns at once."""
        self._heard = time.monotonic()
        self._thread.start()
        self._channel.listen(self._incoming, self._end)

    def post(self, message: Message) -> None:
        """Send a message now, ahead of queued frames. On a lost link it goes nowhere: on_lost has said so."""
        with self._ending_on_error():
            self._channel.send(message)

    def beat(self) -> bool:
        """Tell the peer that this end lives, and give up one that is silent (rule H10). False: the link has ended.

        Called every second or so, from a thread that no long computation holds up (Heart).
        """
        silent = time.monotonic() - self._heard
        if silent > SILENCE:
            self._end(f"no sign of life from the peer for {silent:.1f} s")
        elif not self._ended and not failpoint("link.beat"):
            self.post(Heartbeat(self._held()))
        return not self._ended

    def close(self) -> None:
        """End the link without on_lost; the thread follows (`join`). Idempotent, from any thread."""
        self._end(None)

    def lose(self, reason: str) -> None:
        """End the link as lost, on_lost included: the peer does not keep its word."""
        self._end(reason)

    @property
    def ended(self) -> bool:
        """Whether it has; `on_lost` may still be on its way."""
        return self._ended

    def join(self, timeout: float) -> bool:
        """Wait for the thread of an ended link; False if it is still busy after `timeout` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @abstractmethod
    def _serve(self, job: Job) -> None:
        """Do one job, on the link's thread."""

    @abstractmethod
    def _incoming_message(self, message: Message) -> None:
        """Take a message of the peer, on the channel's thread."""

    @abstractmethod
    def _held(self) -> tuple[bytes, ...]:
        """The transfers this end still works on."""

    def _put(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def _take(self) -> Job | None:
        """The next job; None when the link has ended. An idle link waits here for its owner, never for the peer."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._jobs)
            return None if self._ended else self._jobs.popleft()

    def _run(self) -> None:
        with self._ending_on_error():
            self._path.open(self._timeout)
            failpoint("link.opened")
            while self._step():
                pass

    def _step(self) -> bool:
        # A frame of its own: an idle link holds no reference to the last job and its payload.
        job = self._take()
        if job is None:
            return False
        self._serve(job)
        return True

    def _incoming(self, message: Message) -> None:
        self._heard = time.monotonic()
        with self._ending_on_error():
            if isinstance(message, Rendezvous):
                self._context.mailbox.deliver(message)
            else:
                self._incoming_message(message)

    @contextmanager
    def _ending_on_error(self) -> Generator[None]:
        try:
            yield
        except TandemError as exc:
            self._end(exc.message)
        except Exception as exc:
            logger.exception("%s failed", type(self).__name__)
            self._end(f"internal error in {type(self).__name__}: {exc!r}")

    def _end(self, reason: str | None) -> None:
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._jobs.clear()
            self._changed.notify()
        with ExitStack() as whatever_fails:  # the last one first
            if reason is not None:
                whatever_fails.callback(self._on_lost, reason)
            whatever_fails.callback(self._channel.close)
            whatever_fails.callback(self._path.close)
            whatever_fails.callback(self._context.mailbox.close)
