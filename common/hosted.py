"""A worker's server inside a process that somebody else started, such as a Ray actor.

Every call returns at once: loading, draining and stopping run in threads, and `report()` says how far they are. So
one kind of question, asked with a deadline, is progress bar, health check and death notice.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil

from tandem.common import log as logs
from tandem.common.errors import ConfigError

log = logging.getLogger("tandem.worker")

KEEPER_INTERVAL = 2.0  # seconds between looks at the keeper
Phase = Literal["loading", "ready", "draining", "stopping", "stopped", "failed"]
_ORDER: dict[Phase, int] = {"loading": 0, "failed": 1, "ready": 1, "draining": 2, "stopping": 3, "stopped": 4}
OnProgress = Callable[[int, int], None]  # bytes of weights read, bytes in all


class Server(Protocol):
    """A started PrefillServer or DecodeServer."""

    @property
    def incarnation(self) -> str: ...

    def describe(self) -> Mapping[str, object]: ...

    def healthy(self) -> bool: ...

    def drain(self, timeout: float) -> bool:
        """Take no new work; return when the running work ended, or after `timeout` seconds: whether it all ended."""
        ...

    def stop(self) -> None:
        """End at once; work still running ends with an error that says it may be tried elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class HostOptions:
    log_level: str = "info"
    niceness: int = 0  # added to the process's; prefill yields to decode where they share cores
    sharing: int = 0  # workers that divide this machine's cores between them; 0: OMP_NUM_THREADS is set already
    drain_timeout: float = 120.0  # seconds running work gets after a SIGTERM
    keeper: int = 0  # a process of this machine without which the worker has no use; 0: none


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
    """One server's life. Phases only go forward: loading → ready → draining → stopping → stopped, or → failed.

    Whoever moves it into a phase does that phase's work, so draining and stopping happen once, whoever asks how often.
    """

    def __init__(self, name: str, start: Callable[[OnProgress], Server], options: HostOptions) -> None:
        logs.configure(options.log_level)
        os.nice(options.niceness)
        if options.sharing:  # before torch is imported, which reads it once
            os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // options.sharing))
        self._name, self._options = name, options
        self._start = start
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._phase: Phase = "loading"
        self._progress = (0, 0)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        # now, while it lives: later another process or thread may have its number
        self._keeper = psutil.Process(options.keeper) if options.keeper else None
        threading.Thread(target=self._live, name="host", daemon=True).start()

    def __repr__(self) -> str:
        return self._name  # Ray puts it in front of every line this process prints

    def report(self) -> Report:
        with self._lock:
            server, phase, error = self._server, self._phase, self._error
        if phase in ("ready", "draining") and server is not None and not server.healthy():
            phase, error = "failed", RuntimeError("a loop of the worker ended or stands still; its log says why")
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

    def drain(self, timeout: float) -> None:
        """Finish the running work, what still runs after `timeout` seconds is given up; then stop."""
        threading.Thread(target=self._finish, args=(timeout,), name="drain", daemon=True).start()

    def stop(self) -> None:
        threading.Thread(target=self._finish, args=(None,), name="stop", daemon=True).start()

    def leave_on_sigterm(self) -> None:
        """From now on SIGTERM means: drain, then end this process with exit code 0; a second one ends it at once.

        Main thread only. Python runs signal handlers between two of its own instructions of the main thread, which may
        sit in its host's native loop for good; the wakeup socket is written by the C handler itself.
        """
        ours, kernels = socket.socketpair()
        kernels.setblocking(False)
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
        signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._await_sigterm, args=(ours, kernels), name="signals", daemon=True).start()

    def _await_sigterm(self, ours: socket.socket, kernels: socket.socket) -> None:
        leaving = False
        while True:
            signals = [number for number in ours.recv(16) if number == signal.SIGTERM]
            if len(signals) + leaving > 1:
                os._exit(128 + signal.SIGTERM)
            if signals:
                leaving = True
                threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        log.info("%s is draining: SIGTERM", self._name)
        self._finish(self._options.drain_timeout)
        self._ended.wait(self._options.drain_timeout)  # somebody else may be draining it
        logging.shutdown()
        os._exit(0 if self._phase == "stopped" else 1)

    def _live(self) -> None:
        """Loads, then stays: processes the server started die with the thread that started them (PDEATHSIG)."""
        self._load()
        while not self._ended.wait(KEEPER_INTERVAL):
            if self._keeper is not None and not self._keeper.is_running():
                os._exit(1)

    def _load(self) -> None:
        try:
            server = self._start(self._on_progress)
        except BaseException as exc:
            if not isinstance(exc, ConfigError):
                log.exception("%s could not start", self._name)
            self._set("failed", error=exc)
            return
        gc.collect()
        gc.freeze()  # what was loaded stays: later collections need not walk through it
        with self._lock:
            self._server = server
            late = self._phase != "loading"  # stopped while it loaded
            if not late:
                self._phase = "ready"
        if late:
            server.stop()

    def _finish(self, timeout: float | None) -> None:
        """Drain for `timeout` seconds at most, None: not at all; then stop."""
        with self._lock:
            server = self._server
            if server is None:  # it loads still, or could not
                self._phase = "stopped"
                self._ended.set()
                return
        try:
            if timeout is not None and not self._drained(server, timeout):
                return
            if not self._enter("stopping"):
                return
            server.stop()
        except Exception as exc:
            log.exception("%s did not stop cleanly", self._name)
            self._set("failed", error=exc)
        else:
            self._set("stopped")
        self._ended.set()

    def _drained(self, server: Server, timeout: float) -> bool:
        """Whether the caller is to stop it now; False: somebody else sees to that."""
        if not self._enter("draining"):
            return False
        if not server.drain(timeout) and self._phase == "draining":
            log.warning("%s gives up what still runs after %.0f s of draining", self._name, timeout)
        return True

    def _enter(self, phase: Phase) -> bool:
        """Whether the caller moved it into `phase`; False: somebody did that, or is further on."""
        with self._lock:
            if _ORDER[self._phase] >= _ORDER[phase]:
                return False
            self._phase = phase
            return True

    def _set(self, phase: Phase, error: BaseException | None = None) -> None:
        with self._lock:
            self._phase, self._error = phase, error

    def _on_progress(self, loaded: int, total: int) -> None:
        self._progress = (loaded, total)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
