"""A worker's server inside a process that somebody else started, such as a Ray actor.

Every call returns at once: loading, draining and stopping run in threads, and `report()` says how far they are. So
one kind of question, asked with a deadline, is progress bar, health check and death notice.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from tandem.common import log as logs
from tandem.common.errors import ConfigError

log = logging.getLogger("tandem.worker")

Phase = Literal["loading", "ready", "draining", "stopping", "stopped", "failed"]
OnProgress = Callable[[int, int], None]  # bytes of weights read, bytes in all


class Server(Protocol):
    """A started PrefillServer or DecodeServer."""

    @property
    def incarnation(self) -> str: ...

    def describe(self) -> Mapping[str, object]: ...

    def healthy(self) -> bool: ...

    def drain(self) -> None:
        """Take no new work; return when the running work ended or was given up."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostOptions:
    log_level: str = "info"
    niceness: int = 0  # added to the process's; prefill yields to decode where they share cores


@dataclass(frozen=True, slots=True)
class Report:
    """A moment of a hosted worker. `error` is set when it failed; `permanent` if starting it again cannot help."""

    phase: Phase
    pid: int = 0
    incarnation: str = ""
    loaded: int = 0  # bytes of weights
    total: int = 0
    facts: tuple[tuple[str, str], ...] = ()  # what describe() said, for people
    error: str = ""
    permanent: bool = False


class HostedWorker:
    """One server's life. Phases only go forward: loading → ready → draining → stopping → stopped, or → failed."""

    def __init__(self, name: str, start: Callable[[OnProgress], Server], options: HostOptions) -> None:
        logs.configure(options.log_level)
        os.nice(options.niceness)
        self._name = name
        self._start = start
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._phase: Phase = "loading"
        self._progress = (0, 0)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="host", daemon=True).start()

    def __repr__(self) -> str:
        return self._name  # Ray puts it in front of every line this process prints

    def report(self) -> Report:
        with self._lock:
            server, phase, error = self._server, self._phase, self._error
        if phase in ("ready", "draining") and server is not None and not server.healthy():
            phase, error = "failed", RuntimeError("the worker's loop ended; its log says why")
        loaded, total = self._progress
        return Report(
            phase=phase,
            pid=os.getpid(),
            incarnation=server.incarnation if server else "",
            loaded=loaded,
            total=total,
            facts=tuple((key, str(value)) for key, value in server.describe().items()) if server else (),
            error=_describe(error) if error else "",
            permanent=isinstance(error, ConfigError),
        )

    def drain(self) -> None:
        """Finish the running work, then stop."""
        threading.Thread(target=self._finish, args=(True,), name="drain", daemon=True).start()

    def stop(self) -> None:
        threading.Thread(target=self._finish, args=(False,), name="stop", daemon=True).start()

    def _live(self) -> None:
        """Loads, then stays: processes the server started die with the thread that started them (PDEATHSIG)."""
        self._load()
        self._ended.wait()

    def _load(self) -> None:
        try:
            server = self._start(self._on_progress)
        except BaseException as exc:
            if not isinstance(exc, ConfigError):
                log.exception("%s could not start", self._name)
            self._set("failed", error=exc)
            return
        with self._lock:
            self._server = server
            late = self._phase != "loading"  # stopped while it loaded
            if not late:
                self._phase = "ready"
        if late:
            server.stop()

    def _finish(self, drain: bool) -> None:
        with self._lock:
            server = self._server
            self._phase = "stopped" if server is None else "draining" if drain else "stopping"
        if server is None:
            return
        try:
            if drain:
                server.drain()
                self._set("stopping")
            server.stop()
        except Exception as exc:
            log.exception("%s did not stop cleanly", self._name)
            self._set("failed", error=exc)
        else:
            self._set("stopped")
        self._ended.set()

    def _set(self, phase: Phase, error: BaseException | None = None) -> None:
        with self._lock:
            self._phase, self._error = phase, error

    def _on_progress(self, loaded: int, total: int) -> None:
        self._progress = (loaded, total)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
