"""What a worker tells its watchers: everything at first, then what changed, at most every INTERVAL.

Used on the worker's thread, so a new watcher's complete event and the changes behind it have no gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.common.block_hash import BlockHash
from tandem.common.worker_info import Description, Load, WorkerEvent, WorkerState

INTERVAL = 0.05  # seconds


class CacheEvents(Protocol):
    @property
    def stored(self) -> Sequence[BlockHash]: ...
    @property
    def removed(self) -> Sequence[BlockHash]: ...


class PrefixCache(Protocol):
    """The part of the block pool that watchers follow."""

    def hashes(self) -> list[BlockHash]: ...
    def drain_events(self) -> CacheEvents: ...


Deliver = Callable[[WorkerEvent], object]  # hands an event to the watcher's own thread


@dataclass(frozen=True, slots=True)
class Moment:
    state: WorkerState
    load: Load


@dataclass(eq=False, slots=True)
class Watcher:
    deliver: Deliver
    next_sequence: int = 0


class WatchHub:
    def __init__(self, description: Description, load: Callable[[], Load], cache: PrefixCache) -> None:
        self._description, self._load, self._cache = description, load, cache
        self._watchers: list[Watcher] = []
        self._next_publish = 0.0
        self._told: Moment | None = None  # what all watchers know
        self.state: WorkerState = "ready"

    def watcher(self, deliver: Deliver) -> Watcher:
        return Watcher(deliver)

    def set_state(self, state: WorkerState) -> None:
        self.state = state
        self._next_publish = 0.0

    def add(self, watcher: Watcher) -> None:
        self._next_publish = 0.0
        self.publish()  # the others get what the complete event already contains
        self._watchers.append(watcher)
        self._send(watcher, self._description, tuple(self._cache.hashes()), ())

    def remove(self, watcher: Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def publish(self) -> None:
        now = time.monotonic()
        if now < self._next_publish:
            return
        self._next_publish = now + INTERVAL
        events, news = self._cache.drain_events(), Moment(self.state, self._load())
        if news == self._told and not events.stored and not events.removed:
            return
        self._told = news
        for watcher in self._watchers:
            self._send(watcher, None, tuple(events.stored), tuple(events.removed))

    def _send(
        self,
        watcher: Watcher,
        description: Description | None,
        stored: tuple[BlockHash, ...],
        removed: tuple[BlockHash, ...],
    ) -> None:
        event = WorkerEvent(watcher.next_sequence, self.state, self._load(), description, stored, removed)
        watcher.next_sequence += 1
        watcher.deliver(event)
