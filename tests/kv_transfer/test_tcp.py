"""What is special to the tcp connector: who may connect, how a frame is dealt out to the streams, what ends them."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import tcp
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload

pytestmark = pytest.mark.timeout(60)
WAIT = 30.0  # seconds; only a failing test waits this long
AT_ONCE = 1.0  # seconds within which a blocked end must wake
LAYOUT = KVLayout("test", "float32", 16, 8, 8, 128)  # 1 MiB a block, 128 KiB a layer
CPU = torch.device("cpu")


def frame(payload: Payload, first_layer: int = 0) -> Frame:
    layers = payload.row_bytes // LAYOUT.layer_bytes
    digests = (b"d" * 16,) * len(payload)
    return Frame(bytes(16), 1, 0, len(payload), first_layer, layers, payload.nbytes, digests)


def blocks(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, LAYOUT.block_bytes), dtype=torch.uint8, generator=generator)


def digest(rows: Tensor) -> bytes:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).digest()


class Call:
    """One call on a thread of its own."""

    def __init__(self, function: Callable, *args) -> None:
        self.error = ""
        self.result = None
        self._thread = threading.Thread(target=self._run, args=(function, *args))
        self._thread.start()

    def _run(self, function: Callable, *args) -> None:
        try:
            self.result = function(*args)
        except TransferFailed as exc:
            self.error = exc.message

    def join(self, limit: float = WAIT) -> Call:
        self._thread.join(limit)
        assert not self._thread.is_alive(), f"still busy after {limit} s"
        return self


@dataclass
class Ends:
    sender: tcp.TcpSender
    receiver: tcp.TcpReceiver
    contexts: tuple[Context, Context]

    def open(self) -> Ends:
        opening = Call(self.sender.open, WAIT)
        self.receiver.open(WAIT)
        assert not opening.join().error
        return self

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.contexts[0].channel.close()

    def move(self, payload: Payload, first_layer: int = 0) -> Payload:
        header = frame(payload, first_layer)
        sending = Call(self.sender.send, header, payload, (), WAIT)
        landed = self.receiver.receive(header, (), WAIT)
        assert not sending.join().error
        return landed


def make_ends() -> Ends:
    left, right = channel_pair()
    contexts = (Context(left, LAYOUT, CPU), Context(right, LAYOUT, CPU))
    for channel, context in zip((left, right), contexts, strict=True):
        channel.listen(context.mailbox.deliver, lambda reason: None)  # pyright: ignore[reportArgumentType]
    return Ends(tcp.TcpSender(contexts[0]), tcp.TcpReceiver(contexts[1]), contexts)


@pytest.fixture
def ends() -> Iterator[Ends]:
    pair = make_ends()
    yield pair
    pair.close()


def address_of(context: Context) -> tuple[str, int]:
    host, port = context.mailbox.take("tcp/address", time.monotonic() + WAIT).decode().split()
    return host, int(port)


# -------------------------------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("piece_bytes", [1 << 20, 300_001, 4096])
@pytest.mark.parametrize("layers", [(0, 8), (2, 3), (7, 1)])
def test_rows_in_any_order_arrive_whole_and_in_part(ends, monkeypatch, piece_bytes, layers):
    monkeypatch.setattr(tcp, "PIECE_BYTES", piece_bytes)
    ends.open()
    memory, (first, count) = blocks(8), layers
    start, size = first * LAYOUT.layer_bytes, count * LAYOUT.layer_bytes
    for rows in ((3,), (4, 5, 6), (7, 0, 3, 2)):
        landed = ends.move(Payload.layers(memory, rows, start, size), first)
        expected = memory[list(rows), start : start + size]
        assert (len(landed), landed.row_bytes) == (len(rows), size)
        assert digest(landed.tensor()) == digest(expected)


@pytest.mark.parametrize("row_bytes", [1, 24, tcp.GATHER_BELOW - 1])
def test_small_rows_arrive(ends, row_bytes):
    ends.open()
    memory = blocks(1).view(-1)[: 8 * row_bytes * 2].view(8, 2 * row_bytes)
    payload = Payload.layers(memory, (6, 1, 2), row_bytes, row_bytes)
    header = Frame(bytes(16), 1, 0, 3, 0, 1, payload.nbytes, (b"d" * 16,) * 3)
    ends.sender.send(header, payload, (), WAIT)
    assert torch.equal(ends.receiver.receive(header, (), WAIT).tensor(), memory[[6, 1, 2], row_bytes:])


def test_many_rows_are_more_buffers_than_one_system_call_takes(ends, monkeypatch):
    monkeypatch.setattr(tcp, "GATHER_BELOW", 0)
    ends.open()
    memory = blocks(1).view(4096, 256)
    rows = list(range(4095, -1, -1))
    header = Frame(bytes(16), 1, 0, 4096, 0, 1, memory.nbytes, (b"d" * 16,) * 4096)
    sending = Call(ends.sender.send, header, Payload.layers(memory, rows, 0, 256), (), WAIT)
    assert torch.equal(ends.receiver.receive(header, (), WAIT).tensor(), memory.flip(0))
    assert not sending.join().error


def test_a_narrow_path_takes_buffers_in_parts(ends, monkeypatch):
    monkeypatch.setattr(tcp, "PIECE_BYTES", 300_001)
    ends.open()
    for sock in (*ends.sender._streams, *ends.receiver._streams):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 64 << 10)
    payload = Payload.layers(blocks(3), (2, 0), 0, LAYOUT.block_bytes)
    assert digest(ends.move(payload).tensor()) == digest(payload.tensor())


def test_what_was_sent_may_be_overwritten_at_once(ends):
    """P's blocks are released when `send` returns, before D has read a byte."""
    ends.open()
    memory = blocks(1)[:, : LAYOUT.layer_bytes].contiguous()
    expected, payload = digest(memory), Payload.whole(memory)
    ends.sender.send(frame(payload), payload, (), WAIT)
    memory.zero_()
    assert digest(ends.receiver.receive(frame(payload), (), WAIT).tensor()) == expected


