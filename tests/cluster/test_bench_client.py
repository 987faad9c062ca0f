"""Loads against a server whose timing is a script: measured is what it did, and whatever goes wrong is counted."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tandem.cluster.bench import client
from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.client import Client
from tandem.cluster.bench.load import Load, Part
from tandem.cluster.bench.options import BenchOptions, EndpointType, Workload
from tandem.common.errors import ConfigError
from tests.cluster.scripted_server import DONE, Json, Script, ScriptedServer, Step, event, final_usage, plain, serving

SLACK = 0.25  # seconds a busy machine may take from a server's write to the client's reading


def ask(url: str, count: int = 1, timeout: float = 20.0, expected: int = 2) -> list[Answer]:
    """`count` requests, one after the other."""

    async def run() -> list[Answer]:
        answers = [Answer(expected) for _ in range(count)]
        async with Client(url, "key", timeout) as sender:
            for answer in answers:
                await sender.post("/v1/completions", b'{"max_tokens": %d}' % expected, answer)
        return answers

    return asyncio.run(run())


def load(server: ScriptedServer, **flags: Any) -> dict[str, Part]:
    short: dict[str, Any] = {"input_len": 4, "output_len": 2, "warmup": 0}
    options = BenchOptions(**(short | flags))

    async def run() -> dict[str, Part]:
        async with Client(server.url, None, options.request_timeout) as sender:
            load = Load(sender, options, "m")
            await load.warm_up("seed")
            return await load.run("seed")

    return asyncio.run(run())


def failures(part: Part) -> list[str | None]:
    return [answer.failure and answer.failure.kind for answer in part.answers]


# ----------------------------------------------------------------------------------------------------------- one answer
def test_times_are_those_of_the_servers_writes() -> None:
    def script(_: Json) -> Iterator[Step]:
        yield from (0.1, event(1), 0.2, event(4), 0.05, event(5), DONE)

    with serving(script) as server:
        (answer,) = ask(server.url, expected=5)
    assert answer.failure is None
    assert list(answer.counts) == [1, 3, 1]
    for at, written in zip(answer.times, server.written, strict=False):
        assert written <= at < written + SLACK
    assert 0.1 <= answer.ttft < 0.1 + SLACK
    waits = answer.waits()
    assert waits[0] == waits[1] == waits[2] > waits[3]
    assert answer.sent <= server.received[0]


def test_connections_are_reused_and_the_key_is_sent() -> None:
    with serving() as server:
        answers = ask(server.url, count=3)
        assert [answer.failure for answer in answers] == [None] * 3
        assert server.connections == 1
        assert "Authorization: Bearer key\r\n" in server.heads[0]


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers close those: a request lost to that would count as their failure."""
    monkeypatch.setattr(client, "REUSE_WITHIN", 0.0)
    with serving() as server:
        assert [answer.failure for answer in ask(server.url, count=3)] == [None] * 3
        assert server.connections == 3


def test_a_request_that_meets_a_closing_connection_is_sent_once_more() -> None:
    """As every HTTP client does (RFC 9112, 9.3.1): some servers close behind an answer without saying so."""
    with serving(lambda body: die_early(body) if len(server.bodies) == 2 else plain(body)) as server:
        answers = ask(server.url, count=3)
    assert [answer.failure for answer in answers] == [None] * 3
    assert len(server.bodies) == 4 and server.connections == 2


def test_a_request_lost_on_a_fresh_connection_is_a_failure() -> None:
    """Sending it again would hide that the server dropped it."""
    with serving(lambda body: die_early(body) if len(server.bodies) >= 2 else plain(body)) as server:
        answers = ask(server.url, count=2)
    assert [answer.failure and answer.failure.kind for answer in answers] == [None, "disconnect"]
    assert len(server.bodies) == 3


def refuse(_: Json) -> Iterator[Step]:
    yield from (503, b'{"error": {"message": "queue is full"}}')


def die_early(_: Json) -> Iterator[Step]:
    yield None


def die_midway(_: Json) -> Iterator[Step]:
    yield from (event(1), 0.05, None)


def talk_nonsense(_: Json) -> Iterator[Step]:
    yield b"data: {nonsense\n\n"


def answer_whole(_: Json) -> Iterator[Step]:
    yield b'{"choices": []}'


def never_end(_: Json) -> Iterator[Step]:
    yield from (event(1), 30.0)


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        (refuse, "HTTP 503", "queue is full"),
        (die_early, "disconnect", "after 0 tokens"),
        (die_midway, "disconnect", "after 1 tokens"),
        (talk_nonsense, "malformed", "nonsense"),
        (answer_whole, "cut off", "without [DONE]"),
        (never_end, "timeout", "within 0.3 s"),
    ],
)
def test_what_goes_wrong_is_told_by_kind(script: Script, kind: str, told: str) -> None:
    with serving(script) as server:
        (answer,) = ask(server.url, timeout=0.3 if script is never_end else 20.0)
    assert answer.failure is not None
    assert answer.failure.kind == kind
    assert told in answer.failure.message


