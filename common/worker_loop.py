"""The loop of every worker: one thread that alone touches blocks, sequences and the engine.

Everybody else (gRPC handlers, connector threads, timers) puts a command into the inbox and goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from tandem.common.request import LegUpdate
from tandem.common.worker_info import Load

log = logging.getLogger("tandem.worker")

Command = Callable[[], None]  # runs on the worker's thread
Sink = Callable[[LegUpdate], object]  # takes a leg's updates to whoever asked; called on the worker's thread

IDLE_WAIT = 0.1  # seconds between looks at timers while nothing runs


class Inbox:
    """Commands from other threads, in order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        self._queue.put(command)

    def run_pending(self, wait: float = 0.0) -> bool:
        """Run everything queued, waiting up to `wait` seconds for a first command. Whether anything ran.

        What is put meanwhile has to wait for the next time: whoever puts without pause must not stop the worker.
        """
        try:
            command = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
        except queue.Empty:
            return False
        command()
        for _ in range(self._queue.qsize()):
            self._queue.get_nowait()()
        return True


class Worker(Protocol):
    """What the loop and the gRPC shell need of a role. `leg_id` is the shell's own, unique per stream."""

    inbox: Inbox

    def step(self) -> bool:
        """Schedule, forward, publish once. False: there was nothing to do."""
        ...

    def prepare(self) -> bool:
        """Some milliseconds of what makes later steps quicker, while there is none. False: all is prepared."""
        ...

    def cancel(self, leg_id: int) -> None: ...

    def load(self) -> Load: ...

    def close(self) -> None: ...

    @property
    def idle(self) -> bool:
        """No leg, transfer or reservation is left."""
        ...


class WorkerThread:
    """Runs a worker until stopped; `error` says why it ended by itself."""

    def __init__(self, worker: Worker, after_step: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.last_turn = time.monotonic()  # when the loop last came round; one that stands still is not healthy
        self._worker = worker
        self._after_step = after_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout: float = 10.0) -> None:
        self._stop.set()
        self._worker.inbox.put(lambda: None)
        self._thread.join(timeout)

    def _run(self) -> None:
        busy = False
        try:
            while not self._stop.is_set():
                self.last_turn = time.monotonic()
                self._worker.inbox.run_pending(0.0 if busy or self._worker.prepare() else IDLE_WAIT)
                busy = self._worker.step()
                self._after_step()
        except BaseException as exc:
            self.error = exc
            log.exception("worker loop ended: %s", exc)
        finally:
            self._worker.close()