def test_every_stream_carries_its_share(ends):
    ends.open()
    seen: list[int] = []
    take = tcp._take

    def counting(sock, number, pieces):
        seen.append(sum(len(part) for _, parts in pieces for part in parts))
        return take(sock, number, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tcp, "_take", counting)
        ends.move(Payload.whole(blocks(8)))
    assert seen == [2 << 20] * tcp.STREAMS


# ----------------------------------------------------------------------------------------------------------- strangers


def test_strangers_get_nothing_and_hold_nobody_up(ends):
    opening = Call(ends.receiver.open, WAIT)
    address = address_of(ends.contexts[0])
    silent, loud, gone = (socket.create_connection(address, WAIT) for _ in range(3))
    loud.sendall(os.urandom(4096))
    gone.close()
    started = time.monotonic()
    ends.sender.open(WAIT)
    assert not opening.join().error
    assert time.monotonic() - started < tcp.HELLO_SECONDS, "the peer waited for a stranger"
    payload = Payload.whole(blocks(4))
    assert digest(ends.move(payload).tensor()) == digest(payload.tensor())
    for stranger in (silent, loud):
        with stranger:
            assert len(read_all(stranger)) <= 16, "a stranger got more than the nonce"


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


def test_more_silent_strangers_than_may_wait_are_hung_up_on_in_turn(ends, monkeypatch):
    monkeypatch.setattr(tcp, "HELLO_SECONDS", 0.5)
    monkeypatch.setattr(tcp, "MAX_GUESTS", 4)
    opening = Call(ends.receiver.open, WAIT)
    address = address_of(ends.contexts[0])
    crowd = [socket.create_connection(address, WAIT) for _ in range(10)]
    try:
        ends.sender.open(WAIT)
        assert not opening.join().error
    finally:
        for stranger in crowd:
            stranger.close()


def test_a_recorded_hello_is_worth_nothing(ends):
    """Nonces are fresh: what one connection proved cannot be said on another."""
    Call(ends.receiver.open, WAIT)
    host, port = address_of(ends.contexts[0])
    token = ends.contexts[0].mailbox.take("tcp/token", time.monotonic() + WAIT)
    mine = os.urandom(16)
    with socket.create_connection((host, port), WAIT) as first, socket.create_connection((host, port), WAIT) as second:
        nonce = first.recv(16, socket.MSG_WAITALL)
        hello = bytes([0]) + mine + tcp._Address(host, port, token).proof(b"P", nonce + mine, 0)
        assert len(second.recv(16, socket.MSG_WAITALL)) == 16
        second.sendall(hello)
        assert read_all(second) == b""
        first.sendall(hello)
        assert len(first.recv(32, socket.MSG_WAITALL)) == 32, "but it was good where it belongs"
        ends.receiver.close()


