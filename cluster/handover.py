"""When a Ray of our own dies: its workers go on serving, for they need it for nothing, until others take their place.

    Ray lost ──► what is left of it is killed, but not its workers ──► another Ray, controller and workers
                                                                       └─ all ready ──► SIGTERM: the old ones drain

Ray's own way is different: an actor process ends within a second of its raylet's death, and a minute after the GCS's.
`outlive_ray` puts that off; the workers watch over `tandem serve` themselves (HostOptions.keeper).
"""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

from tandem.cluster import process
from tandem.cluster.controller import STOP_GRACE, ClusterView

_LONG = 24 * 3600  # seconds
_VITAL = ("gcs_server", "raylet")
_OUTLIVE = {
    "RAY_raylet_death_check_interval_milliseconds": str(_LONG * 1000),
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(_LONG),
}


def outlive_ray() -> None:
    """Before Ray is imported."""
    for name, value in _OUTLIVE.items():
        os.environ.setdefault(name, value)


class LocalRay:
    """The processes without which a Ray is none. Create it when that has just been started by this process."""

    def __init__(self) -> None:
        self._vital = [child for child in psutil.Process().children() if child.name() in _VITAL]

    @property
    def alive(self) -> bool:
        return all(process.runs(vital) for vital in self._vital)


class Outgoing:
    """Workers of a Ray that was lost. `patience`: seconds they get to finish once they are told to leave."""

    def __init__(self, patience: float) -> None:
        self._workers: list[psutil.Process] = []
        self._patience = patience + STOP_GRACE
        self._deadline: float | None = None

    def add(self, view: ClusterView) -> None:
        """The workers that serve according to `view`; those of a Ray before, which it replaced, stay too."""
        pids = [worker.report.pid for worker in view.workers if worker.phase in ("ready", "draining")]
        self._workers += [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]
        self._deadline = None

    @property
    def family(self) -> list[int]:
        """The pids of the workers and of the processes they have started."""
        return [pid for worker in self._workers for pid in process.family(worker)]

    def step(self, replaced: bool, now: float) -> None:
        """`replaced`: nobody needs them any more."""
        self._workers = [worker for worker in self._workers if not process.ended(worker)]
        if self._deadline is None and replaced:
            self._deadline = now + self._patience
            self._signal(signal.SIGTERM)
        elif self._deadline is not None and now >= self._deadline:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
