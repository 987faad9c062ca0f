"""A client leaves, in every state its request can be in, a hundred times each: both workers have their blocks back.

The states are reached without luck: steps of the engines are slowed, D's pool is filled by the test, a message is held
back; and then the workers' own state says where each request is. The promise is 200 ms behind the client's close.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.common.errors import WorkerFailed
from tandem.decode_worker.reservation import Phase as Landing
from tandem.engine.config import EngineConfig
from tandem.prefill_worker.transfer import Phase as Sending
from tandem.router.prompts import THREADS
from tests.faults.clients import PLAIN
from tests.faults.local import DEMO_MODEL, on_thread, pace, worker_of
from tests.integration.local_cluster import LocalCluster
from tests.router.fake_cluster import MODEL, FakeCluster, Script

SEED = 20261121
TIMES = 100  # disconnects in each state
CLIENTS = 10  # at a time
PROMISE = 0.2  # seconds
STEP = 0.004  # seconds a step of an engine takes at least


@dataclass
class Rig:
    """One prefill and one decode worker, their router, and a source of prompts nobody has cached."""

    cluster: LocalCluster
    random: random.Random

    def __post_init__(self) -> None:
        self.p, self.d = self.cluster.workers["prefill-0"], self.cluster.workers["decode-0"]
        self.prefill, self.decode = worker_of(self.p), worker_of(self.d)

    @property
    def used(self) -> list[tuple[int, int, int]]:
        counts = [server.pool.counts() for server in (self.p, self.d)]
        return [(count.owned, count.reserved, count.quarantined) for count in counts]

    def send(self, stream: bool, prompt: int, max_tokens: int) -> socket.socket:
        """A request of `prompt` tokens whose answer nobody reads yet."""
        body = json.dumps({
            "model": "m", "prompt": [self.random.randrange(10, 2000) for _ in range(prompt)], "stream": stream,
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        })  # fmt: skip
        host, port = self.cluster.url.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return client

    def metric(self, name: str) -> int:
        lines = httpx.get(self.cluster.url + "/metrics", verify=PLAIN).text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name) and "_created" not in line)

    def transfers(self, *phases: Sending) -> int:
        return on_thread(self.p, lambda: sum(t.phase in phases for t in self.prefill._transfers.values()))

    def reservations(self, phase: Landing) -> int:
        return on_thread(self.d, lambda: sum(r.phase is phase for r in self.decode.handoffs._reservations.values()))

    def running(self) -> int:
        """Sequences with at least two tokens of their own."""
        return on_thread(self.d, lambda: sum(s.output_len >= 2 for s in self.decode.scheduler.running))

    @contextmanager
    def full(self) -> Iterator[None]:
        """D has no block to give."""
        pool = self.d.pool
        blocks = on_thread(self.d, lambda: pool.allocate(pool.available))
        try:
            yield
        finally:
            on_thread(self.d, lambda: pool.release(blocks or []))

    @contextmanager
    def draining(self) -> Iterator[None]:
        """No decode worker takes a leg, so the router has nowhere to send one."""
        hub = self.d._shell._hub
        on_thread(self.d, lambda: hub.set_state("draining"))
        try:
            yield
        finally:
            on_thread(self.d, lambda: hub.set_state("ready"))
            self.cluster.wait_ready()


def until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the state was not reached"
        time.sleep(0.001)  # a poll of other threads, with a deadline
    return value


def back(rig: Rig, before: list[tuple[int, int, int]]) -> float:
    """Seconds until both pools are as they were and no worker knows of a request any more."""
    start = time.monotonic()
    until(lambda: rig.used == before and rig.prefill.idle and rig.decode.idle)
    return time.monotonic() - start


def leave(rig: Rig, prompt: int, max_tokens: int, clients: int, reached: Callable[[Rig], int]) -> tuple[int, float]:
    """`clients` requests, half of them streams, left together once `reached`. How many were there, and seconds."""
    before = rig.used
    sockets = [rig.send(index % 2 == 0, prompt, max_tokens) for index in range(clients)]
    with ExitStack() as stack:
        for client in sockets:
            stack.callback(client.close)
        there = until(lambda: reached(rig))
    return there, back(rig, before)


def leave_often(rig: Rig, prompt: int, max_tokens: int, reached: Callable[[Rig], int], clients: int = CLIENTS) -> None:
    """At least TIMES requests leave in the state, and all within the promise."""
    times, there = list[float](), 0
    while there < TIMES:
        count, seconds = leave(rig, prompt, max_tokens, clients, reached)
        there += count
        times.append(seconds)
    report(times, there)


def report(times: list[float], there: int) -> None:
    worst, median = max(times), statistics.median(times)
    print(f"{there} disconnects: p50 {median * 1000:.0f} ms, max {worst * 1000:.0f} ms (seed {SEED})")
    assert worst <= PROMISE, f"blocks were back after {sorted(times)[-5:]} s"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    engine = EngineConfig(
        model=str(DEMO_MODEL), device="cpu", kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=32
    )
    with LocalCluster(engine, 1, 1) as cluster:
        for server in cluster.workers.values():
            pace(server, STEP)
        yield Rig(cluster, random.Random(SEED))


@pytest.fixture(autouse=True)
def at_rest(rig: Rig) -> Iterator[None]:
    yield
    rig.cluster.assert_at_rest()
    assert rig.metric("tandem_router_requests_in_flight") == 0
    assert rig.metric("tandem_router_queued_") == 0


async def test_tokenizing(model_dir: Path) -> None:
    """In the router, before there is a leg: both of its threads are held, and what waits for them is forgotten."""
    times, release = list[float](), threading.Event()
    async with FakeCluster(model_dir, Script([[60]])) as fake:
        prompts: Any = fake.services.prompts
        held = [asyncio.create_task(prompts._run(release.wait)) for _ in range(THREADS)]
        port = int(fake.url.rsplit(":", 1)[1])
        try:
            for _ in range(TIMES // CLIENTS):
                clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CLIENTS)]
                for index, (_, writer) in enumerate(clients):
                    body = json.dumps({"model": MODEL, "prompt": "hi", "stream": index % 2 == 0}).encode()
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
                    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                await fake.until(lambda: prompts._waiting == THREADS + CLIENTS)
                for _, writer in clients:
                    writer.close()
                start = time.monotonic()
                await fake.until(lambda: prompts._waiting == THREADS)
                times.append(time.monotonic() - start)
        finally:
            release.set()
        await asyncio.gather(*held)
        assert (await fake.complete()).status_code == 200, "the threads are free again"
        assert [len(worker.legs) for worker in (*fake.prefill, *fake.decode)] == [1, 1]
        assert (fake.services.admission.sequences, fake.metric("tandem_router_requests_in_flight")) == (0, 0)
    report(times, TIMES)


def test_queued_at_the_prefill_worker(rig: Rig) -> None:
    """P asks for the first one or two only: their tokens fill the window of its next steps."""
    leave_often(rig, 200, 8, lambda rig: rig.transfers(Sending.QUEUED) if rig.decode.load().waiting == CLIENTS else 0)


def test_reserving(rig: Rig) -> None:
    """D is full, so the reservations are parked."""
    with rig.full():
        leave_often(rig, 8, 8, lambda rig: CLIENTS if rig.reservations(Landing.PARKED) == CLIENTS else 0)


def test_landing_in_the_middle_of_a_prompt(rig: Rig) -> None:
    def half_way(rig: Rig) -> int:
        def count() -> int:
            transfers = rig.prefill._transfers.values()
            return sum(t.phase is Sending.COMPUTING and 0 < t.sequence.computed < 160 for t in transfers)

        return on_thread(rig.p, count) and rig.reservations(Landing.LANDING)

    leave_often(rig, 160, 8, half_way, clients=1)


def test_sent_and_not_verified(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything has landed, and the manifest waits."""
    monkeypatch.setattr(rig.decode.handoffs, "_on_manifest", lambda *_: None)
    leave_often(rig, 8, 8, lambda rig: rig.transfers(Sending.SENT) if rig.transfers(Sending.SENT) == CLIENTS else 0)


