"""Redis and Ray die, stand still and come back empty: whoever is served does not notice (E22 to E24, E26, E63).

The data path needs neither; what they held is rebuilt from the workers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import cast

import httpx
import psutil
import pytest
import redis

from tandem.common.service import HEARTBEAT
from tandem.engine.config import EngineConfig
from tests.faults.clients import Answer, Crowd, Json, make_bodies, record
from tests.faults.local import DEMO_MODEL, pace
from tests.integration.cluster_harness import Cluster, family_of, serve
from tests.integration.local_cluster import LocalCluster
from tests.integration.test_lifecycle import Load, answers

SEED = 22
CLIENTS = 16
STILL = 5.0  # seconds; registrations expire after 2
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


def registered(cluster: LocalCluster) -> set[str]:
    """The incarnations in Redis, read by another client than ours."""
    client = redis.Redis.from_url(cluster._redis.url, socket_timeout=1.0)
    try:
        return {member.decode() for member in cast(set[bytes], client.smembers("tandem:default:workers"))}
    except redis.RedisError:
        return set()
    finally:
        client.close()


def assert_rebuilt(cluster: LocalCluster, within: float) -> None:
    """Every worker is registered again, and nobody else is."""
    living = {server.incarnation for server in cluster.workers.values()}
    until(lambda: registered(cluster) == living, within)
    until(lambda: httpx.get(cluster.url + "/status").json()["registry"] == "up", 2.0)
    assert {worker["incarnation"] for worker in cluster.status()} == living


def test_redis_killed_and_restarted_empty(local: LocalCluster, bodies: list[Json], expected: list[Answer]) -> None:
    server = local._redis
    with Crowd(local.url, bodies, clients=CLIENTS, leavers=0, seed=SEED) as crowd:
        crowd.wait_served(CLIENTS)
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: httpx.get(local.url + "/status").json()["registry"] == "down", 5.0)
        crowd.wait_served(2 * CLIENTS)  # those in flight and new ones
        server.restart()
        server.wait()
        assert_rebuilt(local, 2 * HEARTBEAT + 1.0)  # the 1 s is for a busy machine
        crowd.wait_served(CLIENTS)
    crowd.check(expected)


def test_redis_that_stands_still(local: LocalCluster, bodies: list[Json], expected: list[Answer]) -> None:
    """Not dead, so that every call to it hangs until its timeout; behind it every registration has expired."""
    pid = local._redis.pid
    with Crowd(local.url, bodies, clients=CLIENTS, leavers=0, seed=SEED) as crowd:
        crowd.wait_served(CLIENTS)
        os.kill(pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + STILL
            while time.monotonic() < deadline:
                crowd.wait_served(1)
            assert httpx.get(local.url + "/readyz").status_code == 200
        finally:
            os.kill(pid, signal.SIGCONT)
        assert_rebuilt(local, 2 * HEARTBEAT + 1.0)
        crowd.wait_served(CLIENTS)
    crowd.check(expected)


@pytest.mark.timeout(300)
def test_a_ray_that_dies_is_replaced_while_its_workers_serve() -> None:
    """The scheduler of the node, then the head: either end would end Ray's actors within seconds, in Ray's own way."""
    flags = ("--prefill", "1", "--decode", "1", "--kv-cache-memory-bytes", str(32 << 20), "--no-dashboard")
    with serve(*flags) as cluster:
        for part in ("raylet", "gcs_server"):
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


def until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
