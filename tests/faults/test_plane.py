"""The internal plane is closed: who lacks the cluster key gets nothing out of it; who sends nonsense stops nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import msgpack
import psutil
import pytest
import redis

from tandem.common import rpc
from tandem.common.credentials import credentials
from tandem.common.errors import TandemError
from tandem.common.handoff import Ticket, new_transfer_id
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.registry import Registration, Registry
from tandem.engine.config import EngineConfig
from tandem.router.membership import Membership
from tests.impostor import channels_without_the_key, foreign_certificate, impostor
from tests.integration.local_cluster import LocalCluster

ROOT = Path(__file__).parents[2]
ENGINE = EngineConfig(model=str(ROOT / "engine" / "demo_model"), device="cpu", kv_cache_memory_bytes=64 << 20)
KEY, WRONG = b"k" * 32, b"w" * 32
PROMPT = tuple(range(20, 60))
SECRET = b"what-only-a-worker-may-read"


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    with LocalCluster(ENGINE, 1, 1) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: LocalCluster) -> Iterator[LocalCluster]:
    """Behind every test both workers live, serve, and have their blocks back."""
    yield running
    assert all(server.healthy() for server in running.workers.values())
    assert complete(running).status_code == 200
    running.assert_at_rest()


def complete(cluster: LocalCluster, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    body = {"model": "m", "prompt": list(PROMPT), "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(cluster.url + path, json=body, timeout=60)


# ---------------------------------------------------------------------------------------------------- who lacks the key


def test_no_call_of_any_kind_passes_without_the_key(cluster: LocalCluster) -> None:
    for server in cluster.workers.values():
        for name, channel in channels_without_the_key(server.address, cluster.key).items():
            with channel:
                calls = (
                    lambda c: services.PrefillWorkerStub(c).Quiet(pb.QuietRequest(), timeout=5),
                    lambda c: next(services.WorkerStub(c).Watch(pb.WatchRequest(), timeout=5)),
                    lambda c: next(services.HandoffStub(c).Channel(iter(()), timeout=5)),
                    lambda c: next(services.DecodeWorkerStub(c).Decode(pb.DecodeRequest(), timeout=5)),
                )
                for call in calls:
                    with pytest.raises(grpc.RpcError) as caught:
                        call(channel)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, (name, caught.value)
    with rpc.create_sync_channel(next(iter(cluster.workers.values())).address, cluster.key) as channel:
        next(services.WorkerStub(channel).Watch(pb.WatchRequest(), timeout=5))  # what passes with it


@pytest.mark.parametrize("kind", ["silent", "another key", "the same names"])
async def test_an_impostor_is_sent_a_tls_greeting_and_nothing_else(kind: str, tmp_path: Path) -> None:
    tls = {"silent": None, "another key": credentials(WRONG), "the same names": foreign_certificate(credentials(KEY))}
    with impostor(tls[kind], tmp_path) as server:
        async with rpc.create_channel(f"127.0.0.1:{server.port}", KEY) as channel:
            request = pb.DecodeRequest(leg=pb.Leg(request_id=SECRET.decode(), ticket=SECRET))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in services.DecodeWorkerStub(channel).Decode(request, timeout=2):
                    pass
    assert server.connections >= 1
    if kind == "silent":
        assert server.received[:2] == b"\x16\x03" and SECRET not in server.received  # a handshake record, no more
    else:
        assert server.received == b""
        assert "check that TANDEM_CLUSTER_KEY is the same on both" in rpc.to_error(caught.value).message


async def test_a_poisoned_registry_sends_the_router_nowhere(running: LocalCluster, tmp_path: Path) -> None:
    """E62. Unsigned, signed by another key, a real one with its address changed; a real one whose port was taken."""
    client = redis.Redis.from_url(running._redis.url)
    with impostor(None, tmp_path) as never, impostor(credentials(WRONG), tmp_path) as taken:
        evil = Registration("decode-9", "decode", "ee00", f"127.0.0.1:{never.port}", 1, "ready")
        client.set("tandem:dark:worker:ee00", json.dumps(dataclasses.asdict(evil)))
        client.sadd("tandem:dark:workers", "ee00", "ee03")
        other = Registry(running._redis.url, WRONG, "dark")
        await other.publish(dataclasses.replace(evil, incarnation="ee01"), ttl=60)
        registry = Registry(running._redis.url, KEY, "dark")
        dead = dataclasses.replace(evil, incarnation="ee02", address=f"127.0.0.1:{taken.port}")
        await registry.publish(dead, ttl=60)
        real: Any = client.get("tandem:dark:worker:ee02")
        moved = real.replace(str(taken.port).encode(), str(never.port).encode()).replace(b"ee02", b"ee03")
        client.set("tandem:dark:worker:ee03", moved)
        membership = Membership(registry, KEY)
        membership.start()
        async with asyncio.timeout(20):
            while registry.corrupt < 6 or taken.connections < 2:  # two looks at three forgeries
                await asyncio.sleep(0.02)
        assert membership.all_workers() == [] and list(membership.listed) == ["ee02"]
        await membership.stop()
        await other.close()
        assert never.connections == 0 and taken.received == b""
    client.close()


# ---------------------------------------------------------------------------------------------------- who listens where


def tcp_sockets(pid: int) -> Iterator[tuple[str, str, int]]:
    """(state, local address, local port) of every TCP socket of a process, and the remote address if connected."""
    inodes = {os.readlink(link)[8:-1] for link in Path(f"/proc/{pid}/fd").iterdir() if is_socket(link)}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *rest = line.split()
            if rest[5] in inodes:
                yield ("listen" if state == "0A" else "open", *end(local))
                if state != "0A":
                    yield ("remote", *end(remote))


def is_socket(link: Path) -> bool:
    try:
        return os.readlink(link).startswith("socket:[")
    except FileNotFoundError:
        return False  # closed while we looked


def end(text: str) -> tuple[str, int]:
    """`0100007F:1F90` → 127.0.0.1, 8080; the kernel writes addresses as words of this machine's byte order."""
    address, port = text.split(":")
    raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    host = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return host.removeprefix("::ffff:"), int(port, 16)


