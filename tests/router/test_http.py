"""HTTP's edges: what waits before admission, bugs, a server that stops, clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, Token
from tandem.router.completions import PromptSink
from tandem.router.http_protocol import BoundedProtocol, bounded_protocol, max_connections
from tests.router.conftest import MakeCluster
from tests.router.fake_cluster import MODEL, FakeCluster, FakeWorker, update
from tests.router.test_failures import hanging

PATH = "/v1/completions"


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# ---------------------------------------------------------------------- before admission


async def test_what_waits_for_a_first_worker_is_bounded(cluster: MakeCluster) -> None:
    """A prompt's size is known only once there is a worker, so it could not be admitted yet, and nothing counted it."""
    async with cluster("x", worker_wait=10.0, max_num_queued_reqs=2) as fake:
        await fake.decode[0].die()
        await fake.until(lambda: not fake.members.workers("decode"))
        calls = [asyncio.create_task(fake.complete()) for _ in range(3)]
        async with asyncio.timeout(5):
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = (call.result() for call in done)
        assert error_of(refused) == (503, "engine_overloaded") and len(waiting) == 2
        assert int(refused.headers["retry-after"]) >= 1
        await fake.add(FakeWorker("decode-9", "decode", fake.prefill[0].script))
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await fake.complete()).status_code == 200, "what left is not counted any more"


async def test_tokenizing_has_a_deadline(cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a request began behind it."""
    async with cluster("x", request_timeout=0.3) as fake:
        released = threading.Event()
        encode = fake.services.tokenizer.encode

        def stuck(*args: Any) -> list[int]:
            released.wait(20)
            return encode(*args)

        monkeypatch.setattr(fake.services.tokenizer, "encode", stuck)
        try:
            async with asyncio.timeout(5):
                assert error_of(await fake.complete()) == (503, "engine_overloaded")
        finally:
            released.set()


# ---------------------------------------------------------------------- bugs, and the server's end


async def test_a_bug_is_answered_counted_and_logged_like_any_error(
    cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was answered behind the layers that count and tag: as a client that left, without its id."""

    async def bug(*_: object) -> None:
        raise RuntimeError("the secret of our insides")

    async with cluster("x") as fake:
        monkeypatch.setattr(fake.services.completions, "_run", bug)
        headers = {"X-Request-Id": "abc-1"}
        answer = await fake.http.post(PATH, json={"model": MODEL, "prompt": "hi"}, headers=headers)
        assert error_of(answer) == (500, "internal_error") and "secret" not in answer.text
        assert answer.headers["x-request-id"] == "abc-1"
        assert fake.metric("http_requests_total", handler=PATH, method="POST", status="500") == 1
        assert fake.metric("http_requests_total", handler=PATH, method="POST", status="499") == 0
    assert "the secret of our insides" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_server_that_stops_answers_who_has_nothing_yet(cluster: MakeCluster, streamed: bool) -> None:
    """uvicorn cancels its tasks behind the grace, and would answer 500 in plain text for us."""
    async with cluster("x") as fake:
        fake.prefill[0].on_leg = fake.decode[0].on_leg = hanging()
        running = asyncio.create_task(fake.complete(stream=streamed))
        await fake.until(lambda: fake.decode[0].active == 1)
        fake.server.should_exit = True
        answer = await running
        assert error_of(answer) == (503, "engine_overloaded") and "shutting down" in answer.text
        assert answer.headers["retry-after"] == "1" and "x-request-id" in answer.headers
        async with asyncio.timeout(2):
            await fake.decode[0].all_left.wait()


# ---------------------------------------------------------------------- streams, and clients that do not read


async def test_silence_is_filled_with_comments(cluster: MakeCluster) -> None:
    async with cluster("x", keep_alive=0.05) as fake:
        quiet = asyncio.Event()

        async def late(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            await quiet.wait()
            async for message in worker._prefill(leg):
                yield message

        fake.prefill[0].on_leg = late
        lines: list[str] = []
        async with fake.http.stream("POST", PATH, json={"model": MODEL, "prompt": "hi", "stream": True}) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if lines.count(": keep-alive") == 2:
                    quiet.set()
        assert "data: [DONE]" in lines


@contextlib.contextmanager
def deaf_client(fake: FakeCluster, data: bytes) -> Iterator[None]:
    """Sends `data` and reads nothing, over a connection that holds a few kilobytes."""
    for server in fake.server.servers:
        for listener in server.sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(fake.url.rsplit(":", 1)[1])))
        client.sendall(data)
        yield


def connections(fake: FakeCluster) -> int:
    return len(fake.server.server_state.connections)


def completion(**fields: Any) -> bytes:
    body = json.dumps({"model": MODEL, "prompt": "hi", **fields})
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


MANY = 1_000_000


