"""Keeps each pool of workers at its wanted size. Pure: what a worker is, and what time it is, come from outside.

A slot is a worker's name and whatever runs under it at the moment:

    launch ──► loading ──► ready ──► draining ──► stopped ──► (slot removed)
      ▲           │          │           │
      └─ backoff ◄┴──────────┘           └─► (dead while draining: slot removed)

Invariant after every step: per role, slots that are not leaving = wanted, and one more while a pool of one worker
waits for the successor of a worker that is to leave. So whoever is drained is replaced, and a rolling restart is: mark
every worker as outdated; whenever all are ready, drain one that is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tandem.common.hosted import Report
from tandem.common.worker_config import Role

SlotPhase = Literal["loading", "ready", "draining", "backoff"]

STABLE_AFTER = 60.0  # seconds of being ready that make earlier failures forgotten
MAX_BACKOFF = 30.0  # seconds
STOP_GRACE = 10.0  # seconds a drained worker gets to end what it gave up, and itself


class Handle(Protocol):
    """One incarnation of a worker. No call waits."""

    def poll(self, now: float) -> Report | None:
        """What it last said; None while there is nothing new. `failed` also means: dead, or it does not answer."""
        ...

    def drain(self, timeout: float) -> None:
        """Finish within `timeout` seconds what runs, give the rest up, stop."""
        ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    def launch(self, name: str, role: Role) -> Handle:
        """Raises RuntimeError when it cannot be started at this moment."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerView:
    name: str
    role: Role
    phase: SlotPhase
    report: Report
    failures: int  # in a row
    detail: str  # why it failed last
    outdated: bool = False  # a rolling restart will replace it


@dataclass(frozen=True, slots=True)
class ClusterView:
    wanted: dict[Role, int]
    workers: tuple[WorkerView, ...]

    @property
    def settled(self) -> bool:
        """Every wanted worker is ready, none is to be replaced, and nothing else is left."""
        ready = all(worker.phase == "ready" and not worker.outdated for worker in self.workers)
        return ready and len(self.workers) == sum(self.wanted.values())

    @property
    def fault(self) -> str:
        """Why a worker can never start, or ''."""
        return next((worker.detail for worker in self.workers if worker.report.permanent), "")


@dataclass(slots=True)
class _Slot:
    name: str
    role: Role
    born: int  # order of creation; the youngest leaves first
    phase: SlotPhase = "backoff"
    until: float = 0.0  # loading, draining: deadline; backoff: next try; ready: when failures are forgotten
    handle: Handle | None = None
    report: Report = field(default_factory=lambda: Report("loading"))
    failures: int = 0
    detail: str = ""
    outdated: bool = False  # what runs under it is to be replaced …
    patience: float = 0.0  # … and gets so many seconds then for its requests


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    startup: float = 600.0
    drain: float = 120.0


