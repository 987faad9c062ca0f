"""More requests than there is room for, and clients that hold on to what they have: most are served as if alone.

The router is a process of its own, as is the load generator; the workers are fakes of a known capacity.
`TANDEM_OVERLOAD_SECONDS=60` makes the overload as long as docs/reliability.md promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.common import rpc
from tandem.common.errors import Overloaded
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, Token
from tests.faults.routed import RoutedWorkers
from tests.router.fake_cluster import FakeCluster, FakeWorker, Script, update

SECONDS = float(os.environ.get("TANDEM_OVERLOAD_SECONDS", "8"))
NORMAL = 16  # streams of clients that behave
PACE = 0.01  # seconds between two of their tokens
PREFILL = 0.05  # seconds of the one prefill worker per prompt: some 19 requests a second
REQUEST = b'{"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 100000, "stream": true, "ignore_eos": true}'


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def test_four_times_the_peak_for_a_while(model_dir: Path) -> None:
    """E37: goodput ≥ 90 % of its peak; rejections at once, with Retry-After; back to normal in 5 s; nothing leaked."""
    async with RoutedWorkers(model_dir, ("--max-queue-wait", "2"), PREFILL) as cluster:
        alone = [(await cluster.ask()).elapsed.total_seconds() for _ in range(5)]
        calm = await cluster.load("closed", 8, SECONDS / 2)
        peak = sum(begin + took <= SECONDS / 2 for begin, _, took, _ in calm["results"]) / (SECONDS / 2)
        load = await cluster.load("open", 4 * peak, SECONDS)
        ended = time.monotonic()
        while (await cluster.ask()).elapsed.total_seconds() > 3 * max(alone) + 0.05:
            assert time.monotonic() < ended + 5, "not back to normal"
        recovery = time.monotonic() - ended
        await cluster.until(cluster.nothing_left, 5.0)
    results, lag = load["results"], load["lag"]
    served = [(begin + took, took) for begin, status, took, _ in results if status == 200]
    refused = [(took, after) for _, status, took, after in results if status == 503]
    goodput = sum(end <= SECONDS for end, _ in served) / SECONDS
    p99, median = percentile([took for took, _ in refused], 0.99), statistics.median(took for took, _ in refused)
    print(
        f"peak {peak:.0f}/s, goodput at 4x {goodput:.0f}/s; {len(refused)} refused in p50 {median * 1000:.1f} ms, "
        f"p99 {p99 * 1000:.1f} ms, the machine lagged by {lag * 1000:.1f} ms; normal after {recovery:.1f} s"
    )
    assert len(served) + len(refused) == len(results), "some were neither served nor refused"
    assert goodput >= 0.9 * peak
    assert p99 <= 0.05 + lag
    assert all(after and 1 <= int(after) <= 60 for _, after in refused)
    assert max(took for _, took in served) < 6.0  # expected to wait two seconds, and never hung


async def test_a_queue_that_does_not_move_ends_at_its_deadline(model_dir: Path) -> None:
    """Without a first token for --queue-timeout: 503 to who waits for the whole, an event to who streams already."""
    async with FakeCluster(model_dir, Script([[60]]), queue_timeout=0.4, keep_alive=0.1) as fake:

        async def stuck(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            await asyncio.Event().wait()
            yield update()

        fake.prefill[0].on_leg = fake.decode[0].on_leg = stuck
        whole, streamed = await asyncio.gather(fake.complete(), fake.complete(stream=True))
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_overloaded")
        assert int(whole.headers["retry-after"]) >= 1
        events = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert streamed.status_code == 200 and ": keep-alive" in streamed.text
        assert json.loads(events[0].removeprefix("data: "))["error"]["code"] == "engine_overloaded"
        assert events[1:] == ["data: [DONE]"]
        await asyncio.gather(fake.prefill[0].all_left.wait(), fake.decode[0].all_left.wait())
        assert (fake.services.admission.sequences, fake.services.admission.tokens) == (0, 0)


async def test_a_first_token_lifts_the_queue_deadline(model_dir: Path) -> None:
    async with FakeCluster(model_dir, Script([[60] * 8]), queue_timeout=0.3) as fake:
        fake.decode[0].pace = lambda: asyncio.sleep(0.1)
        answer = await fake.complete(max_tokens=6, ignore_eos=True)
        assert answer.json()["usage"]["completion_tokens"] == 6


async def test_retries_of_refused_work_are_bounded(model_dir: Path) -> None:
    """E38: workers that are full get 10 % more legs than there are requests, and a few; not three times as many."""
    requests = 200
    async with FakeCluster(model_dir, Script([[60] * 3]), pools=(0, 2)) as fake:

        async def full(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            await rpc.abort(context, Overloaded("full"))
            yield update()

        for worker in fake.decode:
            worker.on_leg = full
        for _ in range(requests // 20):
            answers = await asyncio.gather(*(fake.complete() for _ in range(20)))
            assert {(answer.status_code, "retry-after" in answer.headers) for answer in answers} == {(503, True)}
        legs = sum(len(worker.legs) for worker in fake.decode)
        assert requests < legs <= 1.1 * requests + 16
        for worker in fake.decode:
            worker.on_leg = None
        before = legs
        assert {(await fake.complete(max_tokens=2)).status_code for _ in range(20)} == {200}
        assert sum(len(worker.legs) for worker in fake.decode) == before + 20  # all well: no leg is sent twice


# ---------------------------------------------------------------------- clients that hold on


async def stream_slowly(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that asks for an endless stream and has read a single byte of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(REQUEST), REQUEST)
    )
    await reader.readexactly(1)
    return reader, writer


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def endless(batch: int) -> Callable[..., AsyncIterator[pb.LegUpdate]]:
    """A decode worker that sends `batch` tokens at once as long as somebody takes them."""

    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        if leg.sampling.max_tokens < 1000:
            async for message in worker._decode(leg):
                yield message
            return
        for first in range(1, leg.sampling.max_tokens, batch):
            yield update(*(Token(0, index, 60) for index in range(first, first + batch)))

    return on_leg


async def gaps(cluster: RoutedWorkers | FakeCluster) -> float:
    """p99 of the seconds between two events of NORMAL streams, whose tokens are PACE apart; the best of three rounds,
    so that a moment in which the machine was busy elsewhere does not count."""

    async def stream() -> list[float]:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 24, "ignore_eos": True, "stream": True}
        async with cluster.http.stream("POST", "/v1/completions", json=body) as response:
            times = [time.monotonic() async for line in response.aiter_lines() if line.startswith("data: {")]
        assert len(times) >= 20
        return [after - before for before, after in itertools.pairwise(times)]

    rounds = [await asyncio.gather(*(stream() for _ in range(NORMAL))) for _ in range(3)]
    return min(percentile(sum(streams, list[float]()), 0.99) for streams in rounds)


async def test_slow_readers_hold_nobody_up(model_dir: Path) -> None:
    """E35: 200 clients that take no byte. Their legs are paused, others are answered as before, memory stays flat."""
    async with RoutedWorkers(model_dir) as cluster:
        cluster.prefill.max_model_len = cluster.decode.max_model_len = 1 << 20
        cluster.decode.on_leg, cluster.decode.pace = endless(50), lambda: asyncio.sleep(PACE)
        alone, alone_p99 = [(await cluster.ask()).elapsed.total_seconds() for _ in range(10)], await gaps(cluster)
        slow = await asyncio.gather(*(stream_slowly(cluster.port) for _ in range(200)))
        process = psutil.Process(cluster.router.pid)
        sent = -1.0
        while sent != (sent := await cluster.metric("tandem_router_generation_tokens_total")):
            await asyncio.sleep(0.3)  # until the buffers are full and every leg stands still
        memory = process.memory_info().rss
        beside, p99 = [(await cluster.ask()).elapsed.total_seconds() for _ in range(20)], await gaps(cluster)
        grown = process.memory_info().rss - memory
        print(
            f"alone {statistics.median(alone) * 1000:.1f} ms, beside {statistics.median(beside) * 1000:.1f} ms; p99 of "
            f"{NORMAL} streams' gaps {alone_p99 * 1000:.1f} and {p99 * 1000:.1f} ms; {grown >> 20} MiB more"
        )
        assert statistics.median(beside) < 2 * statistics.median(alone) + 0.02
        assert p99 < 2 * alone_p99 + 0.02
        assert grown < 20 << 20
        await close([writer for _, writer in slow])
        await cluster.until(cluster.nothing_left, 5.0)


async def test_a_stopped_router_goes_on_and_forgets_who_left(model_dir: Path) -> None:
    """E12: SIGSTOP for two seconds. Who waited is answered, who left meanwhile costs nothing more."""
    async with RoutedWorkers(model_dir, (), 0.2) as cluster:
        waiting = [asyncio.create_task(cluster.ask()) for _ in range(4)]
        leaving = [asyncio.create_task(cluster.ask()) for _ in range(8)]

        async def all_there() -> bool:
            return cluster.prefill.active >= 10

        await cluster.until(all_there, 5.0)
        cluster.router.send_signal(signal.SIGSTOP)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.sleep(2.0)
        cluster.router.send_signal(signal.SIGCONT)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 4
        await cluster.until(cluster.nothing_left, 5.0)
        assert (await cluster.ask()).status_code == 200


async def test_a_killed_router_is_back_with_all_workers_in_seconds(model_dir: Path) -> None:
    """E7, the start of an interpreter included, which tests of whole clusters spare by forking."""
    async with RoutedWorkers(model_dir) as cluster:
        died = time.monotonic()
        cluster.restart()
        await cluster.until(cluster.ready, 30.0)
        assert (await cluster.ask()).status_code == 200
        serves = time.monotonic() - died
        print(f"{serves:.2f} s from kill -9 of the router to the first answer of its successor")
        assert serves < 10.0


async def ends(reader: asyncio.StreamReader, within: float) -> bool:
    """Whether the other end closes without a word."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(within):
            assert await reader.read() == b""
            return True
    return False