async def endless(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
    for first in range(1, MANY, 50):
        yield update(*(Token(0, index, 60 + index % 9) for index in range(first, first + 50)))


async def test_a_stream_nobody_reads_ends_with_its_legs_and_its_connection(
    cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Its legs ended, but the connection was closed politely: behind bytes that the client would never take."""

    async with cluster("x", send_timeout=0.3) as fake:
        fake.decode[0].on_leg = endless
        with deaf_client(fake, completion(stream=True)):
            await fake.until(lambda: fake.decode[0].active == 1)
            assert (await fake.http.get("/livez")).status_code == 200
            await fake.http.aclose()
            async with asyncio.timeout(10):
                await fake.decode[0].all_left.wait()
            assert 0 < fake.metric("tandem_router_generation_tokens_total") < MANY / 2, "it slows its own legs"
            await fake.until(lambda: connections(fake) == 0)
    assert "took no byte for 0.3 s" in caplog.text


async def test_a_stream_nobody_reads_does_not_hold_a_server_that_stops(cluster: MakeCluster) -> None:
    async with cluster("x") as fake:
        fake.decode[0].on_leg = endless
        with deaf_client(fake, completion(stream=True)):
            state: Any = fake.server.server_state
            await fake.until(lambda: any(connection.flow.write_paused for connection in state.connections), 10)
            fake.server.should_exit = True
            await fake.until(lambda: not state.tasks)


async def test_an_answer_nobody_reads_does_not_hold_its_connection(cluster: MakeCluster) -> None:
    async with cluster("x", send_timeout=0.3) as fake:
        with deaf_client(fake, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20):
            await fake.until(lambda: connections(fake) == 1)
            await fake.until(lambda: connections(fake) == 0)


class Connection(asyncio.Transport):
    """With so many bytes unsent whenever it is asked; the last number stays."""

    def __init__(self, *unsent: int) -> None:
        super().__init__()
        self.unsent = list(unsent)
        self.high: int | None = None
        self.aborted = asyncio.Event()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high

    def get_write_buffer_size(self) -> int:
        return self.unsent.pop(0) if len(self.unsent) > 1 else self.unsent[0]

    def abort(self) -> None:
        self.aborted.set()


async def app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("no request here")


def protocol_over(connection: Connection, send_timeout: float) -> Any:
    config = uvicorn.Config(app, http=bounded_protocol(send_timeout), log_config=None)
    config.load()
    protocol: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
    protocol.connection_made(connection)
    return protocol


async def test_a_client_that_reads_slowly_but_reads_is_not_cut_until_it_stops() -> None:
    connection = Connection(300, 200, 200, 100, 100, 100)  # asked when it pauses, and twice where it goes on
    protocol = protocol_over(connection, 0.01)
    assert connection.high == 0, "or it would not be told of the last bytes"
    protocol.pause_writing()
    async with asyncio.timeout(5):
        await connection.aborted.wait()
    assert connection.unsent == [100], "each time it had taken some, it got as long again"
    protocol.connection_lost(ConnectionAbortedError())


@pytest.mark.parametrize("end", ["resume_writing", "connection_lost"])
async def test_who_has_taken_everything_or_left_is_not_cut_later(end: str) -> None:
    connection = Connection(300)
    protocol = protocol_over(connection, 0.0)
    protocol.pause_writing()
    protocol.resume_writing() if end == "resume_writing" else protocol.connection_lost(ConnectionResetError())
    fired = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, fired.set)  # behind the timer, had it not been cancelled
    await fired.wait()
    assert not connection.aborted.is_set()
    protocol.connection_lost(ConnectionResetError())


async def test_a_stop_string_ends_the_legs_also_of_a_client_that_reads_slowly(
    cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all is over was looked at only once the client had caught up."""

    async def no_room_behind_the_end(sink: Any) -> None:
        if any(choice.finish_reason for choice in sink._choices):
            await asyncio.Event().wait()

    monkeypatch.setattr(PromptSink, "room", no_room_behind_the_end)
    async with cluster("one two three") as fake:
        async with asyncio.timeout(5):
            answer = await fake.complete(stop="two", max_tokens=200)
            await fake.decode[0].all_left.wait()
        choice = answer.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


async def test_a_connection_too_many_is_told_to_come_again(
    cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E29: not left waiting, and not given the last file descriptor."""
    async with cluster("x") as fake:
        address = ("127.0.0.1", int(fake.url.rsplit(":", 1)[1]))
        opened = [await asyncio.open_connection(*address) for _ in range(3)]
        assert (await fake.complete()).status_code == 200
        monkeypatch.setattr(BoundedProtocol, "max_connections", 3)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head and b"connection: close" in head
        assert json.loads(body)["error"]["code"] == "engine_overloaded"
        for _, other in [*opened, (reader, writer)]:
            other.close()
            await other.wait_closed()
        assert (await fake.complete()).status_code == 200, "there is room again"


def test_clients_do_not_get_the_last_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, connections in ((128, 64), (1024, 768), (1 << 20, (1 << 20) - 256)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, files=files: (files, files))
        assert max_connections() == connections
