"""Bad networks between P and D, and between the router and a worker: requests succeed by going another way, nothing
waits past its deadline (E16 to E21).

Real workers in threads, two of each role; every connection goes through a proxy of its own: the gRPC channels between a
P and a D, the streams of the `tcp` connector, and the router's calls. The oracle is the same cluster without the fault.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import httpx
import pytest

from tandem.cluster.fault_proxy import Direction, Fault
from tandem.common import service as common_service
from tandem.common.errors import TransferFailed
from tandem.common.registry import Registration
from tandem.decode_worker import service as decode_service
from tandem.engine.config import EngineConfig
from tandem.kv_transfer import land, tcp
from tandem.kv_transfer.negotiation import NegotiatedSender
from tandem.prefill_worker import service
from tests.faults.clients import PLAIN
from tests.faults.faulty import BadLink
from tests.faults.local import DEMO_MODEL, pace, worker_of
from tests.faults.scale import SCALE
from tests.integration.local_cluster import LocalCluster

DEADLINE = 60.0  # seconds; every request must end long before
FRAME = 3.0  # seconds a frame may take here; shipped 30
HEALED = 2.0  # seconds that a request may take when the network is well again
NOTICED = 5.0  # seconds in which a peer that says nothing is given up: keep-alive of gRPC, silence of a link
STREAMS = 4
PROMPTS = [f"Story number {index}. " + "Once upon a time there was a worker. " * (index % 7 * 4) for index in range(16)]

Kind = Literal["channel", "data", "router"]


class Network:
    """The proxies, by what goes through them: the channel or the payloads of a P, or the router's calls to a worker."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._stack, self._lock = ExitStack(), threading.RLock()
        self._links: dict[tuple[Kind, str, str], BadLink] = {}  # (kind, worker, address behind it)
        self._behind: dict[str, str] = {}  # address of a proxy → of what it stands for
        self._faults: dict[tuple[Kind, str], tuple[Direction | Literal["both"], Fault]] = {}  # also of links to come
        self._connecting, self._mailboxes = threading.local(), list[tuple[Any, str]]()  # of which P they are
        self._between_p_and_d(patch)
        patch.setattr(common_service, "Registration", self._registration)
        for module in (service, decode_service):
            patch.setattr(module, "TRANSFER_TIMEOUT", FRAME)

    def _registration(self, name: str, role: Any, incarnation: str, address: str, *rest: Any) -> Registration:
        return Registration(name, role, incarnation, self.through("router", name, address), *rest)

    def _between_p_and_d(self, patch: pytest.MonkeyPatch) -> None:
        connect, sender, take = service._Connector.__call__, service.NegotiatedSender, tcp._Address.take.__func__

        def connecting(connector: Any, address: str, *rest: Any) -> Any:
            self._connecting.name = name = connector._config.name
            return connect(connector, self.through("channel", name, self._behind[address]), *rest)

        def sending(context: Any, allowed: Any) -> NegotiatedSender:
            self._mailboxes.append((context.mailbox, self._connecting.name))
            return sender(context, allowed)

        def taken(cls: Any, mailbox: Any, deadline: float) -> Any:
            found = take(cls, mailbox, deadline)
            name = next(name for other, name in self._mailboxes if other is mailbox)
            through = self.through("data", name, f"{found.host}:{found.port}")
            return replace(found, port=int(through.rsplit(":", 1)[1]))

        patch.setattr(service._Connector, "__call__", connecting)
        patch.setattr(service, "NegotiatedSender", sending)
        patch.setattr(tcp._Address, "take", classmethod(taken))

    def through(self, kind: Kind, name: str, address: str) -> str:
        with self._lock:
            if (kind, name, address) not in self._links:
                host, port = address.rsplit(":", 1)
                link = self._links[kind, name, address] = BadLink(host, int(port))
                self._stack.callback(link.close)
                self._behind[f"127.0.0.1:{link.port}"] = address
                if (kind, name) in self._faults:
                    link.set(*self._faults[kind, name])
            return f"127.0.0.1:{self._links[kind, name, address].port}"

    def links(self, kind: Kind, name: str) -> list[BadLink]:
        with self._lock:
            return [link for (of, who, _), link in self._links.items() if (of, who) == (kind, name)]

    def hurt(self, kind: Kind, name: str, direction: Direction | Literal["both"], fault: Fault) -> None:
        """These links and those that are made until `heal`."""
        with self._lock:
            self._faults[kind, name] = direction, fault
            links = self.links(kind, name)
        assert links, f"no {kind} of {name} goes through a proxy"
        for link in links:
            link.set(direction, fault)

    def lose(self, kind: Kind, name: str, loss: float) -> None:
        for link in self.links(kind, name):
            link.loss = loss
            link.heal()  # whatever is set, the filters are too

    def struck(self) -> int:
        with self._lock:
            return sum(link.struck for link in self._links.values())

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()
            links = list(self._links.values())
        for link in links:
            link.loss = 0.0
            link.heal()

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
    cluster.wait_ready()
    cluster.assert_at_rest(15.0)