@pytest.mark.parametrize("echo", [False, True])
def test_the_sender_tells_nobody_but_its_peer(ends, echo):
    """Somebody else listens there and does not know the token: it answers at random, or says P's own proof again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends.contexts[1].mailbox.publish("tcp/token", bytes(32))
        ends.contexts[1].mailbox.publish("tcp/address", b"127.0.0.1 %d" % server.getsockname()[1])
        opening = Call(ends.sender.open, WAIT)
        others = [server.accept()[0] for _ in range(tcp.STREAMS)]
        for other in others:
            other.sendall(os.urandom(16))
        hellos = [other.recv(49, socket.MSG_WAITALL) for other in others]
        others[2].sendall(hellos[2][17:] if echo else os.urandom(32))
        assert "not the peer" in opening.join().error
        for other in others:
            with other:
                assert read_all(other) == b""
    assert [len(hello) for hello in hellos] == [49] * tcp.STREAMS


@pytest.mark.parametrize("text", [b"", b"127.0.0.1", b"localhost 80", b"127.0.0.1 x", b"\xff 1", b"127.0.0.1 99999"])
def test_an_address_that_is_none_is_refused(ends, text):
    ends.contexts[1].mailbox.publish("tcp/token", bytes(32))
    ends.contexts[1].mailbox.publish("tcp/address", text)
    with pytest.raises(TransferFailed, match="KV data path"):
        ends.sender.open(WAIT)


# ----------------------------------------------------------------------------------------------------------- listening


def test_the_door_is_on_the_given_host_and_closed_behind_the_streams(ends):
    ends.contexts[1].host = "127.0.0.2"
    ends.open()
    host, port = address_of(ends.contexts[0])
    assert host == "127.0.0.2"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), WAIT)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid", "192.0.2.1"])  # noqa: S104
def test_a_host_that_is_no_address_of_this_machine_is_refused(ends, host):
    ends.contexts[1].host = host
    with pytest.raises(ConfigError, match="KV data path"):
        ends.receiver.open(WAIT)


# ------------------------------------------------------------------------------------------------- deadlines and ends


def test_a_peer_that_never_reads_is_cut_at_the_deadline(ends):
    ends.open()
    payload = Payload.whole(blocks(1).expand(128, -1).contiguous())  # more than the kernel buffers
    started = time.monotonic()
    with pytest.raises(TransferFailed, match=r"within 0\.3 s failed: the peer was too slow"):
        ends.sender.send(frame(payload), payload, (), 0.3)
    assert 0.3 <= time.monotonic() - started < 0.3 + AT_ONCE
    with pytest.raises(TransferFailed, match="closed"):  # half a frame went out: never another one
        ends.sender.send(frame(payload), payload, (), WAIT)
    with pytest.raises(TransferFailed, match=r"the peer closed|reset"):
        ends.receiver.receive(frame(payload), (), WAIT)


def test_a_peer_that_always_has_one_more_byte_is_cut_at_the_deadline():
    def drip(sock: socket.socket) -> tcp.Job:
        while True:
            yield
            theirs.send(sock.recv(1))

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        with pytest.raises(TransferFailed, match="too slow"):
            tcp._drive({ours: drip(ours)}, select.POLLIN, time.monotonic() + 0.1)


@pytest.mark.parametrize("field", ["frame", "offset", "length"])
def test_a_header_that_is_not_the_expected_one_ends_the_path(ends, monkeypatch, field):
    ends.open()
    header = tcp._HEADER

    class Wrong:
        size, unpack = header.size, header.unpack

        @staticmethod
        def pack(number: int, offset: int, length: int) -> bytes:
            wrong = {"frame": number, "offset": offset, "length": length}
            wrong[field] += 1
            return header.pack(*wrong.values())

    monkeypatch.setattr(tcp, "_HEADER", Wrong)
    payload = Payload.whole(blocks(1))
    with pytest.raises(TransferFailed, match="out of step"):
        ends.move(payload)
    with pytest.raises(TransferFailed, match="closed"):
        ends.receiver.receive(frame(payload), (), WAIT)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_close_wakes_a_blocked_end_at_once(ends, end):
    ends.open()
    payload = Payload.whole(blocks(1).expand(128, -1).contiguous())
    operation = ends.sender.send if end == "sender" else ends.receiver.receive
    arguments = (frame(payload), payload, (), WAIT) if end == "sender" else (frame(payload), (), WAIT)
    call = Call(operation, *arguments)
    wait_until(lambda: getattr(ends, end)._busy)
    getattr(ends, end).close()
    assert "closed" in call.join(AT_ONCE).error


def test_close_wakes_a_receiver_that_waits_for_its_peer(ends):
    call = Call(ends.receiver.open, WAIT)
    address_of(ends.contexts[0])
    ends.receiver.close()
    assert "closed" in call.join(AT_ONCE).error


def test_open_fails_at_its_deadline_when_nobody_connects(ends):
    with pytest.raises(TransferFailed, match="did not connect in time"):
        ends.receiver.open(0.2)


def test_open_fails_at_its_deadline_when_nobody_answers(ends):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends.contexts[1].mailbox.publish("tcp/token", bytes(32))
        ends.contexts[1].mailbox.publish("tcp/address", b"127.0.0.1 %d" % server.getsockname()[1])
        with pytest.raises(TransferFailed, match="too slow"):
            ends.sender.open(0.2)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_is_left_of_a_closed_pair():
    def open_and_close() -> None:
        pair = make_ends().open()
        pair.close()
        pair.close()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    open_and_close()
    before = held()
    for _ in range(3):
        open_and_close()
    wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
