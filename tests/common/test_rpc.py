"""Authentication, errors and addresses of the internal plane, over real loopback sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from tandem.common import errors, rpc
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as pb_grpc

KEY = b"k" * 32
WRONG = b"w" * 32


class Everything(
    pb_grpc.WorkerServicer, pb_grpc.PrefillWorkerServicer, pb_grpc.HandoffServicer
):  # one unary, one server stream, one stream of both sides
    def __init__(self, error: errors.TandemError | None = None) -> None:
        self.error = error
        self.ended = asyncio.Event()

    async def Quiet(self, request: pb.QuietRequest, context: Any) -> pb.QuietReply:
        if self.error:
            await rpc.abort(context, self.error)
        return pb.QuietReply()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerEvent]:
        try:
            for sequence in range(3):
                yield pb.WorkerEvent(sequence=sequence)
            if self.error:
                await rpc.abort(context, self.error)
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def Channel(self, request_iterator: AsyncIterator[pb.Envelope], context: Any) -> AsyncIterator[pb.Envelope]:
        async for envelope in request_iterator:
            yield pb.Envelope(message=envelope.message[::-1])


class Running:
    def __init__(self, servicer: Everything, host: str = "127.0.0.1") -> None:
        self.servicer = servicer
        self.host = host

    async def __aenter__(self) -> str:
        self.server = rpc.create_server()
        pb_grpc.add_WorkerServicer_to_server(self.servicer, self.server)
        pb_grpc.add_PrefillWorkerServicer_to_server(self.servicer, self.server)
        pb_grpc.add_HandoffServicer_to_server(self.servicer, self.server)
        port = rpc.bind(self.server, self.host, 0, KEY)
        await self.server.start()
        return rpc.format_address(self.host, port)

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(0)


async def test_every_kind_of_call_passes_with_the_key() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        worker = pb_grpc.WorkerStub(channel)
        assert await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5) == pb.QuietReply()
        watch = worker.Watch(pb.WatchRequest(), timeout=5)
        assert [(await watch.read()).sequence for _ in range(3)] == [0, 1, 2]
        watch.cancel()
        duplex = pb_grpc.HandoffStub(channel).Channel(timeout=5)
        for message in (b"abc", b"defg"):
            await duplex.write(pb.Envelope(message=message))
            assert (await duplex.read()).message == message[::-1]
        await duplex.done_writing()
        assert await duplex.read() is grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


async def test_sync_channel_passes_with_the_key() -> None:
    def calls(address: str) -> list[bytes]:
        with rpc.create_sync_channel(address, KEY) as channel:
            pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
            sent = iter([pb.Envelope(message=b"abc"), pb.Envelope(message=b"de")])
            return [reply.message for reply in pb_grpc.HandoffStub(channel).Channel(sent, timeout=5)]

    async with Running(Everything()) as address:
        assert await asyncio.to_thread(calls, address) == [b"cba", b"ed"]


async def test_a_peer_with_another_key_is_a_clear_error_for_every_kind_of_call() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, WRONG) as channel:
        worker = pb_grpc.WorkerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            await worker.Watch(pb.WatchRequest(), timeout=5).read()
        with pytest.raises(grpc.aio.AioRpcError) as duplex:  # refused before it sends anything
            await pb_grpc.HandoffStub(channel).Channel(timeout=5).read()
    for caught in (unary, stream, duplex):
        error = rpc.to_error(caught.value)
        # Retryable: it is also what the router sees when a dead worker's port went to somebody else.
        assert type(error) is errors.WorkerFailed
        assert error.message == f"the peer at {address} {NOT_OURS}"


NOT_OURS = "does not hold this cluster's key; check that TANDEM_CLUSTER_KEY is the same on both"


async def test_a_peer_with_another_key_is_a_clear_error_on_the_sync_channel() -> None:
    def call(address: str) -> errors.TandemError:
        with rpc.create_sync_channel(address, WRONG) as channel, pytest.raises(grpc.RpcError) as caught:
            next(pb_grpc.HandoffStub(channel).Channel(iter(()), timeout=5))
        return rpc.to_error(caught.value)

    async with Running(Everything()) as address:
        assert (await asyncio.to_thread(call, address)).message.endswith(NOT_OURS)


async def test_a_peer_without_tls_is_the_same_clear_error() -> None:
    plain = grpc.aio.server()
    port = plain.add_insecure_port("127.0.0.1:0")
    await plain.start()
    async with rpc.create_channel(f"127.0.0.1:{port}", KEY) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
    await plain.stop(0)
    assert rpc.to_error(caught.value).message.endswith(NOT_OURS)


@pytest.mark.parametrize("cls", errors.ALL, ids=lambda cls: cls.__name__)
async def test_each_error_crosses_unchanged(cls: type[errors.TandemError]) -> None:
    sent = cls("went wröng at 100%", param="messages[0].é", retry_after=1.5)
    async with Running(Everything(sent)) as address, rpc.create_channel(address, KEY) as channel:
        worker = pb_grpc.WorkerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            _ = [event async for event in worker.Watch(pb.WatchRequest(), timeout=5)]
    for caught in (unary, stream):
        assert caught.value.code() is grpc.StatusCode[cls.grpc_code]
        got = rpc.to_error(caught.value)
        assert type(got) is cls
        assert (got.message, got.param, got.retry_after) == (sent.message, sent.param, sent.retry_after)


async def test_a_huge_message_does_not_break_the_status() -> None:
    sent = errors.InvalidRequest("\N{GRINNING FACE}" * 5000, param="p" * 5000)
    async with Running(Everything(sent)) as address, rpc.create_channel(address, KEY) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
    got = rpc.to_error(caught.value)
    assert type(got) is errors.InvalidRequest
    assert set(got.message) == {"\N{GRINNING FACE}"}


async def test_nobody_there_is_a_failed_worker() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = rpc.format_address("127.0.0.1", closed.getsockname()[1])
        async with rpc.create_channel(address, KEY) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
    assert type(rpc.to_error(caught.value)) is errors.WorkerFailed


async def test_deadline_and_cancellation_have_their_classes() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        worker = pb_grpc.WorkerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            _ = [event async for event in worker.Watch(pb.WatchRequest(), timeout=0.05)]
        with pytest.raises(grpc.aio.AioRpcError) as foreign:
            await channel.unary_unary("/tandem.v1.Worker/Nothing")(b"", timeout=5)  # pyright: ignore[reportCallIssue]
    assert type(rpc.to_error(late.value)) is errors.DeadlineExceeded
    assert type(rpc.to_error(foreign.value)) is errors.ConfigError


async def test_dropping_a_stream_reaches_the_server() -> None:
    """A client that leaves must free its blocks: the servicer's generator has to end."""
    servicer = Everything()
    async with Running(servicer) as address, rpc.create_channel(address, KEY) as channel:
        watch = pb_grpc.WorkerStub(channel).Watch(pb.WatchRequest(), timeout=30)
        await watch.read()
        watch.cancel()
        async with asyncio.timeout(5):
            await servicer.ended.wait()