async def test_more_connections_than_file_descriptors(model_dir: Path) -> None:
    """E29: 500 connections to a router that may open 128 files. It closes the excess at once and serves the others."""
    async with RoutedWorkers(model_dir, files=128) as cluster:
        assert (await cluster.ask()).status_code == 200  # over a connection that stays open
        connections = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", cluster.port) for _ in range(500)))
        closed = sum(await asyncio.gather(*(ends(reader, 1.0) for reader, _ in connections)))
        print(f"{closed} of 500 connections were closed at once")
        assert 500 - 128 <= closed < 500
        assert cluster.router.poll() is None
        assert (await cluster.ask()).status_code == 200
        await close([writer for _, writer in connections])

        async def serves() -> bool:
            return b" 200 " in await once(cluster.port)

        await cluster.until(serves, 10.0)
        await cluster.until(cluster.nothing_left, 5.0)


async def once(port: int) -> bytes:
    """GET /readyz over a connection of its own; b"" if it is closed at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        await close([writer])


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for both ends of 500 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_heads_that_never_end_are_cut(model_dir: Path, many_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """E36: 500 connections that send a request's head slowly, or nothing, are closed; others do not notice."""
    monkeypatch.setattr("tandem.router.http_protocol.HEAD_TIMEOUT", 1.0)
    async with FakeCluster(model_dir, Script([[60] * 3])) as fake:
        fake.decode[0].pace = lambda: asyncio.sleep(PACE)
        alone = await gaps(fake)
        port = int(fake.url.rsplit(":", 1)[1])
        idle = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(500)))
        for index, (_, writer) in enumerate(idle):
            if index % 2:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        beside = await gaps(fake)
        print(f"p99 of {NORMAL} streams' gaps {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside")
        assert beside < 2 * alone + 0.02
        async with asyncio.timeout(5):
            assert {await reader.read() for reader, _ in idle} == {b""}
        await close([writer for _, writer in idle])
        assert (await fake.complete(max_tokens=2)).status_code == 200


async def test_a_head_without_end_is_refused(model_dir: Path) -> None:
    async with FakeCluster(model_dir, Script([[60] * 3])) as fake:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(fake.url.rsplit(":", 1)[1]))
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * (17 << 10))
        async with asyncio.timeout(5):
            assert b" 400 " in await reader.read()
        await close([writer])
