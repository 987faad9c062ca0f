"""The worker's thread, around a worker that does what the test says."""

from __future__ import annotations

import threading
import time
from typing import Any

from tandem.common.worker_loop import Inbox, WorkerThread


class Hanging:
    """Its step blocks until told."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.inside, self.go = threading.Event(), threading.Event()

    def step(self) -> bool:
        self.inside.set()
        assert self.go.wait(10)
        return False

    def prepare(self) -> bool:
        return False

    def close(self) -> None: ...


def test_the_last_turn_tells_a_loop_that_stands_still() -> None:
    worker: Any = Hanging()
    thread = WorkerThread(worker, lambda: None)
    before = time.monotonic()
    thread.start()
    assert worker.inside.wait(10)
    stuck = thread.last_turn
    assert stuck >= before
    worker.inbox.put(lambda: None)
    assert thread.last_turn == stuck, "a step that hangs is no turn"
    worker.go.set()
    deadline = time.monotonic() + 10
    while thread.last_turn == stuck and time.monotonic() < deadline:
        time.sleep(0.001)
    assert thread.last_turn > stuck
    thread.stop()
    assert not thread.alive and thread.error is None