def test_running(rig: Rig) -> None:
    leave_often(rig, 8, 400, lambda rig: CLIENTS if rig.running() == CLIENTS else 0)


def test_preempted(rig: Rig) -> None:
    """D's pool is filled behind ten running sequences: as they grow, the youngest give their blocks up."""
    times, there = list[float](), 0
    while there < TIMES:
        before = rig.used
        with ExitStack() as stack:
            sockets = [stack.enter_context(rig.send(index % 2 == 0, 8, 400)) for index in range(CLIENTS)]
            until(lambda: rig.running() == CLIENTS)
            with rig.full():
                there += until(lambda: preempted if (preempted := len(rig.decode.scheduler.waiting)) >= 4 else 0)
                for client in sockets:
                    client.close()
                start = time.monotonic()
                until(lambda: rig.prefill.idle and rig.decode.idle)
                times.append(time.monotonic() - start)
        assert rig.used == before
    report(times, there)


def test_migrating(rig: Rig) -> None:
    """Their decode worker gave them up, and there is no other: they wait in the router, holding nothing."""
    for _ in range(TIMES // CLIENTS):
        sockets = [rig.send(index % 2 == 0, 8, 400) for index in range(CLIENTS)]
        until(lambda: rig.running() == CLIENTS)
        with rig.draining():
            until(lambda: not rig.cluster.status() or len(rig.cluster.status()) == 1)
            on_thread(rig.d, lambda: [rig.decode.end(leg, WorkerFailed("test")) for leg in list(rig.decode._legs)])
            until(lambda: rig.decode.idle and rig.prefill.idle)
            assert rig.metric("tandem_router_requests_in_flight") == CLIENTS
            for client in sockets:
                client.close()
            until(lambda: rig.metric("tandem_router_requests_in_flight") == 0, timeout=2.0)
        assert rig.decode.idle


def test_waiting_in_the_router(rig: Rig) -> None:
    """No decode worker has ever taken them."""

    def left() -> int:
        return rig.metric('http_requests_total{handler="/v1/completions",method="POST",status="499"}')

    before = left()
    with rig.draining():
        until(lambda: len(rig.cluster.status()) == 1)
        for times in range(1, TIMES // CLIENTS + 1):
            sockets = [rig.send(index % 2 == 0, 8, 8) for index in range(CLIENTS)]
            rig.metric("tandem_router")  # answered behind them on the router's one thread
            for client in sockets:
                client.close()
            until(lambda times=times: left() == before + times * CLIENTS, timeout=2.0)
    assert rig.prefill.idle and rig.decode.idle
