"""Redis and Ray die, stand still and come back empty: whoever is served does not notice (E22 to E24, E26, E63).

The data path needs neither; what they held is rebuilt from the workers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
import redis
import redis.exceptions

from tandem.common.service import HEARTBEAT
from tandem.engine.config import EngineConfig
from tandem.router.membership import LIST_INTERVAL
from tests.faults.clients import PLAIN, Answer, Crowd, Json, make_bodies, record
from tests.faults.local import DEMO_MODEL, pace
from tests.faults.scale import SCALE
from tests.integration.cluster_harness import Cluster, family_of, serve
from tests.integration.local_cluster import LocalCluster
from tests.integration.test_lifecycle import Load, answers
from tests.router.fake_cluster import FakeCluster, FakeWorker, Script

SEED = 22
CLIENTS = 8
STILL = 20.0 if SCALE > 1 else 5.0  # seconds; registrations expire after 2
PARTS = ("gcs_server", "raylet") if SCALE > 1 else ("gcs_server",)  # of Ray: when one has died, serve kills the other
ENGINE = EngineConfig(model=str(DEMO_MODEL), device="cpu", kv_cache_memory_bytes=32 << 20)


@pytest.fixture(scope="module")
def bodies() -> list[Json]:
    return make_bodies(SEED)[:12]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    with LocalCluster(ENGINE, 1, 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(local: LocalCluster, bodies: list[Json]) -> list[Answer]:
    answers = record(local.url, bodies)
    for server in local.workers.values():
        pace(server, 0.01)
    return answers


@contextmanager
def client_of(cluster: LocalCluster) -> Iterator[redis.Redis]:
    """Another client than ours."""
    client = redis.Redis.from_url(cluster._redis.url, socket_timeout=1.0)
    try:
        yield client
    finally:
        client.close()


def registered(cluster: LocalCluster) -> set[str]:
    """The incarnations in Redis with a registration that has not expired."""
    with client_of(cluster) as client, suppress(redis.RedisError):
        found = [member.decode() for member in cast(set[bytes], client.smembers("tandem:default:workers"))]
        values = cast(list[bytes | None], client.mget([f"tandem:default:worker:{member}" for member in found] or ["-"]))
        return {member for member, value in zip(found, values, strict=False) if value is not None}
    return set()


def assert_rebuilt(cluster: LocalCluster, within: float) -> None:
    """Every worker is registered again, and nobody else is."""
    living = {server.incarnation for server in cluster.workers.values()}
    until(lambda: registered(cluster) == living, within)
    until(lambda: httpx.get(cluster.url + "/status", verify=PLAIN).json()["registry"] == "up", 2.0)
    assert {worker["incarnation"] for worker in cluster.status()} == living


@contextmanager
def nobody_waits_longer(crowd: Crowd, what: str) -> Iterator[None]:
    """Per token, the median of what ends inside is at most twice that of before, and 5 ms."""
    crowd.wait_served(3 * CLIENTS)
    before, first = crowd.median(), len(crowd.answers)
    yield
    crowd.wait_served(2 * CLIENTS)  # half of them began inside
    meanwhile = crowd.median(first)
    print(
        f"{what}: median latency per token {before * 1000:.1f} ms before, {meanwhile * 1000:.1f} ms meanwhile "
        f"({len(crowd.answers) - first} requests)"
    )
    assert meanwhile <= 2 * before + 0.005


def test_redis_killed_and_restarted_empty(local: LocalCluster, bodies: list[Json], expected: list[Answer]) -> None:
    server = local._redis
    with Crowd(local.url, bodies, clients=CLIENTS, leavers=0, seed=SEED) as crowd:
        crowd.wait_served(CLIENTS)
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: httpx.get(local.url + "/status", verify=PLAIN).json()["registry"] == "down", 5.0)
        for _ in range(SCALE):
            crowd.wait_served(4 * CLIENTS)  # those in flight and new ones
        server.restart()
        server.wait()
        assert_rebuilt(local, 2 * HEARTBEAT + 1.0)  # the 1 s is for a busy machine
        crowd.wait_served(CLIENTS)
    crowd.check(expected)


def test_redis_that_stands_still(local: LocalCluster, bodies: list[Json], expected: list[Answer]) -> None:
    """Not dead, so that every call to it hangs until its timeout; behind it every registration has expired."""
    pid = local._redis.pid
    with Crowd(local.url, bodies, clients=CLIENTS, leavers=0, seed=SEED) as crowd:
        with nobody_waits_longer(crowd, f"Redis stands still for {STILL:.0f} s"):
            os.kill(pid, signal.SIGSTOP)
            try:
                deadline = time.monotonic() + STILL
                while time.monotonic() < deadline:
                    crowd.wait_served(1)
                assert httpx.get(local.url + "/readyz", verify=PLAIN).status_code == 200
            finally:
                os.kill(pid, signal.SIGCONT)
        assert_rebuilt(local, 2 * HEARTBEAT + 1.0)
    crowd.check(expected)


REFUSING = {  # what makes Redis refuse to write, how it says so, and what ends it
    "maxmemory": (("CONFIG", "SET", "maxmemory", "1"), "OutOfMemoryError", ("CONFIG", "SET", "maxmemory", "0")),
    "READONLY": (("REPLICAOF", "127.0.0.1", "1"), "ReadOnlyError", ("REPLICAOF", "NO", "ONE")),
}


@pytest.mark.parametrize("how", REFUSING)
def test_redis_that_refuses_to_write(how: str, local: LocalCluster, bodies: list[Json], expected: list[Answer]) -> None:
    """Full, or a replica behind a failover: registrations expire, and whoever serves goes on."""
    begin, error, end = REFUSING[how]
    with client_of(local) as client, Crowd(local.url, bodies, clients=CLIENTS, leavers=0, seed=SEED) as crowd:
        with nobody_waits_longer(crowd, how):
            client.execute_command(*begin)
            try:
                with pytest.raises(getattr(redis.exceptions, error)):
                    client.set("probe", "1")
                until(lambda: not registered(local), 5.0, every=0.2)  # seldom: the workers are threads of this process
                assert httpx.get(local.url + "/readyz", verify=PLAIN).status_code == 200
            finally:
                client.execute_command(*end)
        assert_rebuilt(local, 2 * HEARTBEAT + 1.0)
    crowd.check(expected)


@pytest.mark.timeout(300)
def test_a_ray_that_dies_is_replaced_while_its_workers_serve() -> None:
    """The head, and the node's scheduler with it: either end would end Ray's actors within seconds, in Ray's own way.

    With TANDEM_FAULT_SCALE, the scheduler too is the one to die first.
    """
    flags = ("--prefill", "1", "--decode", "1", "--kv-cache-memory-bytes", str(32 << 20), "--no-dashboard")
    with serve(*flags) as cluster:
        for part in PARTS:
            load = asyncio.run(under_load(cluster, part))
            assert not load.failures, cluster.output
        assert cluster.run("status").returncode == 0
        scaled = cluster.run("scale", "prefill=0", timeout=120)
        assert scaled.returncode == 0, "the record must lead to the new Ray: " + scaled.stderr


async def under_load(cluster: Cluster, part: str) -> Load:
    """Kill `part` of Ray under load, with answers before, while it is away, and from the new workers."""
    before = incarnations(cluster)
    load = Load(cluster.base_url)
    async with load.running():
        await answers(load, 12)
        next(process for process in family_of(cluster) if process.name() == part).send_signal(signal.SIGKILL)
        await answers(load, load.answered + 12)
        await asyncio.to_thread(cluster.wait_until, lambda: replaced(cluster, before), 200, f"life without {part}")
        await answers(load, load.answered + 12)
    return load


def incarnations(cluster: Cluster) -> dict[str, int]:
    return {worker["incarnation"]: worker["pid"] for worker in cluster.status()["workers"]}


def replaced(cluster: Cluster, before: dict[str, int]) -> bool:
    """The router has as many workers as before, all of them new, and the old processes have ended."""
    now = incarnations(cluster)
    ended = not any(psutil.pid_exists(pid) for pid in before.values())
    return len(now) == len(before) and not now.keys() & before.keys() and ended


def until(condition: Callable[[], bool], timeout: float, every: float = 0.02) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)


# ---------------------------------------------------------------------------------------- tasks that end (E63)

ENDS = [("membership", "raises"), ("membership", "cancelled"), ("decode-0", "raises"), ("decode-0", "cancelled")]


@pytest.mark.parametrize(("task", "how"), ENDS)
async def test_a_task_of_the_router_that_ends_is_replaced(
    task: str, how: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that looks for workers, and one that follows a worker: of the router's own, these are all."""
    async with FakeCluster(model_dir, Script([[60]])) as fake:
        running = next(running for running in fake.members._tasks if running.get_name() == task)
        if how == "cancelled":
            running.cancel()
        else:
            where = (fake.registry, "list") if task == "membership" else (fake.members.index, "store")
            with monkeypatch.context() as patch:
                patch.setattr(*where, failing)
                fake.decode[0].tell(load=replace(fake.decode[0].load, running=1))
                await asyncio.sleep(2 * LIST_INTERVAL)  # in which it comes to that
        await fake.add(FakeWorker("decode-1", "decode", Script([[60]])))
        await fake.until(lambda: len(fake.members.workers("decode")) == 2, timeout=2.0)
        assert (await fake.complete()).status_code == 200


def failing(*_: object) -> None:
    raise RuntimeError("a bug, says the test")


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_dead_heart_is_no_health(name: str, local: LocalCluster) -> None:
    """Without it every peer gives this worker's links up after five seconds, again and again."""
    server = local.workers[name]
    assert server.healthy()
    server._heart.stop()
    until(lambda: not server.healthy(), 2.0)
