"""Who is in the cluster, and how busy: Redis says where workers may be, their Watch streams say what is true.

    registry ──list, every 0.5 s──► a follower task per incarnation ──Watch──► Worker: state, load, cached blocks

A worker is a member exactly while its Watch stream lives. Redis down changes nothing but that no new worker is
found. Only the largest group of workers whose KV fits each other's takes part, so that any P can pair with any D;
their block sizes may differ. Another group that becomes the largest, as while a model is replaced, gets the new
requests; those that have output of the former go on there (`identity`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem.common.errors import TandemError, WorkerFailed
from tandem.common.registry import Registration
from tandem.common.worker_config import Role
from tandem.common.worker_info import Description, Load, WorkerEvent, WorkerState
from tandem.router.policy import Candidate
from tandem.router.prefix_index import PrefixIndex
from tandem.router.worker_client import WorkerClient

log = logging.getLogger("tandem.router")

LIST_INTERVAL = 0.5  # seconds
MIN_BACKOFF = 0.1  # seconds between attempts to watch a worker
MAX_BACKOFF = 2.0
STOP_TIMEOUT = 5.0  # seconds that tasks get to end when the router stops
CLOSE_GRACE = 60.0  # seconds for legs that outlive their Watch stream

Identity = tuple[bytes, str]  # pairing and model: workers of one identity can take each other's place


class Discovery(Protocol):
    """The part of common/registry.py › Registry that the router needs."""

    async def list(self) -> list[Registration]: ...

    async def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Worker:
    """One live incarnation of a worker."""

    description: Description
    client: WorkerClient
    state: WorkerState
    load: Load
    legs: int = 0  # of this router; newer than `load`, which lags by an event
    sequence: int = field(default=0, repr=False)  # of the last event

    @property
    def incarnation(self) -> str:
        return self.description.incarnation

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def identity(self) -> Identity:
        return self.description.pairing, self.description.model

    def candidate(self, cached_tokens: int, avoid: bool) -> Candidate:
        return Candidate(
            incarnation=self.incarnation,
            name=self.name,
            load=max(self.load.running + self.load.waiting, self.legs),
            capacity=self.description.max_num_seqs,
            waiting_tokens=self.load.waiting_tokens,
            cached_tokens=cached_tokens,
            draining=self.state == "draining",
            avoid=avoid,
        )

    @contextmanager
    def running(self, sequences: int) -> Generator[None]:
        """Count `sequences` as this worker's load while the body runs."""
        self.legs += sequences
        try:
            yield
        finally:
            self.legs -= sequences


