"""Workers and the router leave in order under load: nobody's answer is lost, refused or wrong (rules H10, H11; E40)."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tandem.common.errors import WorkerFailed
from tandem.common.worker_config import Role
from tandem.decode_worker.reservation import Phase
from tandem.engine.config import EngineConfig
from tests.faults.clients import PLAIN, Answer, Crowd, Json, ask, make_bodies, record
from tests.faults.local import DEMO_MODEL, on_thread, pace, worker_of
from tests.faults.scale import SCALE
from tests.integration.local_cluster import LocalCluster

SEED = 40
REQUESTS = 80 * SCALE  # at least, in a rolling restart
ENGINE = EngineConfig(model=str(DEMO_MODEL), device="cpu", kv_cache_memory_bytes=32 << 20)


@pytest.fixture(scope="module")
def bodies() -> list[Json]:
    return make_bodies(SEED)[:12]


@pytest.fixture(scope="module")
def expected(bodies: list[Json]) -> list[Answer]:
    with LocalCluster(ENGINE) as cluster:
        return record(cluster.url, bodies)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(ENGINE, 2, 2, ("--shutdown-timeout", "30")) as cluster:
        yield cluster


def replace(cluster: LocalCluster, role: Role, index: int, successor: int, timeout: float) -> bool:
    """As the controller does: the successor starts when the drain does. Whether everything ended by itself."""
    name = f"{role}-{index}"
    drained = cluster.workers[name].drain(timeout)
    cluster.remove(name)
    cluster.add(role, successor)
    cluster.wait_ready()
    return drained


def test_a_rolling_restart_of_every_worker_fails_no_request(
    cluster: LocalCluster, bodies: list[Json], expected: list[Answer]
) -> None:
    """E40. With TANDEM_FAULT_SCALE=10, 800 requests."""
    roles: tuple[Role, ...] = ("prefill", "decode")
    with Crowd(cluster.url, bodies, clients=8, leavers=0, seed=SEED) as crowd:
        for role in roles:
            for index in (0, 1):
                crowd.wait_served(max(8, REQUESTS // 5))
                assert replace(cluster, role, index, index + 2, 30.0)
        crowd.wait_served(max(8, REQUESTS - crowd.whole))
    crowd.check(expected)
    print(f"4 workers restarted one after the other: 0 failed of {len(crowd.answers)}")
    assert set(cluster.workers) == {"prefill-2", "prefill-3", "decode-2", "decode-3"}


def test_what_outlasts_the_drain_goes_on_elsewhere_without_a_lost_or_repeated_token(
    cluster: LocalCluster, bodies: list[Json], expected: list[Answer]
) -> None:
    for server in cluster.workers.values():
        pace(server, 0.05)
    with Crowd(cluster.url, bodies, clients=8, leavers=0, seed=SEED) as crowd:
        until(lambda: running(cluster, "decode-0") > 0)
        assert not replace(cluster, "decode", 0, 2, 0.0), "there was nothing to give up"
        until(lambda: running(cluster, "prefill-0") > 0)
        replace(cluster, "prefill", 0, 2, 0.0)
        crowd.wait_served(8)
    crowd.check(expected)


def test_a_draining_worker_takes_no_new_leg_even_if_the_router_does_not_know_yet(cluster: LocalCluster) -> None:
    """The state travels on the worker's own thread, which may be in a long step: admission must not wait for it."""
    server = cluster.workers["decode-0"]
    shell, worker, release = server._shell, worker_of(server), threading.Event()
    taken: list[object] = []
    worker.submit = lambda *leg: taken.append(leg)
    worker.inbox.put(release.wait)
    try:
        shell._loop.call_soon_threadsafe(shell._refuse_new_legs)
        answers = asyncio.run(ask_many(cluster.url, {"prompt": "Tandem is", "max_tokens": 2, "temperature": 0}, 6))
        assert shell._hub.state == "ready", "its thread stands still, so the router cannot know"
    finally:
        release.set()
    assert [answer.end for answer in answers] == ["done"] * 6
    on_thread(server, lambda: None)  # everything that was handed to it has run
    assert not taken