async def test_cancelling_the_reader_task_cancels_the_call() -> None:
    servicer = Everything()
    async with Running(servicer) as address, rpc.create_channel(address, KEY) as channel:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in pb_grpc.WorkerStub(channel).Watch(pb.WatchRequest(), timeout=30):
                started.set()

        task = asyncio.create_task(read())
        async with asyncio.timeout(5):
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await servicer.ended.wait()


class Cable:
    """A TCP connection through here passes bytes until it is cut: then both ends wait, as when a machine vanished."""

    def __init__(self, address: str) -> None:
        self._host, port = address.rsplit(":", 1)
        self._port = int(port)
        self._plugged = asyncio.Event()
        self._plugged.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = rpc.format_address("127.0.0.1", self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._plugged.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._tasks += [asyncio.create_task(self._pump(*pair)) for pair in ((reader, back), (there, writer))]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._plugged.wait()
                writer.write(data)
        finally:
            writer.close()


async def test_a_peer_that_vanished_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: gRPC ignores keepalive_timeout and waits a minute unless ping_timeout is set too."""
    faster = [
        (name, int(value) // 20 if "keepalive_time" in name or "ping_timeout" in name else value)
        for name, value in rpc._CHANNEL_OPTIONS
    ]
    monkeypatch.setattr(rpc, "_CHANNEL_OPTIONS", faster)  # 0.5 s + 0.25 s
    async with (
        Running(Everything()) as address,
        Cable(address) as cable,
        rpc.create_channel(cable.address, KEY) as channel,
    ):
        watch = pb_grpc.WorkerStub(channel).Watch(pb.WatchRequest(), timeout=30)
        assert [(await watch.read()).sequence for _ in range(3)] == [0, 1, 2]
        cable.cut()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(5):
                await watch.read()
    assert type(rpc.to_error(caught.value)) is errors.WorkerFailed


async def test_messages_up_to_the_limit_pass() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        duplex = pb_grpc.HandoffStub(channel).Channel(timeout=20)
        await duplex.write(pb.Envelope(message=bytes(20 << 20)))
        assert len((await duplex.read()).message) == 20 << 20
        duplex.cancel()


async def test_a_message_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the receiver, whatever the sender allows itself."""
    sender = [(name, -1 if name == "grpc.max_send_message_length" else value) for name, value in rpc._CHANNEL_OPTIONS]
    monkeypatch.setattr(rpc, "_CHANNEL_OPTIONS", sender)
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        duplex = pb_grpc.HandoffStub(channel).Channel(timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await duplex.write(pb.Envelope(message=bytes(rpc.MAX_MESSAGE_BYTES)))
            await duplex.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "received message larger" in str(caught.value.details()).lower()  # not: the answer is too large to be sent


def test_the_largest_leg_and_the_largest_hand_off_message_fit() -> None:
    from tandem.common import handoff, limits

    leg = pb.Leg(prompt_ids=[limits.MAX_TOKEN_ID] * limits.MAX_PROMPT_TOKENS, ticket=bytes(limits.MAX_TICKET))
    assert leg.ByteSize() + (1 << 20) < rpc.MAX_MESSAGE_BYTES
    assert handoff.MAX_MESSAGE_BYTES + 100 < rpc.MAX_MESSAGE_BYTES


async def test_metadata_over_the_limit_is_refused() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        fits = (("x", "y" * (rpc.MAX_METADATA_BYTES - 1000)),)
        await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5, metadata=fits)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(
                pb.QuietRequest(), timeout=5, metadata=(("x", "y" * rpc.MAX_METADATA_BYTES),)
            )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_over_the_limit_of_one_connection_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = [(name, 2 if "concurrent_streams" in name else value) for name, value in rpc._SERVER_OPTIONS]
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", fewer)
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        worker = pb_grpc.WorkerStub(channel)
        held = [worker.Watch(pb.WatchRequest(), timeout=30) for _ in range(2)]
        assert [(await watch.read()).sequence for watch in held] == [0, 0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held[0].cancel()
        await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)


async def test_who_connects_and_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sooner = [(name, 200 if "handshake_timeout" in name else value) for name, value in rpc._SERVER_OPTIONS]
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", sooner)
    async with Running(Everything()) as address:
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


def test_no_message_of_the_internal_plane_contains_itself() -> None:
    """T30: a recursive type lets a small message exhaust the parser's stack (CVE-2025-4565)."""

    def walk(message: Any, above: tuple[str, ...]) -> None:
        assert message.full_name not in above, f"{message.full_name} contains itself: {above}"
        for field in message.fields:
            assert not (field.message_type and field.message_type.full_name.startswith("google.protobuf."))
            if field.message_type:
                walk(field.message_type, (*above, message.full_name))

    messages = pb.DESCRIPTOR.message_types_by_name.values()
    assert len(messages) > 10
    for message in messages:
        walk(message, ())


async def test_no_reflection_and_no_method_but_the_protocols() -> None:
    async with Running(Everything()) as address, rpc.create_channel(address, KEY) as channel:
        for method in ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{method}")(b"", timeout=5)  # pyright: ignore[reportCallIssue]
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_busy_port_is_an_error_that_names_the_address() -> None:
    async with Running(Everything()) as address:
        port = int(address.rsplit(":", 1)[1])
        with pytest.raises(errors.ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            rpc.bind(rpc.create_server(), "127.0.0.1", port, KEY)


async def test_a_port_taken_behind_the_first_look_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may look at the same moment; SO_REUSEPORT would let both listen."""
    monkeypatch.setattr(rpc, "_probe", lambda host, port: None)
    async with Running(Everything()) as address:
        with pytest.raises(errors.ConfigError, match="taken a moment ago"):
            rpc.bind(rpc.create_server(), "127.0.0.1", int(address.rsplit(":", 1)[1]), KEY)


async def test_impossible_host_is_an_error_that_names_it() -> None:
    with pytest.raises(errors.ConfigError, match=r"192\.0\.2\.1:0"):
        rpc.bind(rpc.create_server(), "192.0.2.1", 0, KEY)


async def test_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback here")
    async with Running(Everything(), "::1") as address, rpc.create_channel(address, KEY) as channel:
        assert address.startswith("[::1]:")
        await pb_grpc.PrefillWorkerStub(channel).Quiet(pb.QuietRequest(), timeout=5)
