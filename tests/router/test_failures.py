"""Workers that die, hang, lie or are missing; clients that leave. A client's stream stays exact, or ends once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tandem.common import rpc
from tandem.common.errors import InternalError, Overloaded, TransferFailed, WorkerFailed
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, LegStats
from tandem.router.dispatch import together
from tests.router.conftest import MakeCluster
from tests.router.fake_cluster import MODEL, FakeCluster, FakeWorker, OnLeg, update

TEXT = "The decode worker writes one token after another, until it is done."


def failing(error: Exception) -> OnLeg:
    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        await rpc.abort(context, error)  # pyright: ignore[reportArgumentType]
        yield update()

    return on_leg


def hanging() -> OnLeg:
    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        await asyncio.Event().wait()
        yield update()

    return on_leg


def sending(*indices: int, then_hang: bool = False) -> OnLeg:
    """A worker that sends these token indices of each choice, right or wrong, and ends its leg."""

    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        for index in indices:
            yield update(*(worker.script.token(leg, choice, index) for choice in leg.choices))
        if then_hang:
            await asyncio.Event().wait()
        yield update(stats=LegStats())

    return on_leg


def dying(*indices: int) -> OnLeg:
    """A worker whose process ends behind these tokens."""

    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        for index in indices:
            yield update(*(worker.script.token(leg, choice, index) for choice in leg.choices))
        asyncio.get_running_loop().create_task(worker.die())
        await asyncio.Event().wait()

    return on_leg


def waiting_in_vain() -> OnLeg:
    """A decode worker that waits for a hand-off which never comes, in the first attempt."""

    async def on_leg(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        if leg.attempt == 0:
            await asyncio.Event().wait()
        async for message in worker._decode(leg):
            yield message

    return on_leg


async def read(response: httpx.Response, texts: list[str]) -> list[str]:
    """Adds a completion stream's text to `texts`, by choice; returns the events that are no text."""
    others: list[str] = []
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if not line:
            continue
        if data == "[DONE]" or "error" in data or line.startswith(":"):
            others.append(data)
            continue
        choice = json.loads(data)["choices"][0]
        texts[choice["index"]] += choice["text"]
    return others


async def stream(fake: FakeCluster, choices: int = 1, **fields: Any) -> tuple[list[str], list[str]]:
    texts = [""] * choices
    body = {"model": MODEL, "prompt": "hi", "stream": True, "max_tokens": 200, "n": choices, **fields}
    async with fake.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        return texts, await read(response, texts)


def script_ids(fake: FakeCluster) -> tuple[int, ...]:
    return tuple(fake.prefill[0].script.choices[0])


# ---------------------------------------------------------------------- attempts


FAULTS = [dying(), dying(1), dying(1, 2, 3), sending(1, 3), sending(1, 1), sending(2), sending(1)]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_decode_worker_that_dies_or_lies_is_replaced(cluster: MakeCluster, fault: OnLeg) -> None:
    """The client gets every token once; the next worker continues from exactly what the client has."""
    async with cluster(TEXT, pools=(1, 2)) as fake:
        fake.decode[0].on_leg = fault
        texts, others = await stream(fake)
        assert (texts, others) == ([TEXT], ["[DONE]"])
        (bad,), (good,) = fake.decode[0].legs, fake.decode[1].legs
        assert (bad.attempt, good.attempt) == (0, 1)
        assert bad.ticket != good.ticket
        # None at all, if D died before P's token 1 arrived; not always the last one it sent, if it died behind it.
        assert good.output_ids == script_ids(fake)[: len(good.output_ids)]
        assert fake.prefill[0].legs[1].output_ids == good.output_ids
        assert good.sampling == bad.sampling
        assert fake.metric("tandem_router_retries_total") == 1