def ask(cluster: LocalCluster, prompt: str, salt: int, max_tokens: int = 12) -> str:
    """`salt` keeps an answer from coming out of a cache: each request hands its KV over."""
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "cache_salt": f"{salt}"}
    response = httpx.post(cluster.url + "/v1/completions", json=body, timeout=DEADLINE + 10.0)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def ask_all(
    cluster: LocalCluster, salt: int, before: Callable[[int], None] = lambda index: None, max_tokens: int = 12
) -> list[str]:
    def one(item: tuple[int, str]) -> str:
        before(item[0])
        return ask(cluster, item[1], salt, max_tokens)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, enumerate(PROMPTS)))


def retries(cluster: LocalCluster) -> float:
    lines = httpx.get(cluster.url + "/metrics", verify=PLAIN).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem_router_retries_total"))


# ----------------------------------------------------------------------------------------------- between P and D


FAULTS: dict[str, tuple[tuple[Kind, ...], Direction | Literal["both"], Fault]] = {
    "partition": (("channel", "data"), "both", Fault(drop=True)),
    "no payloads": (("data",), "both", Fault(drop=True)),
    "nothing from P to D": (("channel",), "up", Fault(drop=True)),
    "nothing from D to P": (("channel",), "down", Fault(drop=True)),
    "connections reset": (("channel", "data"), "both", Fault(reset=True)),
    "late and jittery": (("channel", "data"), "both", Fault(delay=0.05, jitter=0.05)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_network_of_one_prefill_worker(
    cluster: LocalCluster, network: Network, expected: list[str], name: str
) -> None:
    """And when it is well again, the next request is answered at once."""
    kinds, direction, fault = FAULTS[name]

    def hurt(index: int) -> None:
        if index == 4:
            for kind in kinds:
                network.hurt(kind, "prefill-0", direction, fault)

    struck, retried, started = network.struck(), retries(cluster), time.monotonic()
    assert ask_all(cluster, 1 + list(FAULTS).index(name), hurt) == expected
    seconds = time.monotonic() - started
    assert seconds < DEADLINE / 2
    assert network.struck() > struck, "the fault met no traffic"
    assert fault.delay or retries(cluster) > retried, "no attempt failed: nothing was cut off"
    network.heal()
    healed = time.monotonic()
    assert ask(cluster, PROMPTS[0], 100 + list(FAULTS).index(name)) == expected[0]
    healed = time.monotonic() - healed
    print(f"{name}: 16 requests in {seconds:.1f} s, {retries(cluster) - retried:.0f} retries; healed: {healed:.2f} s")
    assert healed < HEALED


def test_payloads_at_one_megabit_a_second(cluster: LocalCluster, network: Network, expected: list[str]) -> None:
    """E19. The streams that decode meanwhile hardly notice."""
    with streaming(cluster, 200) as usual:
        asked(cluster, expected, 201)
    struck = network.struck()
    network.hurt("data", "prefill-0", "up", Fault(rate_bytes_per_s=125_000.0))
    with streaming(cluster, 202) as meanwhile:
        seconds = asked(cluster, expected, 203)
    assert network.struck() > struck, "nothing went over the narrow link"
    before, after = (statistics.quantiles(gaps, n=20)[18] for gaps in (usual, meanwhile))
    print(
        f"2 requests over 1 Mbit/s: {seconds:.1f} s; others' p95 between tokens {after:.4f} s, usually {before:.4f} s"
    )
    assert after < 3 * before + 0.05


def asked(cluster: LocalCluster, expected: list[str], salt: int) -> float:
    """Seconds for two requests, one after the other: among idle workers the first one gets them."""
    started = time.monotonic()
    for index in (2, 3):
        assert ask(cluster, PROMPTS[index], salt) == expected[index]
    return time.monotonic() - started


@contextmanager
def streaming(cluster: LocalCluster, salt: int) -> Generator[list[float]]:
    """Two clients that stream all the while; the seconds between their tokens on D, when it is over."""
    gaps, over = list[float](), threading.Event()

    def client(number: int) -> None:
        while not over.is_set():
            stream = Stream(cluster, PROMPTS[0], f"{salt} {number} {len(gaps)}", 40)
            stream.run()
            gaps.extend(b - a for a, b in zip(stream.at[2:], stream.at[3:], strict=False))

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client, number) for number in range(2)]
        try:
            yield gaps
        finally:
            over.set()
    for client_ended in running:
        client_ended.result()


