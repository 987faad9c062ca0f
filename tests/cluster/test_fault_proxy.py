"""Each fault of the proxy, seen with plain sockets from both ends, and gone once healed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tandem.cluster.fault_proxy import Fault, FaultProxy, parse_fault
from tandem.common.errors import ConfigError

WAIT = 5.0  # seconds that something good may take
QUIET = 0.1  # seconds of silence that prove a black hole
PAYLOAD = random.Random(0).randbytes(200_000)


@dataclass
class Line:
    """One connection through the proxy."""

    proxy: FaultProxy
    listener: socket.socket
    client: socket.socket
    target: socket.socket

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = connect(self.proxy)
        target, _ = self.listener.accept()
        target.settimeout(WAIT)
        return client, target


@pytest.fixture
def line() -> Iterator[Line]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT)
        with (
            FaultProxy("127.0.0.1", listener.getsockname()[1]) as proxy,
            connect(proxy) as client,
        ):
            target, _ = listener.accept()
            target.settimeout(WAIT)
            with target:
                yield Line(proxy, listener, client, target)


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), WAIT)


def receive(source: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer if the stream ends before."""
    data = bytearray()
    while len(data) < count and (piece := source.recv(count - len(data))):
        data += piece
    return bytes(data)


def passes(sender: socket.socket, receiver: socket.socket, data: bytes) -> bytes:
    """What arrives of `data`."""
    sender.sendall(data)
    return receive(receiver, len(data))


def silent(receiver: socket.socket) -> bool:
    receiver.settimeout(QUIET)
    try:
        return not receiver.recv(1)
    except TimeoutError:
        return True
    finally:
        receiver.settimeout(WAIT)


def differing(sent: bytes, arrived: bytes) -> list[int]:
    assert len(sent) == len(arrived)
    return [index for index, (one, other) in enumerate(zip(sent, arrived, strict=True)) if one != other]


def test_healthy_is_invisible(line: Line) -> None:
    assert passes(line.client, line.target, PAYLOAD) == PAYLOAD
    assert passes(line.target, line.client, PAYLOAD) == PAYLOAD
    line.client.shutdown(socket.SHUT_WR)
    assert line.target.recv(1) == b""
    assert passes(line.target, line.client, PAYLOAD) == PAYLOAD, "one end of stream does not end the other direction"
    line.target.close()
    assert line.client.recv(1) == b""


def test_delay_is_of_one_direction_and_does_not_narrow_it(line: Line) -> None:
    line.proxy.set("up", Fault(delay=0.4))
    started = time.monotonic()
    assert passes(line.target, line.client, b"x") == b"x"
    assert time.monotonic() - started < 0.4
    started = time.monotonic()
    assert passes(line.client, line.target, PAYLOAD * 10) == PAYLOAD * 10
    assert 0.4 <= time.monotonic() - started < 4.0, "2 MB are 32 pieces; one after another they would take 13 s"


def test_jitter_keeps_the_order(line: Line) -> None:
    line.proxy.set("up", Fault(jitter=0.02))
    for index in range(0, len(PAYLOAD), 10_000):
        line.client.sendall(PAYLOAD[index : index + 10_000])
    assert receive(line.target, len(PAYLOAD)) == PAYLOAD


def test_rate(line: Line) -> None:
    line.proxy.set("down", Fault(rate_bytes_per_s=400_000))
    started = time.monotonic()
    assert passes(line.target, line.client, PAYLOAD) == PAYLOAD
    assert time.monotonic() - started >= 0.4, "200 kB at 400 kB/s"


def test_black_hole_is_one_way_and_ends(line: Line) -> None:
    line.proxy.set("up", Fault(drop=True))
    line.client.sendall(PAYLOAD)
    assert silent(line.target)
    assert passes(line.target, line.client, b"still here") == b"still here"
    line.proxy.heal()
    assert receive(line.target, len(PAYLOAD)) == PAYLOAD


def test_black_hole_swallows_the_end_too(line: Line) -> None:
    """As in a real partition: nobody learns that the peer is gone."""
    line.proxy.set("both", Fault(drop=True))
    line.client.close()
    assert silent(line.target)
    assert not line.target.send(b"") and line.target.send(b"x") == 1
    line.proxy.heal()
    assert line.target.recv(1) == b""


def test_new_connections_fall_into_the_black_hole(line: Line) -> None:
    line.proxy.set("up", Fault(drop=True))
    client, target = line.connect()
    with client, target:
        client.sendall(b"x")
        assert silent(target)


@pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 199_999])
def test_one_flipped_bit(line: Line, place: int) -> None:
    line.proxy.set("up", Fault(corrupt_at=place))
    arrived = passes(line.client, line.target, PAYLOAD)
    assert differing(PAYLOAD, arrived) == [place]
    assert (PAYLOAD[place] ^ arrived[place]).bit_count() == 1
    assert passes(line.client, line.target, PAYLOAD) == PAYLOAD, "one byte, once"