class Membership:
    """Live workers by incarnation, and their cached blocks in `index`. Belongs to one event loop."""

    def __init__(self, registry: Discovery, cluster_key: bytes, max_model_len: int | None = None) -> None:
        """`max_model_len`: tokens; what the operator allows of the workers' context length."""
        self.index = PrefixIndex()
        self.registry_up: bool | None = None  # None: not asked yet
        self.prefill_seen = False  # a prefill worker was a member once: from then on doing without is somebody's wish
        self.listed: dict[str, Registration] = {}
        self._registry = registry
        self._cluster_key = cluster_key
        self._max_model_len = max_model_len
        self._workers: dict[str, Worker] = {}
        self._elected: Identity | None = None  # of those that take part
        self._followed: set[str] = set()  # incarnations
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._stopping = False

    def start(self) -> None:
        """And again should the task end, whoever ended it: nobody else finds new workers."""
        lister = self._spawn(self._list_forever(), "membership")
        lister.add_done_callback(lambda _: None if self._stopping else self.start())

    async def stop(self) -> None:
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        left = (await asyncio.wait(tasks, timeout=STOP_TIMEOUT))[1] if tasks else ()
        if left:
            log.warning("not stopped within %.0f s: %s", STOP_TIMEOUT, ", ".join(task.get_name() for task in left))
        await self._registry.close()

    def workers(self, role: Role | None = None, identity: Identity | None = None) -> list[Worker]:
        """The members of one role or all that take part, or those of `identity`, whether it takes part or not."""
        wanted = identity or self._elected
        return [
            worker
            for worker in self._workers.values()
            if role in (None, worker.description.role) and worker.identity == wanted
        ]

    def all_workers(self) -> list[Worker]:
        """Also those that take no part because their KV does not fit."""
        return list(self._workers.values())

    def can_serve(self, identity: Identity | None = None) -> bool:
        """A decode worker, of `identity` if given, takes new legs."""
        return any(worker.state == "ready" for worker in self.workers("decode", identity))

    @property
    def max_model_len(self) -> int | None:
        """Tokens; the smallest of all workers that take part and of what is allowed. None while nobody says it."""
        limits = [worker.description.max_model_len for worker in self.workers()]
        return min(limits if self._max_model_len is None else [*limits, self._max_model_len], default=None)

    async def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Whether `condition` came true within `timeout` seconds; looked at whenever a worker changes."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)
        return task

    async def _list_forever(self) -> None:
        while True:
            await self._list()
            await asyncio.sleep(LIST_INTERVAL)

    async def _list(self) -> None:
        try:
            listed = await self._registry.list()
        except Exception as exc:  # whatever it is, a router that no longer lists is blind to new workers
            if self.registry_up is not False:
                log.warning("registry lost, going on with the %d known workers: %s", len(self._workers), exc)
            self.registry_up = False
            return
        if not self.registry_up:
            log.info("registry reached, %d workers are registered", len(listed))
        self.registry_up = True
        self.listed = {registration.incarnation: registration for registration in listed}
        for incarnation, registration in self.listed.items():
            if incarnation not in self._followed:
                self._followed.add(incarnation)
                self._spawn(self._follow(registration), registration.name)

    async def _follow(self, registration: Registration) -> None:
        """Watch one incarnation, again and again, until it is neither alive nor listed."""
        client = WorkerClient(registration.address, self._cluster_key)
        backoff = MIN_BACKOFF
        try:
            while registration.incarnation in self.listed:
                if await self._watch(registration, client):
                    backoff = MIN_BACKOFF
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
        finally:
            self._followed.discard(registration.incarnation)  # before the grace: listed again, it is followed again
            await self._close(client)

    async def _close(self, client: WorkerClient) -> None:
        """Legs that outlive their Watch stream get CLOSE_GRACE, or until the router stops."""
        try:
            await client.close(None if self._stopping else CLOSE_GRACE)
        except asyncio.CancelledError:
            await client.close()
            raise

    async def _watch(self, registration: Registration, client: WorkerClient) -> bool:
        """One Watch stream; whether the worker became a member."""
        name, incarnation = registration.name, registration.incarnation
        reason = "its Watch stream ended"
        try:
            await client.watch(lambda event: self._take(registration, client, event))
        except TandemError as exc:
            reason = exc.message
        finally:
            joined = self._workers.pop(incarnation, None) is not None
            self.index.forget(incarnation)
            self._update()
        if joined:
            log.warning("%s (%s) is out: %s", name, incarnation, reason)
        else:
            log.debug("%s (%s) cannot be watched: %s", name, incarnation, reason)
        return joined

    def _take(self, registration: Registration, client: WorkerClient, event: WorkerEvent) -> None:
        worker = self._workers.get(registration.incarnation)
        expected = 0 if worker is None else worker.sequence + 1
        if event.sequence != expected:
            raise WorkerFailed(f"{registration.name} sent event {event.sequence} where {expected} was due")
        if worker is None:
            worker = self._join(registration, client, event)
        changed = worker.state != event.state or event.sequence == 0
        worker.state, worker.load, worker.sequence = event.state, event.load, event.sequence
        self.index.store(worker.incarnation, event.stored)
        self.index.remove(worker.incarnation, event.removed)
        if changed:
            self._update()

    def _join(self, registration: Registration, client: WorkerClient, event: WorkerEvent) -> Worker:
        description = event.description
        if description is None or description.incarnation != registration.incarnation:
            raise WorkerFailed(f"{registration.address} is not {registration.name} any more")
        if description.role != registration.role:
            raise WorkerFailed(f"{registration.name} is registered as {registration.role}, but says {description.role}")
        worker = Worker(description, client, event.state, event.load)
        self._workers[worker.incarnation] = worker
        self.prefill_seen |= worker.description.role == "prefill"
        log.info("%s (%s) joined at %s", worker.name, worker.incarnation, registration.address)
        return worker

    def _update(self) -> None:
        """Elect the pairing that takes part (the most workers; the present one on a tie), wake who waits."""
        votes = Counter(worker.identity for worker in self._workers.values())
        elected = max(votes, key=lambda identity: (votes[identity], identity == self._elected), default=None)
        if elected != self._elected or len(votes) > 1:
            for worker in self._workers.values():
                if worker.identity != elected:
                    log.warning(
                        "%s (%s) takes no part: its model, dtype or KV heads are not those of the majority; start "
                        "all workers from the same model and flags", worker.name, worker.incarnation,
                    )  # fmt: skip
        self._elected = elected
        self._changed.set()
        self._changed = asyncio.Event()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the task that follows %s ended by a bug", task.get_name(), exc_info=task.exception())