class Stream:
    """One streamed answer: its text and when each part came."""

    def __init__(self, cluster: LocalCluster, prompt: str, salt: str, max_tokens: int) -> None:
        self.text, self.at, self.ends = "", list[float](), 0
        self._url = cluster.url + "/v1/completions"
        self._body = {
            "model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "cache_salt": salt,
            "stream": True, "ignore_eos": True,
        }  # fmt: skip

    def run(self) -> str:
        with httpx.stream("POST", self._url, json=self._body, timeout=DEADLINE + 10.0) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                self.ends += line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    self.text += event["choices"][0]["text"]
                    self.at.append(time.monotonic())
        assert self.ends == 1
        return self.text


def test_payloads_with_flipped_bits(
    cluster: LocalCluster, network: Network, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stream of one P flips a bit now and then: the digests find each one, the requests go on by retry."""
    found, check_payload = list[str](), land.check_payload

    def check(*arguments: Any) -> None:
        try:
            check_payload(*arguments)
        except TransferFailed as exc:
            found.append(exc.message)
            raise

    monkeypatch.setattr(land, "check_payload", check)
    retried = retries(cluster)
    network.hurt("data", "prefill-0", "up", Fault(corrupt_every=FLIP_EVERY))
    assert ask_all(cluster, 11) == expected
    print(f"{len(found)} payloads with flipped bits, {retries(cluster) - retried:.0f} retries")
    assert found, "no bit was flipped: the test proves nothing"
    assert all("digest mismatch" in reason for reason in found)
    assert retries(cluster) > retried


FLIP_EVERY = 1 << 14  # bytes


def test_one_operation_in_twenty_fails(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """E21: 100 % succeed by retry, byte for byte. Short answers: what may fail is before their second token."""
    rng, failed, send = random.Random(21), list[int](), NegotiatedSender.send

    def unreliable(self: NegotiatedSender, *arguments: Any) -> None:
        if rng.random() < 0.05:
            failed.append(1)
            raise TransferFailed("the network interface said no")
        send(self, *arguments)

    short = ask_all(cluster, 19, max_tokens=3)
    monkeypatch.setattr(NegotiatedSender, "send", unreliable)
    for salt in range(20, 20 + 6 * SCALE):
        assert ask_all(cluster, salt, max_tokens=3) == short
    print(f"{96 * SCALE} requests answered, {len(failed)} operations failed")
    assert failed, "nothing failed: the test proves nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="packets are lost by a filter of Linux")
def test_e20_lost_packets(cluster: LocalCluster, network: Network) -> None:
    """Of one P's links, in both directions and before TCP sees them: requests are slower, and nothing else."""
    short, lost = ask_all(cluster, 300, max_tokens=3), 0
    for loss in (0.01, 0.05, 0.2):
        for kind in ("channel", "data"):
            network.lose(kind, "prefill-0", loss)
        before, started = dropped(network), time.monotonic()
        for salt in range(SCALE):
            assert ask_all(cluster, 301 + salt + int(1e5 * loss), max_tokens=3) == short
        rate, lost = SCALE * len(PROMPTS) / (time.monotonic() - started), dropped(network) - before
        print(f"{loss:.0%} of the packets lost ({lost}): {rate:.1f} requests a second")
    assert lost > 10, "hardly a packet was lost: the test proves nothing"


def dropped(network: Network) -> int:
    return sum(link.dropped for kind in ("channel", "data") for link in network.links(kind, "prefill-0"))


# ------------------------------------------------------------------------------------- between the router and a D


def test_e18_the_router_loses_a_decode_worker_in_the_middle(cluster: LocalCluster, network: Network) -> None:
    """Its streams go on from another one; what it still computes is told to nobody, and ends by itself."""
    usual = Stream(cluster, PROMPTS[1], "usual", 100).run()
    victim, struck = cluster.workers["decode-0"], network.struck()
    streams = [Stream(cluster, PROMPTS[1], f"e18 {number}", 100) for number in range(STREAMS)]
    pace(victim, 0.1)  # it would need 10 s
    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_for(lambda: all(len(stream.at) > 4 for stream in streams), 20.0, "not all streams run")
        network.hurt("router", "decode-0", "both", Fault(drop=True))
        cut, served = time.monotonic(), victim.pool.counts().owned
        assert served, "the cut-off worker serves nobody"
        wait_for(lambda: victim.pool.counts().at_rest, NOTICED + 2.0, "the cut-off worker keeps blocks")
        freed = time.monotonic() - cut
        assert [future.result() for future in running] == [usual] * STREAMS
    del worker_of(victim)._engine.forward
    assert network.struck() > struck
    longest = max(b - a for stream in streams for a, b in zip(stream.at, stream.at[1:], strict=False))
    print(f"{served} blocks of the cut-off D free after {freed:.1f} s; longest gap in a stream {longest:.1f} s")
    assert longest < NOTICED + 2.0


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.01)  # a poll of other threads, with a deadline