def test_a_drain_does_not_wait_for_a_worker_that_died(cluster: LocalCluster) -> None:
    """Rule H10: no wait has a deadline only."""
    server = cluster.workers["decode-1"]
    pace(server, 0.2)
    with Crowd(cluster.url, make_bodies(SEED)[:6], clients=6, leavers=0, seed=SEED):
        until(lambda: running(cluster, "decode-1") > 0)
        server._shell._worker.inbox.put(die)
        started = time.monotonic()
        assert not server.drain(60.0)
        assert time.monotonic() - started < 5.0


def test_a_worker_that_dies_keeps_in_quarantine_what_was_landing(cluster: LocalCluster) -> None:
    """Rule H3: P may still write to it, and nobody is left here who would take P's word that it does not."""
    server = cluster.workers["decode-1"]
    worker = worker_of(server)

    def die_while_landing() -> None:
        if any(reservation.phase is Phase.LANDING for reservation in worker.handoffs._reservations.values()):
            die()
        worker.inbox.put(die_while_landing)

    pace(server, 0.2)
    with Crowd(cluster.url, make_bodies(SEED)[:6], clients=6, leavers=0, seed=SEED):
        worker.inbox.put(die_while_landing)
        until(lambda: not server.healthy())
    counts = server.pool.counts()
    assert counts.quarantined > 0 and counts.owned == counts.reserved == 0


def die() -> None:
    raise WorkerFailed("the engine is lost, says the test")


# ---------------------------------------------------------------------------------------------------- the router


@asynccontextmanager
async def streaming(url: str) -> AsyncIterator[asyncio.Task[Answer]]:
    """A stream of which the first event has come."""
    body: Json = {"model": "m", "prompt": "Tandem is", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=PLAIN) as client:
        task = asyncio.create_task(ask(client, 0, body | {"stream": True, "return_token_ids": True}))
        await asyncio.to_thread(until, lambda: total_running(url) > 0)
        yield task


def test_a_router_told_to_leave_finishes_its_streams_and_refuses_new_requests(cluster: LocalCluster) -> None:
    pace(cluster.workers["decode-0"], 0.05)
    pace(cluster.workers["decode-1"], 0.05)
    asyncio.run(leave_in_order(cluster))
    assert cluster._router.wait(10) == 0


async def leave_in_order(cluster: LocalCluster) -> None:
    async with streaming(cluster.url) as stream, httpx.AsyncClient(base_url=cluster.url, verify=PLAIN) as client:
        await client.get("/livez")  # an open connection, as a load balancer has
        cluster._router.send_signal(signal.SIGTERM)
        while (ready := await client.get("/readyz")).status_code == 200:
            pass  # the signal is on its way
        refused = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        for response in (ready, refused):
            assert response.status_code == 503
            assert float(response.headers["retry-after"]) > 0
            assert response.headers["connection"] == "close"
        assert refused.json()["error"]["code"] == "engine_overloaded"
        assert (await client.get("/livez")).status_code == 200
        answer = await stream
    assert answer.end == "done" and not answer.problems
    assert len(answer.choices[0].token_ids) == 48


def test_a_second_sigterm_ends_the_router_at_once(cluster: LocalCluster) -> None:
    pace(cluster.workers["decode-0"], 0.5)
    pace(cluster.workers["decode-1"], 0.5)
    router = cluster._router

    async def run() -> None:
        async with streaming(cluster.url) as stream, httpx.AsyncClient(base_url=cluster.url, verify=PLAIN) as client:
            router.send_signal(signal.SIGTERM)
            while (await client.get("/readyz")).status_code == 200:
                pass
            assert router.poll() is None
            router.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(router.wait, 2.0) == 0  # one second, and one for a busy machine
            await stream

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------- helpers


async def ask_many(url: str, fields: dict[str, Any], count: int) -> list[Answer]:
    body: Json = {"model": "m", "stream": True, "return_token_ids": True, **fields}
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=PLAIN) as client:
        return await asyncio.gather(*(ask(client, index, body) for index in range(count)))


def status(url: str) -> list[dict[str, Any]]:
    return json.loads(httpx.get(url + "/status", verify=PLAIN).text)["workers"]


def running(cluster: LocalCluster, name: str) -> int:
    return sum(worker["running"] for worker in status(cluster.url) if worker["name"] == name)


def total_running(url: str) -> int:
    return sum(worker["running"] for worker in status(url) if worker["role"] == "decode")


def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