@pytest.mark.parametrize("fault", [dying(), sending(), sending(1), failing(TransferFailed("digest"))])
async def test_a_prefill_worker_that_fails_before_token_1_is_replaced(cluster: MakeCluster, fault: OnLeg) -> None:
    async with cluster(TEXT, pools=(2, 2)) as fake:
        fake.prefill[0].on_leg = fault
        fake.decode[0].on_leg = waiting_in_vain()
        texts, others = await stream(fake)
        assert (texts, others) == ([TEXT], ["[DONE]"])
        assert [leg.output_ids for leg in fake.prefill[1].legs] == [()]
        await fake.decode[0].all_left.wait()
        assert fake.decode[0].cancelled == 1


async def test_a_prefill_worker_lost_between_token_1_and_hand_off(cluster: MakeCluster) -> None:
    async with cluster(TEXT, pools=(2, 1)) as fake:
        fake.prefill[0].on_leg, fake.decode[0].on_leg = dying(0), waiting_in_vain()
        assert await stream(fake) == ([TEXT], ["[DONE]"])
        assert fake.prefill[1].legs[0].output_ids == script_ids(fake)[:1]


async def test_a_prefill_leg_that_fails_behind_the_hand_off_is_no_failure(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        gate = asyncio.Event()

        async def late_failure(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            yield update(worker.script.token(leg, 0, 0))
            await gate.wait()
            await rpc.abort(context, WorkerFailed("gone"))

        async def pace() -> None:
            if fake.decode[0].active and fake.prefill[0].active and len(seen) == 3:
                gate.set()
                await fake.prefill[0].all_left.wait()
            seen.append(None)

        seen: list[None] = []
        fake.prefill[0].on_leg, fake.decode[0].pace = late_failure, pace
        assert await stream(fake) == ([TEXT], ["[DONE]"])
        assert len(fake.decode[0].legs) == 1


async def test_a_decode_worker_faster_than_the_first_token(cluster: MakeCluster) -> None:
    """D may stream token 2 before P's message with token 1 arrives."""
    async with cluster(TEXT) as fake:
        decoded = asyncio.Event()

        async def slow(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            await decoded.wait()
            async for message in worker._prefill(leg):
                yield message

        async def fast(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
            async for message in worker._decode(leg):
                yield message
                decoded.set()

        fake.prefill[0].on_leg, fake.decode[0].on_leg = slow, fast
        assert await stream(fake) == ([TEXT], ["[DONE]"])


async def test_each_choice_resumes_on_its_own(cluster: MakeCluster) -> None:
    async with cluster("first answer", "second, longer answer", pools=(1, 2)) as fake:
        fake.decode[0].on_leg = dying(1, 2)
        texts, others = await stream(fake, choices=2)
        assert (texts, others) == (["first answer", "second, longer answer"], ["[DONE]"])
        resumed = sorted(fake.decode[1].legs, key=lambda leg: leg.choices)
        assert [leg.choices for leg in resumed] == [(0,), (1,)]
        scripts = fake.prefill[0].script.choices
        assert [leg.output_ids for leg in resumed] == [tuple(script[:3]) for script in scripts]


async def test_attempts_are_bounded_and_the_last_error_is_told(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        fake.decode[0].on_leg = failing(WorkerFailed("always"))
        answer = await fake.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "worker_failed")
        assert [leg.attempt for leg in fake.decode[0].legs] == [0, 1, 2]
        assert len({leg.ticket for leg in fake.decode[0].legs}) == 3


async def test_the_last_attempt_behind_failed_transfers_needs_none(cluster: MakeCluster) -> None:
    """A pair whose link corrupts everything still serves: the decode worker prefills the prompt itself."""
    async with cluster(TEXT, prefill_expected=1) as fake:
        fake.prefill[0].on_leg = failing(TransferFailed("digest mismatch"))
        answer = await fake.complete(max_tokens=200)
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, TEXT)
        assert [bool(leg.ticket) for leg in fake.decode[0].legs] == [True, True, False]
        assert fake.metric("tandem_router_degraded_prefills_total") == 1


async def test_what_cannot_succeed_is_not_tried_again(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        fake.prefill[0].on_leg = failing(InternalError("poisoned step"))
        fake.decode[0].on_leg = hanging()
        answer = await fake.complete()
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "poisoned step")
        await fake.decode[0].all_left.wait()
        assert len(fake.decode[0].legs) == fake.decode[0].cancelled == 1


async def test_an_error_behind_the_first_token_is_an_event_and_the_stream_ends_once(cluster: MakeCluster) -> None:
    async with cluster(TEXT, migration_limit=1) as fake:
        fake.decode[0].on_leg = dying(1)
        texts, others = await stream(fake)
        assert TEXT.startswith(texts[0]) and texts[0]
        assert others[-1] == "[DONE]" and len(others) == 2
        error = json.loads(others[0])["error"]
        assert error["code"] == "worker_failed"
        assert "127.0.0.1" not in error["message"] and "decode-0" not in error["message"]
        assert fake.metric("tandem_router_requests_total", outcome="worker_failed") == 1


async def test_the_deadline_holds_for_a_hanging_pair(cluster: MakeCluster) -> None:
    async with cluster(TEXT, request_timeout=0.3) as fake:
        fake.prefill[0].on_leg = fake.decode[0].on_leg = hanging()
        answer = await fake.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert 0 < fake.decode[0].legs[0].timeout <= 0.3
        await asyncio.gather(fake.prefill[0].all_left.wait(), fake.decode[0].all_left.wait())


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_deadline_holds_behind_a_failed_attempt(cluster: MakeCluster, streamed: bool) -> None:
    """It is an error to the client, not a complete answer without text."""

    async def fail_then_hang(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        act = failing(TransferFailed("the link broke")) if leg.attempt == 0 else hanging()
        async for item in act(worker, leg, context):
            yield item

    async with cluster(TEXT, request_timeout=0.6) as fake:
        fake.prefill[0].on_leg, fake.decode[0].on_leg = hanging(), fail_then_hang
        answer = await fake.complete(stream=streamed)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert [leg.attempt for leg in fake.decode[0].legs] == [0, 1]


async def test_a_worker_that_keeps_a_finished_leg_open_does_not_hold_the_answer(cluster: MakeCluster) -> None:
    async with cluster("a") as fake:
        length = len(script_ids(fake))
        fake.decode[0].on_leg = sending(*range(1, length), then_hang=True)
        async with asyncio.timeout(4):
            assert (await fake.complete()).json()["choices"][0]["text"] == "a"
        await fake.decode[0].all_left.wait()


# ---------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_cancels_both_legs(cluster: MakeCluster, phase: str, streaming: bool) -> None:
    async with cluster(TEXT) as fake:
        fake.prefill[0].on_leg = hanging() if phase == "prefill" else sending(0, then_hang=True)
        fake.decode[0].on_leg = hanging() if phase == "prefill" else sending(1, 2, then_hang=True)
        body = {"model": MODEL, "prompt": "hi", "stream": streaming, "max_tokens": 200}
        client = asyncio.create_task(fake.http.post("/v1/completions", json=body))
        await fake.until(lambda: fake.prefill[0].active == fake.decode[0].active == 1)
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        async with asyncio.timeout(1):
            await asyncio.gather(fake.prefill[0].all_left.wait(), fake.decode[0].all_left.wait())
        assert (fake.prefill[0].cancelled, fake.decode[0].cancelled) == (1, 1)
        await fake.until(lambda: fake.metric("tandem_router_client_disconnects_total") == 1)
        assert fake.metric("tandem_router_requests_in_flight") == 0
        assert [worker.legs for worker in fake.members.workers()] == [0, 0]


# ---------------------------------------------------------------------- missing workers


async def test_no_worker_is_503_with_retry_after(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        await fake.decode[0].die()
        await fake.until(lambda: not fake.members.workers("decode"))
        answer = await fake.complete(stream=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_overloaded")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_restarted_worker_serves_those_who_waited(cluster: MakeCluster) -> None:
    async with cluster(TEXT, worker_wait=5.0) as fake:
        await fake.decode[0].die()
        await fake.until(lambda: not fake.members.workers("decode"))
        waiting = asyncio.create_task(fake.complete(max_tokens=99))
        await fake.add(FakeWorker("decode-0", "decode", fake.prefill[0].script))
        assert (await waiting).json()["choices"][0]["text"] == TEXT


async def test_a_stream_survives_the_only_decode_worker(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        fake.decode[0].on_leg = dying(1, 2)
        running = asyncio.create_task(stream(fake))
        await fake.until(lambda: not fake.members.workers("decode"))
        successor = FakeWorker("decode-0", "decode", fake.prefill[0].script)
        await fake.add(successor)
        assert await running == ([TEXT], ["[DONE]"])
        had = successor.legs[0].output_ids
        assert had == script_ids(fake)[: len(had)] and 1 <= len(had) <= 3


async def test_without_prefill_workers_decode_workers_prefill_and_that_is_counted(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        await fake.prefill[0].die()
        await fake.until(lambda: not fake.members.workers("prefill"))
        assert await stream(fake) == ([TEXT], ["[DONE]"])
        assert fake.decode[0].legs[0].ticket == b""
        assert fake.metric("tandem_router_degraded_prefills_total") == 1


async def test_aggregated_serving_is_no_degradation(cluster: MakeCluster) -> None:
    async with cluster(TEXT, "other", pools=(0, 1)) as fake:
        assert (await fake.http.get("/readyz")).status_code == 200
        texts, _ = await stream(fake, choices=2)
        assert texts == [TEXT, "other"]
        assert fake.decode[0].legs[0].ticket == b""
        assert fake.metric("tandem_router_degraded_prefills_total") == 0


async def test_a_draining_worker_gets_nothing_new(cluster: MakeCluster) -> None:
    async with cluster("x", pools=(1, 2)) as fake:
        fake.decode[0].tell(state="draining")
        await fake.until(lambda: any(worker.state == "draining" for worker in fake.members.workers()))
        for _ in range(3):
            assert (await fake.complete()).status_code == 200
        assert fake.decode[0].legs == []


async def test_a_worker_that_refuses_for_lack_of_room_is_replaced(cluster: MakeCluster) -> None:
    async with cluster(TEXT, pools=(1, 2)) as fake:
        fake.decode[0].on_leg = failing(Overloaded("full", retry_after=7))
        assert await stream(fake) == ([TEXT], ["[DONE]"])
        fake.decode[1].on_leg = failing(Overloaded("full", retry_after=7))
        answer = await fake.complete()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


async def test_admission_overflow(cluster: MakeCluster) -> None:
    async with cluster("x", max_num_queued_reqs=2) as fake:
        fake.prefill[0].on_leg = fake.decode[0].on_leg = hanging()
        first = asyncio.create_task(fake.complete(n=2))
        await fake.until(lambda: fake.prefill[0].active == 1)
        refused = await fake.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(fake.prefill[0].legs) == 1  # the refused one never reached a worker
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await fake.prefill[0].all_left.wait()
        fake.prefill[0].on_leg = fake.decode[0].on_leg = None
        await fake.until(lambda: fake.metric("tandem_router_requests_in_flight") == 0)
        assert (await fake.complete()).status_code == 200


async def test_a_request_cancelled_while_its_leg_fails_is_not_tried_again() -> None:
    """Both in one turn of the event loop; asyncio's TaskGroup before Python 3.13 forgets the cancellation."""
    broken = asyncio.get_running_loop().create_future()

    async def leg() -> None:
        await broken

    request = asyncio.create_task(together(leg()))
    await asyncio.sleep(0.01)
    broken.set_exception(WorkerFailed("the worker died"))
    await asyncio.sleep(0)  # the leg has failed, and its group has not heard of it yet
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