def test_the_socket_tables_are_read_right() -> None:
    assert end("0100007F:1F90") == ("127.0.0.1", 8080)
    assert end("00000000:0016") == ("0.0.0.0", 22)  # noqa: S104
    assert end("00000000000000000000000001000000:0050") == ("::1", 80)
    assert end("0000000000000000FFFF00000100007F:0050") == ("127.0.0.1", 80)


def test_t3_e55_everything_listens_and_talks_on_loopback_only(cluster: LocalCluster) -> None:
    assert complete(cluster).status_code == 200  # so that the connectors are set up
    pids = (os.getpid(), cluster._router.pid, *(child.pid for child in psutil.Process().children(recursive=True)))
    found = [item for pid in set(pids) if psutil.pid_exists(pid) for item in tcp_sockets(pid)]
    assert {host for _, host, _ in found} <= {"127.0.0.1", "::1"}, found
    listening = {port for state, _, port in found if state == "listen"}
    declared = {int(address.rsplit(":", 1)[1]) for address in (cluster.url, *addresses(cluster))}
    assert declared <= listening


def addresses(cluster: LocalCluster) -> list[str]:
    return [server.address for server in cluster.workers.values()]


# ---------------------------------------------------------------------------------------------------- nothing runs code

NO_PICKLE = """
import sys
def refuse(event, arguments, armed=[]):
    if event == "tandem.arm":
        armed.append(True)
    elif armed and event == "pickle.find_class":
        print("AUDIT: pickle.find_class", arguments, file=sys.stderr, flush=True)
        raise RuntimeError("pickle.find_class")
sys.addaudithook(refuse)
"""
SERVE = """
import sys, httpx, pickle, fractions
sys.path.insert(0, sys.argv[1])
from tests.faults.test_plane import ENGINE, complete
from tests.integration.local_cluster import LocalCluster
sys.audit("tandem.arm")
with LocalCluster(ENGINE, 1, 1) as cluster:
    for fields in ({}, {"n": 2, "temperature": 1.0}, {"logprobs": 2, "stop": ["x"]}):
        answer = complete(cluster, **fields)
        assert answer.status_code == 200, answer.text
    assert complete(cluster, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).status_code == 200
try:
    pickle.loads(pickle.dumps(fractions.Fraction))
except RuntimeError:
    print("the hook works")
"""


