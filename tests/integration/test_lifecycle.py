"""A real `tandem serve` with Ray: what a newcomer sees, live scaling, killed workers, memory, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.integration.cluster_harness import Cluster, serve

KV_BYTES = 64 << 20
PROMPTS = [f"Tandem number {i} serves " + "large language models " * (i % 9) for i in range(12)]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serve("--prefill", "1", "--decode", "1", "--kv-cache-memory-bytes", str(KV_BYTES)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def at_rest_afterwards(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.wait_until(lambda: all(is_at_rest(worker) for worker in cluster.status()["workers"]), 10, "rest")


def is_at_rest(worker: dict[str, dict[str, int]]) -> bool:
    kv = worker["kv"]
    return kv["free"] + kv["cached"] == kv["total"]


def scale(cluster: Cluster, prefill: int, decode: int) -> None:
    done = cluster.run("scale", f"prefill={prefill}", f"decode={decode}", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Load:
    """Clients in a closed loop, each comparing every answer with the first one it saw for that prompt."""

    url: str
    expected: dict[str, str] = field(default_factory=dict[str, str])
    answered: int = 0
    failures: list[str] = field(default_factory=list[str])

    async def ask(self, client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "tandem-demo", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {response.text}")
        return response.json()["choices"][0]["text"]

    async def client(self, number: int, stop: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            turn = number
            while not stop.is_set():
                prompt = PROMPTS[turn % len(PROMPTS)]
                turn += 1
                try:
                    answer = await self.ask(client, prompt)
                except (AssertionError, httpx.HTTPError) as exc:
                    self.failures.append(repr(exc))
                    continue
                self.answered += 1
                if answer != self.expected.setdefault(prompt, answer):
                    self.failures.append(f"{prompt!r}: {answer!r} instead of {self.expected[prompt]!r}")

    @asynccontextmanager
    async def running(self, clients: int = 6) -> AsyncIterator[None]:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.client(number, stop))
            try:
                yield
            finally:
                stop.set()


async def under_load(cluster: Cluster, action: Callable[[], None]) -> Load:
    """Run `action` while clients ask, with answers before and behind it."""
    load = Load(cluster.base_url)
    async with load.running():
        await answers(load, 20)
        await asyncio.to_thread(action)
        await answers(load, load.answered + 20)
    return load


async def answers(load: Load, count: int) -> None:
    async with asyncio.timeout(120):
        while load.answered < count and not load.failures:
            await asyncio.sleep(0.05)


def test_the_printed_curl_gives_a_sentence(cluster: Cluster) -> None:
    line = next(line for line in cluster.lines if line.strip().startswith("curl "))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    content = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert content.startswith("Tandem ") and content.endswith("."), content


def test_status_tells_who_runs(cluster: Cluster) -> None:
    done = cluster.run("status", "--json")
    workers = json.loads(done.stdout)["workers"]
    assert {worker["name"]: worker["role"] for worker in workers} == {"prefill-0": "prefill", "decode-0": "decode"}
    for worker in workers:
        assert psutil.pid_exists(worker["pid"]) and worker["incarnation"] and worker["state"] == "ready"
    table = cluster.run("status").stdout
    assert "prefill-0" in table and "decode-0" in table


def test_memory_stays_within_its_bounds(cluster: Cluster) -> None:
    asyncio.run(under_load(cluster, lambda: None))
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    router = next(process for process in family if "tandem.router" in process.cmdline())
    assert router.memory_info().rss <= 300 << 20
    for worker in cluster.status()["workers"]:
        assert psutil.Process(worker["pid"]).memory_info().rss <= KV_BYTES + (10 << 20) + (700 << 20)


def test_scaling_under_load_loses_no_request(cluster: Cluster) -> None:
    load = asyncio.run(under_load(cluster, lambda: scale(cluster, 2, 2)))
    assert not load.failures
    names = {worker["name"] for worker in cluster.status()["workers"]}
    assert names == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    load = asyncio.run(under_load(cluster, lambda: scale(cluster, 1, 1)))
    assert not load.failures
    assert {worker["name"] for worker in cluster.status()["workers"]} == {"prefill-0", "decode-0"}


def test_a_rolling_restart_under_load_loses_no_request(cluster: Cluster) -> None:
    """With one worker per pool, so each successor is ready before its predecessor leaves."""
    before = {worker["incarnation"]: worker["pid"] for worker in cluster.status()["workers"]}

    def restart() -> None:
        done = cluster.run("restart", timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr

    load = asyncio.run(under_load(cluster, restart))
    assert not load.failures
    workers = cluster.status()["workers"]
    assert sorted(worker["role"] for worker in workers) == ["decode", "prefill"]
    assert not {worker["incarnation"] for worker in workers} & before.keys()
    assert not any(psutil.pid_exists(pid) for pid in before.values())


def test_sigterm_drains_a_worker_and_its_successor_takes_over(cluster: Cluster) -> None:
    before = next(worker for worker in cluster.status()["workers"] if worker["role"] == "prefill")

    def leave() -> None:
        os.kill(before["pid"], signal.SIGTERM)
        cluster.wait_until(lambda: not psutil.pid_exists(before["pid"]), 60, "its end")
        cluster.wait_until(lambda: has_one(cluster, "prefill"), 60, "its successor")

    load = asyncio.run(under_load(cluster, leave))
    assert not load.failures  # a drain shorter than the time between two looks at a worker is taken for its death


def has_one(cluster: Cluster, role: str) -> bool:
    return [worker["state"] for worker in cluster.status()["workers"] if worker["role"] == role] == ["ready"]


def test_draining_a_worker_by_name(cluster: Cluster) -> None:
    name = next(worker["name"] for worker in cluster.status()["workers"] if worker["role"] == "decode")
    before = cluster.worker(name)
    refused = cluster.run("drain", "decode-77")
    assert refused.returncode == 1 and "decode-77" in refused.stderr and name in refused.stderr
    done = cluster.run("drain", name, "--timeout", "30", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before is not None
    cluster.wait_until(lambda: not psutil.pid_exists(before["pid"]), 10, "its process's end")
    cluster.wait_until(lambda: has_one(cluster, "decode"), 20, "its successor")


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_killed_worker_comes_back_and_no_answer_is_lost_or_wrong(cluster: Cluster, role: str) -> None:
    before = next(worker for worker in cluster.status()["workers"] if worker["role"] == role)
    name = before["name"]

    def kill_and_wait() -> None:
        os.kill(before["pid"], signal.SIGKILL)
        cluster.wait_until(lambda: is_new(cluster.worker(name), before["incarnation"]), 60, f"{name} coming back")

    load = asyncio.run(under_load(cluster, kill_and_wait))
    assert not load.failures


def is_new(worker: dict[str, str] | None, incarnation: str) -> bool:
    return worker is not None and worker["incarnation"] != incarnation and worker["state"] == "ready"
