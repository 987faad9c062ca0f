"""The shell around a worker: its gRPC server, Watch streams, registration and drain; the same for both roles.

    asyncio thread     gRPC handlers, heartbeats          ── commands ──►  inbox
    worker thread      worker.step(), alone with blocks   ── updates ───►  call_soon_threadsafe

A role adds its own servicers (prefill_worker/service.py, decode_worker/service.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import grpc.aio

from tandem.common import convert, rpc
from tandem.common.errors import InternalError, TandemError, WorkerFailed
from tandem.common.kv_layout import KVLayout
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.registry import Registration, Registry
from tandem.common.request import Leg, LegUpdate
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_info import Description, WorkerEvent
from tandem.common.worker_loop import Sink, Worker, WorkerThread
from tandem.common.worker_watch import WatchHub

log = logging.getLogger("tandem.service")

HEARTBEAT = 0.5  # seconds between registrations
START_TIMEOUT = 30.0  # seconds for the server to listen
ANSWER_WITHIN = 60.0  # seconds for the worker's thread, which may be in a long step
MAX_EVENTS = 1000  # a watcher this far behind is cut; it reconnects and gets everything anew
STALLED = 60.0  # seconds; no step of a sound worker takes that long
T = TypeVar("T")
Submit = Callable[[int, Sink], None]  # (leg id, sink); runs on the worker's thread


class AddServicers(Protocol):
    def __call__(self, server: grpc.aio.Server, shell: WorkerShell) -> None: ...


def new_incarnation() -> str:
    return secrets.token_hex(8)


def describe(
    config: WorkerConfig, incarnation: str, layout: KVLayout, max_model_len: int, max_num_seqs: int
) -> Description:
    return Description(
        name=config.name,
        role=config.role,
        incarnation=incarnation,
        model=layout.revision,
        fingerprint=layout.fingerprint,
        pairing=layout.pairing,
        block_size=layout.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        pid=os.getpid(),
    )


class WorkerShell:
    """Runs `worker` until stopped. Thread-safe: every public method may be called from any thread."""

    def __init__(self, config: WorkerConfig, description: Description, worker: Worker, hub: WatchHub) -> None:
        self.description = description
        self.address = ""
        self._config, self._worker, self._hub = config, worker, hub
        self._leg_ids = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)
        self._worker_thread = WorkerThread(worker, self._after_step)
        self._drained = threading.Event()
        self._draining = False  # only the loop thread sets it, and only that admits legs
        self._streams = 0  # legs whose updates are still being sent; only the loop thread changes it
        self._stopping = False
        self._last_beat = time.monotonic()
        self._server: grpc.aio.Server | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ life

    def start(self, add_servicers: AddServicers) -> None:
        """Listen, register, run. Raises ConfigError when the address is taken or the Redis URL cannot be."""
        self._loop_thread.start()
        self._worker_thread.start()
        self._run(self._listen(add_servicers), START_TIMEOUT)

    def healthy(self) -> bool:
        """Both threads and the heartbeats are there, and none has stood still for long."""
        heartbeat = self._heartbeat
        alive = self._worker_thread.alive and self._loop_thread.is_alive() and not (heartbeat and heartbeat.done())
        return alive and time.monotonic() - min(self._worker_thread.last_turn, self._last_beat) < STALLED

    def drain(self, timeout: float) -> bool:
        """Take no new leg, finish those that run. Whether everything was finished within `timeout` seconds."""
        if self._stopping:
            return False
        self._loop.call_soon_threadsafe(self._refuse_new_legs)
        deadline = time.monotonic() + timeout
        while not self._drained.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or not self.healthy():
                return False
        return not self._stopping

    def _refuse_new_legs(self) -> None:
        """On the loop thread, as admission: what was admitted is in the inbox before the change of state."""
        self._draining = True
        self._worker.inbox.put(self._tell_draining)

    def stop(self) -> None:
        """End at once: legs still running end with an error, the registration is withdrawn."""
        self._stopping = True
        self._drained.set()  # whoever waits for it waits no longer
        self._worker_thread.stop()
        if self._loop_thread.is_alive():
            self._run(self._shut_down(), START_TIMEOUT)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(START_TIMEOUT)
            self._loop.close()

    def _run(self, coroutine: Any, timeout: float) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    async def _listen(self, add_servicers: AddServicers) -> None:
        self._server = rpc.create_server()
        services.add_WorkerServicer_to_server(_WorkerServicer(self), self._server)
        add_servicers(self._server, self)
        port = rpc.bind(self._server, self._config.host, self._config.port, self._config.cluster_key)
        self.address = rpc.format_address(self._config.host, port)
        # A bad URL fails here, not in the task.
        registry = Registry(self._config.redis_url, self._config.cluster_key, self._config.cluster)
        await self._server.start()
        self._heartbeat = asyncio.create_task(self._register(registry))

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` beside the calls, on the loop thread, until it ends or the worker stops."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _shut_down(self) -> None:
        tasks = [*self._tasks, *([self._heartbeat] if self._heartbeat is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace=0.5)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # gRPC's, which it has cancelled itself: they need a moment before the loop closes
            await asyncio.wait(left, timeout=1.0)

    async def _register(self, registry: Registry) -> None:
        """Publish until cancelled. Redis may be away: it holds hints only, and the next heartbeat tries again."""
        try:
            reachable = True
            while self.healthy():
                self._last_beat = time.monotonic()
                try:
                    await registry.publish(self._registration())
                    reachable = True
                except Exception as exc:  # whatever it is, a worker that no longer registers is lost to its cluster
                    if reachable:
                        log.warning("cannot register: %s", exc)
                    reachable = False
                await asyncio.sleep(HEARTBEAT)
        finally:
            await asyncio.shield(self._withdraw(registry))

    async def _withdraw(self, registry: Registry) -> None:
        try:
            await registry.withdraw(self.description.incarnation)
        except TandemError as exc:
            log.debug("the registration will expire by itself: %s", exc)
        await registry.close()

    def _registration(self) -> Registration:
        about, state = self.description, "draining" if self._draining else self._hub.state
        return Registration(about.name, about.role, about.incarnation, self.address, about.pid, state)

    # ------------------------------------------------------------------ on the worker's thread

    def _after_step(self) -> None:
        self._hub.publish()
        if self._hub.state == "draining" and self._worker.idle and not self._streams:
            self._drained.set()

    def _tell_draining(self) -> None:
        self._hub.set_state("draining")
        self._hub.publish()  # at once: until they know, routers find nobody as idle as a worker that refuses

    # ------------------------------------------------------------------ for the servicers

    async def watch(self) -> AsyncIterator[pb.WorkerEvent]:
        """This worker's events, the complete one first; ends when the watcher is too slow or the worker died."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        watcher = self._hub.watcher(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        self._worker.inbox.put(lambda: self._hub.add(watcher))
        try:
            while self.healthy():
                try:
                    async with asyncio.timeout(1.0):
                        event = await events.get()
                except TimeoutError:
                    continue  # a long step; look whether the worker lives
                if events.qsize() > MAX_EVENTS:
                    return
                yield convert.event_to_proto(event)
        finally:
            self._worker.inbox.put(lambda: self._hub.remove(watcher))

    async def ask(self, question: Callable[[], T]) -> T:
        """What `question` answers on the worker's thread. Raises WorkerFailed when the worker stands still."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def reply() -> None:
            found = question()
            loop.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(found))

        self._worker.inbox.put(reply)
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                return await answer
        except TimeoutError as exc:
            raise WorkerFailed(f"the worker's loop has not come round for {ANSWER_WITHIN:.0f} s") from exc

    async def run_leg(
        self, leg: Leg, submit: Submit, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LegUpdate]:
        """The updates of a leg until its end. Leaving early, for whatever reason, cancels it (rule H9)."""
        if self._draining or self._stopping:
            await rpc.abort(context, WorkerFailed("this worker is draining; use another"))
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[LegUpdate] = asyncio.Queue()
        leg_id = next(self._leg_ids)
        self._worker.inbox.put(
            lambda: submit(leg_id, lambda update: loop.call_soon_threadsafe(updates.put_nowait, update))
        )
        ended, patience = False, time.monotonic() + leg.timeout + 5.0  # the worker itself ends a leg at its deadline
        self._streams += 1
        try:
            while not ended:
                update = await self._next(updates, patience)
                ended = update.last
                if update.tokens or update.stats is not None:
                    yield _to_proto(update)
                if update.error is not None:
                    await rpc.abort(context, update.error)
        finally:
            self._streams -= 1
            if not ended:
                self._worker.inbox.put(lambda: self._worker.cancel(leg_id))

    async def _next(self, updates: asyncio.Queue[LegUpdate], patience: float) -> LegUpdate:
        while time.monotonic() < patience:
            try:
                async with asyncio.timeout(1.0):
                    return await updates.get()
            except TimeoutError:
                if not self.healthy():
                    return LegUpdate(error=WorkerFailed("the worker's engine thread ended; it is being restarted"))
        return LegUpdate(error=InternalError("the worker did not end a leg at its deadline"))


def _to_proto(update: LegUpdate) -> pb.LegUpdate:
    stats = convert.stats_to_proto(update.stats) if update.stats is not None else None
    return pb.LegUpdate(tokens=[convert.token_to_proto(token) for token in update.tokens], stats=stats)


class WorkerServer:
    """A started worker as its host sees it (an actor, a process); methods may be called from any thread."""

    def __init__(self, shell: WorkerShell, facts: Mapping[str, object]) -> None:
        self._shell = shell
        self._facts = facts

    @property
    def address(self) -> str:
        return self._shell.address

    @property
    def incarnation(self) -> str:
        return self._shell.description.incarnation

    def describe(self) -> Mapping[str, object]:
        """What was loaded and chosen, and why; for people."""
        return self._facts

    def healthy(self) -> bool:
        return self._shell.healthy()

    def drain(self, timeout: float) -> bool:
        return self._shell.drain(timeout)

    def stop(self) -> None:
        self._shell.stop()


class _WorkerServicer(services.WorkerServicer):
    def __init__(self, shell: WorkerShell) -> None:
        self._shell = shell

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerEvent]:
        async for event in self._shell.watch():
            yield event