def test_after_a_failure_the_next_request_gets_a_connection_of_its_own() -> None:
    with serving(lambda body: die_midway(body) if len(server.bodies) == 1 else plain(body)) as server:
        first, second = ask(server.url, count=2)
    assert first.failure is not None
    assert second.failure is None


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (answer,) = ask(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert answer.failure is not None and answer.failure.kind == "connect"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port"])
def test_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        Client(url, None, 1.0)


# ---------------------------------------------------------------------------------------------------------------- loads
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_closed_loop_keeps_as_many_requests_running(concurrency: int) -> None:
    with serving(partial(plain, first=0.02)) as server:
        parts = load(server, requests=9, concurrency=concurrency)
        assert failures(parts["all"]) == [None] * 9
        assert server.most_active == concurrency
        assert server.connections == concurrency


def test_an_open_loop_sends_at_its_times_whether_or_not_it_is_answered() -> None:
    with serving(partial(plain, first=0.4)) as server:
        parts = load(server, requests=5, request_rate=20.0, burstiness=float("inf"))
        assert failures(parts["all"]) == [None] * 5
        assert server.most_active == 5
        dues = [answer.due for answer in parts["all"].answers]
        assert [later - earlier for earlier, later in itertools.pairwise(dues)] == pytest.approx([0.05] * 4)
        assert all(0 <= answer.sent - answer.due < SLACK for answer in parts["all"].answers)


def test_a_cap_on_an_open_loop_makes_requests_late_not_the_server_slow() -> None:
    with serving(partial(plain, first=0.15)) as server:
        parts = load(server, requests=3, request_rate=1000.0, max_concurrency=1)
        assert server.most_active == 1
    last = max(parts["all"].answers, key=lambda answer: answer.sent)
    assert last.sent - last.due >= 0.28
    assert last.ttft < 0.15 + SLACK


def test_a_duration_ends_the_sending_and_waits_for_the_answers() -> None:
    with serving(partial(plain, first=0.08)) as server:
        parts = load(server, duration=0.2, concurrency=2, requests=40)
    answers = parts["all"].answers
    assert failures(parts["all"]) == [None] * len(answers)
    assert 2 <= len(answers) <= 6
    assert max(answer.sent for answer in answers) - min(answer.sent for answer in answers) < 0.2 + SLACK


def test_a_duration_ends_an_open_loop() -> None:
    with serving() as server:
        parts = load(server, duration=0.3, request_rate=20.0, burstiness=float("inf"), requests=40)
    assert failures(parts["all"]) == [None] * 6  # due at 0, 0.05 … 0.25


def test_a_trace_is_sent_at_its_times(tmp_path: Any) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{"timestamp": %d, "input_length": 5, "output_length": 2, "hash_ids": [1]}\n'
    path.write_text(line % 0 + line % 300)
    with serving() as server:
        load(server, workload=Workload.trace, trace=path, speed=2.0, input_len=512, output_len=64)
    assert 0.14 < server.received[1] - server.received[0] < 0.15 + SLACK


def test_the_warm_up_does_not_count_and_sends_other_prompts() -> None:
    with serving() as server:
        parts = load(server, requests=2, warmup=3)
    assert len(parts["all"].answers) == 2
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 5


def test_a_warm_up_that_fails_ends_it() -> None:
    with serving(refuse) as server, pytest.raises(ConfigError, match=r"warm-up failed: HTTP 503: .*queue is full"):
        load(server, warmup=1)


@pytest.mark.parametrize("endpoint_type", list(EndpointType))
def test_each_turn_carries_the_servers_own_answers(endpoint_type: EndpointType) -> None:
    with serving() as server:
        flags = {"workload": Workload.multi_turn, "turns": 3, "requests": 3, "concurrency": 1}
        parts = load(server, endpoint_type=endpoint_type, **flags)
        assert failures(parts["all"]) == [None] * 3
    first, second, third = server.bodies
    if endpoint_type is EndpointType.chat:
        assert third["messages"][:3] == second["messages"]
        assert third["messages"][3] == {"role": "assistant", "content": "xx"}
    else:
        assert len(third["prompt"]) == 3 * 4 + 2 * 2
        assert second["prompt"][:6] == [*first["prompt"], 101, 102]
        assert third["prompt"][:10] == second["prompt"]


def test_turns_behind_a_failed_one_are_counted() -> None:
    with serving(refuse) as server:
        parts = load(server, workload=Workload.multi_turn, turns=3, requests=3, concurrency=1)
        assert len(server.bodies) == 1
    assert failures(parts["all"]) == ["HTTP 503", "not sent", "not sent"]


# ------------------------------------------------------------------------------------------------------------ disturbed
def disturbable(body: Json) -> Iterator[Step]:
    """A long prompt stalls what comes after it arrived by 150 ms, once per stream."""
    if len(body["prompt"]) > 100:
        long_at.append(time.perf_counter())
        yield from plain(body, first=0.1)
        return
    stalled = False
    for number in range(1, body["max_tokens"] + 1):
        yield 0.02
        if long_at and not stalled:
            stalled = True
            yield 0.15
        yield event(number)
    yield from (final_usage(body["max_tokens"]), DONE)


long_at: list[float] = []


def test_streams_alone_and_disturbed() -> None:
    long_at.clear()
    flags = {"workload": Workload.disturbed, "streams": 2, "output_len": 30}
    with serving(disturbable) as server:
        parts = load(server, long_len=200, long_output_len=3, long_interval=0.3, **flags)
    alone, disturbed, long = parts["alone"], parts["disturbed"], parts["long"]
    assert failures(alone) + failures(disturbed) == [None] * 4
    assert set(failures(long)) == {None} and len(long.answers) >= 2
    assert [len(part.answers) for part in (alone, disturbed)] == [2, 2]
    stalls = [wait for answer in disturbed.answers for wait in answer.waits(*disturbed.window) if wait >= 0.15]
    assert len(stalls) >= 2
    assert min(answer.ttft for answer in long.answers) >= 0.1
    first, last = disturbed.window
    assert all(max(answer.times[0] for answer in disturbed.answers) <= first <= at for at in long_at[:1])
    assert last == min(answer.times[-1] for answer in disturbed.answers)


def test_streams_that_fail_end_the_phase() -> None:
    with serving(refuse) as server:
        parts = load(server, workload=Workload.disturbed, streams=2, output_len=5)
    assert failures(parts["alone"]) == ["HTTP 503"] * 2