class Controller:
    def __init__(self, launcher: Launcher, wanted: Mapping[Role, int], limits: Limits | None = None) -> None:
        self._launcher = launcher
        self._limits = limits or Limits()
        self._wanted: dict[Role, int] = dict(wanted)
        self._slots: list[_Slot] = []
        self._births = itertools.count()

    def scale(self, wanted: Mapping[Role, int]) -> None:
        """Roles that are not named keep their size."""
        self._wanted.update(wanted)

    def drain(self, name: str, timeout: float, now: float) -> bool:
        """Replace the ready worker `name`, at once if its pool has another ready one, else behind its successor.

        False: there is no such worker.
        """
        slot = next((slot for slot in self._slots if slot.name == name and slot.phase == "ready"), None)
        if slot is None:
            return False
        if any(other.phase == "ready" for other in self._staying(slot.role) if other is not slot):
            self._drain(slot, now, timeout)
        else:
            slot.outdated, slot.patience = True, timeout
        return True

    def restart(self) -> None:
        """Replace every worker that runs now, one at a time, while the pools stay whole."""
        for slot in self._slots:
            slot.outdated = slot.handle is not None and slot.phase != "draining"
            slot.patience = self._limits.drain

    def step(self, now: float) -> None:
        """Look at every worker once and start, restart or drain what the wanted sizes ask for."""
        for slot in list(self._slots):
            self._advance(slot, now)
        self._roll(now)
        for role in self._wanted:
            self._resize(role, now)

    def view(self) -> ClusterView:
        workers = sorted(self._slots, key=lambda slot: (slot.role != "prefill", slot.born))
        views = (WorkerView(s.name, s.role, s.phase, s.report, s.failures, s.detail, s.outdated) for s in workers)
        return ClusterView(dict(self._wanted), tuple(views))

    def stop(self, now: float, grace: float) -> None:
        """Stop every worker without draining; `step` until `view().workers` is empty, at most `grace` seconds."""
        self._wanted = dict.fromkeys(self._wanted, 0)
        for slot in list(self._slots):
            if slot.handle is None:
                self._slots.remove(slot)
            else:
                slot.handle.stop()
                self._enter(slot, "draining", now, grace)

    def kill(self) -> None:
        for slot in self._slots:
            if slot.handle is not None:
                slot.handle.kill()
        self._slots.clear()

    def _next_outdated(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.outdated and slot.phase != "draining"), None)

    def _staying(self, role: Role) -> list[_Slot]:
        return [slot for slot in self._slots if slot.role == role and slot.phase != "draining"]

    def _roll(self, now: float) -> None:
        """Drain the next outdated worker, if all are ready and its pool has another one for the requests."""
        slot = self._next_outdated()
        if slot is not None and len(self._staying(slot.role)) > 1 and all(s.phase == "ready" for s in self._slots):
            self._drain(slot, now, slot.patience)

    def _resize(self, role: Role, now: float) -> None:
        outdated, staying = self._next_outdated(), self._staying(role)
        alone = self._wanted[role] == 1 and outdated is not None and outdated.role == role
        count = self._wanted[role] + alone  # the only worker of a pool leaves when its successor is ready
        for _ in range(count - len(staying)):
            slot = _Slot(self._free_name(role), role, next(self._births))
            self._slots.append(slot)
            self._launch(slot, now)
        surplus = sorted(staying, key=lambda slot: -slot.born)[: max(0, len(staying) - count)]
        for slot in surplus:
            self._retire(slot, now)

    def _free_name(self, role: Role) -> str:
        taken = {slot.name for slot in self._slots}
        return next(name for i in itertools.count() if (name := f"{role}-{i}") not in taken)

    def _launch(self, slot: _Slot, now: float) -> None:
        try:
            slot.handle = self._launcher.launch(slot.name, slot.role)
        except RuntimeError as exc:
            self._fail(slot, now, str(exc))
            return
        slot.report, slot.outdated = Report("loading"), False
        self._enter(slot, "loading", now, self._limits.startup)

    def _advance(self, slot: _Slot, now: float) -> None:
        if slot.handle is None:
            if now >= slot.until:
                self._launch(slot, now)
            return
        slot.report = report = slot.handle.poll(now) or slot.report
        if report.phase in ("failed", "stopped"):
            self._lost(slot, now, report.error or "it stopped")
        elif report.phase == "ready" and slot.phase == "loading":
            self._enter(slot, "ready", now, STABLE_AFTER)
        elif report.phase in ("draining", "stopping") and slot.phase == "ready":  # its process got a SIGTERM
            self._enter(slot, "draining", now, self._limits.drain + STOP_GRACE)
        elif now >= slot.until:
            self._expire(slot, now)

    def _expire(self, slot: _Slot, now: float) -> None:
        if slot.phase == "ready":
            slot.failures, slot.until = 0, float("inf")
        elif slot.phase == "draining":
            self._lost(slot, now, "its requests did not end in time")
        else:
            self._lost(slot, now, f"it did not load within {self._limits.startup:.0f} s")

    def _retire(self, slot: _Slot, now: float) -> None:
        if slot.handle is None:
            self._slots.remove(slot)
        elif slot.phase == "ready":
            self._drain(slot, now, self._limits.drain)
        else:  # it has no requests yet
            slot.handle.kill()
            self._slots.remove(slot)

    def _drain(self, slot: _Slot, now: float, timeout: float) -> None:
        assert slot.handle is not None, "only what is ready is drained"
        slot.handle.drain(timeout)
        self._enter(slot, "draining", now, timeout + STOP_GRACE)

    def _lost(self, slot: _Slot, now: float, why: str) -> None:
        if slot.handle is not None:
            slot.handle.kill()
            slot.handle = None
        if slot.phase == "draining":
            self._slots.remove(slot)
        else:
            self._fail(slot, now, why)

    def _fail(self, slot: _Slot, now: float, why: str) -> None:
        """The first restart is immediate; a crash loop waits 1, 2, 4, … seconds, a fault that stays the longest."""
        slot.failures += 1
        slot.detail = why
        delay = 0.0 if slot.failures == 1 else min(MAX_BACKOFF, 2.0 ** min(slot.failures - 2, 10))
        if slot.report.permanent:
            delay = MAX_BACKOFF
        self._enter(slot, "backoff", now, delay)

    @staticmethod
    def _enter(slot: _Slot, phase: SlotPhase, now: float, limit: float) -> None:
        slot.phase, slot.until = phase, now + limit