def test_bytes_count_from_when_the_fault_was_set(line: Line) -> None:
    assert passes(line.client, line.target, PAYLOAD) == PAYLOAD
    line.proxy.set("up", Fault(corrupt_at=3))
    assert differing(b"abcdef", passes(line.client, line.target, b"abcdef")) == [3]


def test_every_nth_byte(line: Line) -> None:
    line.proxy.set("up", Fault(corrupt_every=64))
    line.client.sendall(PAYLOAD[:10])
    line.client.sendall(PAYLOAD[10:])
    assert differing(PAYLOAD, receive(line.target, len(PAYLOAD))) == list(range(63, len(PAYLOAD), 64))


def test_same_seed_flips_the_same_bits() -> None:
    def flipped(seed: int) -> bytes:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            FaultProxy("127.0.0.1", listener.getsockname()[1], seed=seed) as proxy,
            connect(proxy) as client,
        ):
            proxy.set("up", Fault(corrupt_every=2))
            target, _ = listener.accept()
            with target:
                return passes(client, target, bytes(64))

    assert flipped(1) == flipped(1) != flipped(2)


@pytest.mark.parametrize("place", [0, 1, 65_536, 100_001])
def test_truncation(line: Line, place: int) -> None:
    line.proxy.set("up", Fault(truncate_at=place))
    line.client.sendall(PAYLOAD)
    assert receive(line.target, len(PAYLOAD)) == PAYLOAD[:place]
    assert ends(line.client)


def ends(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_reset_hits_open_and_new_connections(line: Line) -> None:
    line.proxy.set("both", Fault(reset=True))
    for end in (line.client, line.target):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with pytest.raises(ConnectionResetError), connect(line.proxy) as client:
        client.recv(1)
    line.proxy.heal()
    client, target = line.connect()
    with client, target:
        assert passes(client, target, PAYLOAD) == PAYLOAD


def test_half_close(line: Line) -> None:
    line.proxy.set("up", Fault(half_close=True))
    assert line.target.recv(1) == b""
    line.client.sendall(b"into nothing")
    assert passes(line.target, line.client, PAYLOAD) == PAYLOAD
    client, target = line.connect()
    with client, target:
        assert target.recv(1) == b"", "connections that come suffer it as well"


def test_nobody_at_the_target_looks_like_a_reset(line: Line) -> None:
    line.listener.close()
    with pytest.raises(ConnectionResetError), connect(line.proxy) as client:
        client.recv(1)


def test_a_taken_port_and_negative_numbers_are_an_operators_error(line: Line) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        FaultProxy("127.0.0.1", 1, listen_port=line.proxy.port)
    for wrong in ("delay=-1", "rate_bytes_per_s=-1", "corrupt_every=-1", "truncate_at=-1"):
        with pytest.raises(ConfigError, match="negative"):
            parse_fault(f"up {wrong}")


class StoppedAtOnce(FaultProxy):
    """Each connection is cancelled, as `close` does, `turns` turns of the loop behind its truncation."""

    turns = 0

    async def _pass(self, lane: Any, piece: bytes) -> bytes:
        try:
            return await super()._pass(lane, piece)
        except ConnectionAbortedError:
            self.stopping = asyncio.create_task(self._stop())
            raise

    async def _stop(self) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        for task in self._serving:
            task.cancel()


@pytest.mark.parametrize("turns", range(6))
def test_stopped_while_a_connection_ends_it_leaves_nothing_open(line: Line, turns: int) -> None:
    """What stayed open would be found when it is collected, as a warning and so an error."""
    with contextlib.ExitStack() as target_end:
        proxy = StoppedAtOnce("127.0.0.1", line.listener.getsockname()[1])
        with proxy:
            proxy.turns = turns
            proxy.set("up", Fault(truncate_at=1))
            with connect(proxy) as client:
                target_end.enter_context(line.listener.accept()[0])
                client.sendall(b"a")
                assert receive(client, 1) == b""
        del proxy
        gc.collect()


def test_lines_become_faults() -> None:
    assert parse_fault("up delay=0.2 corrupt_at=7 half_close") == (
        "up",
        Fault(delay=0.2, corrupt_at=7, half_close=True),
    )
    assert parse_fault("both drop") == ("both", Fault(drop=True))
    assert parse_fault("heal") == ("both", Fault())


@pytest.mark.parametrize(
    "text", ["", "left drop", "up drop=1", "up delay", "up delay=x", "up corrupt_at=1.5", "up evil=1"]
)
def test_wrong_lines_are_an_operators_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_fault(text)


def test_the_command(line: Line) -> None:
    port = line.listener.getsockname()[1]
    command = [sys.executable, "-m", "tandem", "fault-proxy", "--to", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert process.stdin and process.stdout
    with process, process.stdin as orders, process.stdout as said:
        where = said.readline().split()[0]
        with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2])), WAIT) as client:
            target, _ = line.listener.accept()
            target.settimeout(WAIT)
            with target:
                orders.write("up corrupt_at=0\n")
                assert "corrupt_at=0" in said.readline()
                assert differing(b"abc", passes(client, target, b"abc")) == [0]
                orders.write("sideways\n")
                assert "none of up, down" in said.readline()
        orders.close()
        assert process.wait(10) == 0