@pytest.mark.slow
def test_t2_no_pickle_is_read_while_a_pair_serves(tmp_path: Path) -> None:
    """In a process of its own, because an audit hook stays; the router's process inherits it."""
    (tmp_path / "sitecustomize.py").write_text(
        NO_PICKLE + 'if "tandem.router" in sys.orig_argv: sys.audit("tandem.arm")\n'
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(ROOT)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the hook works" in done.stdout
    audited = re.findall(r"AUDIT: .*", done.stderr)
    assert len(audited) == 1 and "Fraction" in audited[0], audited


# ---------------------------------------------------------------------------------------------------- what clients send

HAND_OFF = ["kv_transfer_params", "disaggregated_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"]
OURS = ["ticket", "decode_address", "transfer_id", "leg", "remote_host", "prefill_incarnation"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_t38_hand_off_fields_of_a_client_reach_nothing(cluster: LocalCluster, path: str, tmp_path: Path) -> None:
    usual = {} if path == "/v1/completions" else {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}
    expected = complete(cluster, path, **usual).json()["choices"]
    with impostor(None, tmp_path) as trap:
        address = f"127.0.0.1:{trap.port}"
        steering = {"remote_host": "127.0.0.1", "remote_port": trap.port, "tp_size": 1 << 30, "decode_address": address}
        for name, value in itertools.product(HAND_OFF, (address, steering)):
            refused = complete(cluster, path, **usual, **{name: value})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == name
        for name, value in itertools.product(OURS, (address, steering)):  # unknown ones are ignored
            assert complete(cluster, path, **usual, **{name: value}).json()["choices"] == expected
    assert trap.connections == 0


def test_t30_nested_bodies_are_the_clients_error(cluster: LocalCluster) -> None:
    for deep in (b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "m", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"):
        assert httpx.post(cluster.url + "/v1/completions", content=deep, timeout=20).status_code == 400


# ----------------------------------------------------------------------------------------------------------- tickets


def ticket(cluster: LocalCluster, **changes: Any) -> Ticket:
    prefill, decode = (cluster.workers[name]._shell.description for name in ("prefill-0", "decode-0"))
    facts: dict[str, Any] = dict(
        request_id="r", attempt=0, transfer_id=new_transfer_id(), prefill=prefill.name, decode=decode.name,
        prefill_incarnation=prefill.incarnation, decode_incarnation=decode.incarnation, timeout=5.0,
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Ticket)]
    return Ticket(**{name: facts[name] if name in facts else getattr(decode, name) for name in names} | changes)


def leg(sealed: bytes, request_id: str = "r", timeout: float = 5.0, prompt: tuple[int, ...] = PROMPT) -> pb.Leg:
    sampling = pb.Sampling(max_tokens=6, temperature=0, top_p=1, repetition_penalty=1)
    return pb.Leg(
        request_id=request_id, prompt_ids=prompt, sampling=sampling, choices=[0], timeout=timeout, ticket=sealed
    )


class Legs:
    """The router's part of a request, played by somebody who has the key."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._addresses = addresses(cluster)
        self._channels = [rpc.create_sync_channel(address, cluster.key) for address in self._addresses]

    def prefill(self, leg: pb.Leg, decode_address: str | None = None) -> list[int]:
        request = pb.PrefillRequest(leg=leg, decode_address=decode_address or self._addresses[1])
        return self._tokens(services.PrefillWorkerStub(self._channels[0]).Prefill(request, timeout=30))

    def decode(self, leg: pb.Leg) -> list[int]:
        return self._tokens(services.DecodeWorkerStub(self._channels[1]).Decode(pb.DecodeRequest(leg=leg), timeout=30))

    def both(self, leg: pb.Leg) -> list[int]:
        with ThreadPoolExecutor(2) as executor:
            ends = [executor.submit(call, leg) for call in (self.prefill, self.decode)]
            return [token for end in ends for token in end.result()]

    def _tokens(self, call: Any) -> list[int]:
        """Raises what the worker said."""
        try:
            return [token.token_id for update in call for token in update.tokens]
        except grpc.RpcError as exc:
            raise rpc.to_error(exc) from exc

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


@pytest.fixture
def legs(cluster: LocalCluster) -> Iterator[Legs]:
    made = Legs(cluster)
    yield made
    made.close()


def test_t14_ids_that_begin_alike_are_different_transfers(cluster: LocalCluster, legs: Legs) -> None:
    """`r1` and `r11`, whose transfer ids also begin alike, at the same time, with different prompts."""
    prompts = {f"r{'1' * (1 + i)}": tuple(range(10 * i + 5, 10 * i + 45)) for i in range(4)}
    alone = {name: legs.both(leg(ticket(cluster).seal(cluster.key), name, prompt=ids)) for name, ids in prompts.items()}

    def run(name: str) -> list[int]:
        sealed = ticket(cluster, request_id=name, transfer_id=name.encode().ljust(16, b"\0")).seal(cluster.key)
        return legs.both(leg(sealed, name, prompt=prompts[name]))

    with ThreadPoolExecutor(4) as executor:
        assert dict(zip(prompts, executor.map(run, prompts), strict=True)) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > 1


def test_t38_a_forged_ticket_opens_no_socket(cluster: LocalCluster, legs: Legs, tmp_path: Path) -> None:
    with impostor(None, tmp_path) as trap:
        for forged in (
            ticket(cluster).seal(WRONG),
            ticket(cluster, prefill_incarnation="another").seal(cluster.key),
            ticket(cluster).seal(cluster.key)[:-1],
            b"",
        ):
            with pytest.raises(TandemError):
                legs.prefill(leg(forged, timeout=2.0), f"127.0.0.1:{trap.port}")
            if forged:
                with pytest.raises(TandemError):
                    legs.decode(leg(forged, timeout=2.0))
    assert trap.connections == 0


ODD = [None, True, -1, 2**63 - 1, 2**64 - 1, 0, 1e308, float("inf"), float("nan"), -1.0, "", "x" * 300, b"", b"x" * 300]


def mutants(ticket: Ticket) -> Iterator[tuple[str, bytes]]:
    """Each field left out, doubled, and replaced by every odd value; then the array's own header. Not sealed."""
    values = [getattr(ticket, field.name) for field in dataclasses.fields(Ticket)]
    for index, field in enumerate(dataclasses.fields(Ticket)):
        before, after = values[:index], values[index + 1 :]
        yield f"{field.name} left out", pack([*before, *after])
        yield f"{field.name} doubled", pack([*before, values[index], values[index], *after])
        for odd in (*ODD, [values[index]], [[]]):
            yield f"{field.name} = {str(odd)[:20]}", pack([*before, odd, *after])
    body = pack(values)
    for head in (b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1"):
        yield f"header {head.hex()}", head + body[1:]


def pack(values: list[Any]) -> bytes:
    return msgpack.packb(values) or b""


def test_e62_no_ticket_stops_a_worker(cluster: LocalCluster, legs: Legs) -> None:
    """Refused, or a leg that ends like any other; sealed again it is what only our own bug could send."""

    def outcome(call: Any, sealed: bytes) -> str:
        try:
            call(leg(sealed, timeout=1.0))
        except TandemError as exc:
            return type(exc).__name__
        return "ended"

    mac = ticket(cluster).seal(cluster.key)[-32:]
    attempts: list[tuple[str, Any, bytes]] = []
    for index in range(len(list(mutants(ticket(cluster))))):
        # A transfer id of its own, so that none is refused only because another one was used before.
        name, body = list(mutants(ticket(cluster)))[index]
        sealed = body + hmac.digest(cluster.key, body, "sha256")
        for call in (legs.prefill, legs.decode):
            attempts += [(name, call, body + mac), (f"{name}, sealed", call, sealed)]
    with ThreadPoolExecutor(64) as executor:
        outcomes = list(executor.map(lambda attempt: outcome(attempt[1], attempt[2]), attempts))
    assert len(outcomes) > 400
    for (name, _, _), how in zip(attempts, outcomes, strict=True):
        if name.endswith("sealed"):
            assert how in ("TicketRefused", "InvalidRequest", "TransferFailed", "DeadlineExceeded", "ended"), (
                name,
                how,
            )
        else:
            assert how == "TicketRefused", (name, how)
