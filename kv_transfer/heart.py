"""The heartbeats of all links of one worker, on a thread of their own: no forward step, however long, delays them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds; a tenth of what a peer may be silent (link.py › SILENCE)


class Beating(Protocol):
    def beat(self) -> bool:
        """False: over, ask no more."""
        ...

    def lose(self, reason: str) -> None: ...


class Heart:
    """Beats while `alive()`: a worker whose loop stands still must not keep its peers waiting (rule H10)."""

    def __init__(self) -> None:
        self._links: list[Beating] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, alive: Callable[[], bool]) -> None:
        self._thread = threading.Thread(target=self._run, args=(alive,), name="heart", daemon=True)
        self._thread.start()

    @property
    def beating(self) -> bool:
        """Whether its thread runs: without it every peer gives up this worker's links within seconds."""
        return self._thread is not None and self._thread.is_alive()

    def add(self, link: Beating) -> None:
        with self._lock:
            self._links.append(link)

    def stop(self) -> None:
        self._stop.set()

    def _run(self, alive: Callable[[], bool]) -> None:
        while not self._stop.wait(INTERVAL):
            if alive():
                self._beat()

    def _beat(self) -> None:
        with self._lock:
            links = list(self._links)
        ended = [link for link in links if not _beats(link)]
        with self._lock:
            self._links = [link for link in self._links if link not in ended]


def _beats(link: Beating) -> bool:
    """One link's bug ends that link: the others' heartbeats go on."""
    try:
        return link.beat()
    except Exception as exc:
        logger.exception("a heartbeat failed")
        with contextlib.suppress(Exception):
            link.lose(f"internal error in a heartbeat: {exc!r}")
        return False
