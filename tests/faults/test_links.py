"""Bad networks between P and D: requests succeed by going another way, nothing waits past its deadline (E16 – E21).

Real workers in threads, two of each role; every link between a P and a D, the gRPC channel and the streams of the
`tcp` connector alike, goes through a fault proxy. The oracle is the same cluster without the fault.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tandem.cluster.fault_proxy import Fault, FaultProxy
from tandem.common.errors import TransferFailed
from tandem.engine.config import EngineConfig
from tandem.kv_transfer import tcp
from tandem.kv_transfer.negotiation import NegotiatedSender
from tandem.prefill_worker import service
from tests.faults.local import DEMO_MODEL
from tests.integration.local_cluster import LocalCluster

DEADLINE = 60.0  # seconds; every request must end long before
PROMPTS = [f"Story number {index}. " + "Once upon a time there was a worker. " * (index % 7 * 4) for index in range(16)]


class Network:
    """The proxies between P and D, by who talks to whom."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._stack = ExitStack()
        self.proxies: dict[tuple[str, str], FaultProxy] = {}  # (P's name, address in D)
        original, take, network = service._Connector.__call__, tcp._Address.take.__func__, self

        def connect(connector: Any, address: str, *rest: Any) -> Any:
            host = network.through(connector._config.name, address)
            return original(connector, host, *rest)

        def taken(cls: Any, mailbox: Any, deadline: float) -> Any:
            found = take(cls, mailbox, deadline)
            through = network.through("", f"{found.host}:{found.port}")
            return replace(found, port=int(through.rsplit(":", 1)[1]))

        patch.setattr(service._Connector, "__call__", connect)
        patch.setattr(tcp._Address, "take", classmethod(taken))

    def through(self, name: str, address: str) -> str:
        if (name, address) not in self.proxies:
            host, port = address.rsplit(":", 1)
            self.proxies[name, address] = self._stack.enter_context(FaultProxy(host, int(port)))
        return f"127.0.0.1:{self.proxies[name, address].port}"

    def between(self, prefill: str) -> list[FaultProxy]:
        """Of the channels of one prefill worker."""
        return [proxy for (name, _), proxy in self.proxies.items() if name == prefill]

    def data(self) -> list[FaultProxy]:
        return self.between("")

    def heal(self) -> None:
        for proxy in self.proxies.values():
            proxy.heal()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def network(patch: pytest.MonkeyPatch) -> Iterator[Network]:
    network = Network(patch)
    yield network
    network.close()


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[LocalCluster]:
    engine = EngineConfig(str(DEMO_MODEL), max_num_batched_tokens=128, kv_cache_memory_bytes=64 << 20)
    flags = ("--request-timeout", str(DEADLINE))
    with LocalCluster(engine, prefill=2, decode=2, router_flags=flags, kv_connector="tcp") as cluster:
        yield cluster
        network.heal()


@pytest.fixture(scope="module")
def expected(cluster: LocalCluster) -> list[str]:
    return ask_all(cluster, 0)


@pytest.fixture(autouse=True)
def healed(cluster: LocalCluster, network: Network, expected: list[str]) -> Iterator[None]:
    yield
    network.heal()
    cluster.assert_at_rest(15.0)


def ask(cluster: LocalCluster, prompt: str, salt: int) -> str:
    """`salt` keeps an answer from coming out of a cache: each request hands its KV over."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "cache_salt": f"{salt}"}
    response = httpx.post(cluster.url + "/v1/completions", json=body, timeout=DEADLINE + 10.0)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def ask_all(cluster: LocalCluster, salt: int, before: Callable[[int], None] = lambda index: None) -> list[str]:
    def one(item: tuple[int, str]) -> str:
        before(item[0])
        return ask(cluster, item[1], salt)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, enumerate(PROMPTS)))


FAULTS: dict[str, tuple[str, Fault]] = {
    "partition": ("both", Fault(drop=True)),
    "nothing from P to D": ("up", Fault(drop=True)),
    "nothing from D to P": ("down", Fault(drop=True)),
    "connections reset": ("both", Fault(reset=True)),
    "late and jittery": ("both", Fault(delay=0.05, jitter=0.05)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_channel_of_one_prefill_worker(
    cluster: LocalCluster, network: Network, expected: list[str], name: str
) -> None:
    direction, fault = FAULTS[name]

    def hurt(index: int) -> None:
        if index == 4:
            for proxy in network.between("prefill-0"):
                proxy.set(direction, fault)  # pyright: ignore[reportArgumentType]

    started = time.monotonic()
    assert ask_all(cluster, 1 + list(FAULTS).index(name), hurt) == expected
    assert time.monotonic() - started < DEADLINE / 2


def test_payloads_at_one_megabit_a_second(cluster: LocalCluster, network: Network, expected: list[str]) -> None:
    for proxy in network.data():
        proxy.set("up", Fault(rate_bytes_per_s=125_000.0))
    answers = [ask(cluster, prompt, 10) for prompt in PROMPTS[:3]]
    assert answers == expected[:3]


def test_payloads_with_flipped_bits(cluster: LocalCluster, network: Network, expected: list[str]) -> None:
    """Each stream flips a bit in every megabyte: the digests find every one, the requests go on by retry."""
    for proxy in network.data():
        proxy.set("up", Fault(corrupt_every=1 << 20))
    answers = ask_all(cluster, 11)
    assert answers == expected


def test_one_operation_in_twenty_fails(
    cluster: LocalCluster, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E21: 100 % succeed by retry, byte for byte."""
    rng, failed, send = random.Random(21), list[int](), NegotiatedSender.send

    def unreliable(self: NegotiatedSender, *arguments: Any) -> None:
        if rng.random() < 0.05:
            failed.append(1)
            raise TransferFailed("the network interface said no")
        send(self, *arguments)

    monkeypatch.setattr(NegotiatedSender, "send", unreliable)
    for salt in range(20, 26):
        assert ask_all(cluster, salt) == expected
    assert failed, "nothing failed: the test proves nothing"
