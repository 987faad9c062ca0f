"""Who takes part: the Watch streams decide, Redis only hints; and the choice that follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tandem.common import convert
from tandem.common.block_hash import BlockHash, block_hashes, chain_root
from tandem.common.handoff import Ticket
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.registry import RegistryUnavailable
from tandem.common.tokenizer import Tokenizer
from tandem.common.worker_info import Load, WorkerEvent
from tandem.router import membership
from tests.router.conftest import MakeCluster
from tests.router.fake_cluster import KEY, LAYOUT, FakeCluster, FakeWorker

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def hashes(prompt: list[int], salt: bytes = b"") -> tuple[BlockHash, ...]:
    return tuple(block_hashes(prompt, LAYOUT.block_size, chain_root(salt, LAYOUT.fingerprint)))


async def told(fake: FakeCluster, blocks: int) -> None:
    await fake.until(lambda: len(fake.members.index) == blocks)


async def test_the_longest_cached_prefix_decides_for_both_roles(cluster: MakeCluster) -> None:
    async with cluster("x", pools=(3, 2)) as fake:
        fake.prefill[1].tell(blocks=hashes(PROMPT)[:1])
        fake.prefill[2].tell(blocks=hashes(PROMPT))
        fake.decode[1].tell(blocks=hashes(PROMPT)[:1])
        await told(fake, 2)
        await fake.until(lambda: len(fake.members.index.match(hashes(PROMPT))) == 3)
        await fake.complete(prompt=PROMPT)
        assert [len(worker.legs) for worker in fake.prefill] == [0, 0, 1]
        assert [len(worker.legs) for worker in fake.decode] == [0, 1]
        await fake.complete(prompt=PROMPT, cache_salt="another tenant")  # whose cache is empty everywhere
        assert [len(worker.legs) for worker in fake.prefill] == [1, 0, 1]


async def test_evicted_blocks_and_dead_workers_are_forgotten(cluster: MakeCluster) -> None:
    async with cluster("x", pools=(2, 1)) as fake:
        fake.prefill[1].tell(blocks=hashes(PROMPT))
        await told(fake, 2)
        fake.prefill[1].tell(blocks=hashes(PROMPT)[:1])
        await told(fake, 1)
        await fake.prefill[1].die()
        await told(fake, 0)
        assert (await fake.complete(prompt=PROMPT)).status_code == 200


async def test_load_decides_between_equals(cluster: MakeCluster) -> None:
    async with cluster("x", pools=(2, 2)) as fake:
        fake.prefill[0].tell(load=Load(waiting=1, blocks_total=9, blocks_free=9))
        fake.decode[0].tell(load=Load(running=3, blocks_total=9, blocks_free=9))
        await fake.until(lambda: sum(w.load.running + w.load.waiting for w in fake.members.workers()) == 4)
        await fake.complete()
        assert [len(worker.legs) for worker in (*fake.prefill, *fake.decode)] == [0, 1, 0, 1]


async def test_own_legs_count_before_the_worker_reports_them(cluster: MakeCluster) -> None:
    """A burst between two Watch events is spread all the same."""
    async with cluster("x", pools=(2, 2)) as fake:

        async def hold(worker: FakeWorker, leg: Any, context: Any) -> AsyncIterator[pb.LegUpdate]:
            await full.wait()
            async for message in worker._prefill(leg) if worker.role == "prefill" else worker._decode(leg):
                yield message

        full = asyncio.Event()
        for worker in (*fake.prefill, *fake.decode):
            worker.on_leg = hold
        burst = [asyncio.create_task(fake.complete()) for _ in range(6)]
        await fake.until(lambda: sum(worker.active for worker in (*fake.prefill, *fake.decode)) == 12)
        full.set()
        assert [answer.status_code for answer in await asyncio.gather(*burst)] == [200] * 6
        assert [len(worker.legs) for worker in (*fake.prefill, *fake.decode)] == [3, 3, 3, 3]


async def test_a_minority_with_another_layout_takes_no_part(
    cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster("x", pools=(1, 2)) as fake:
        odd = FakeWorker("prefill-odd", "prefill", fake.prefill[0].script, layout=replace(LAYOUT, revision="other"))
        await fake.add(odd)
        await fake.until(lambda: len(fake.members.all_workers()) == 4)
        assert odd.name not in {worker.name for worker in fake.members.workers()}
        status = (await fake.http.get("/status")).json()
        assert [w["state"] for w in status["workers"]] == ["ready", "ready", "ready", "incompatible"]
        for _ in range(3):
            await fake.complete()
        assert odd.legs == []
    assert "prefill-odd" in caplog.text and "takes no part" in caplog.text


async def test_redis_down_changes_nothing_for_known_workers(
    cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster("x") as fake:
        fake.registry.error = RegistryUnavailable("down")
        await fake.until(lambda: not fake.members.registry_up)
        assert (await fake.complete()).status_code == 200
        assert fake.metric("tandem_router_registry_up") == 0
        fake.registry.error = None
        await fake.until(lambda: fake.members.registry_up)
    assert caplog.text.count("registry lost") == 1


async def test_whatever_the_registry_fails_with_it_is_asked_again(
    cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """What answers at Redis' address may be no Redis: one strange answer, and no worker was ever found again."""
    async with cluster("x") as fake:
        fake.registry.error = ValueError("no answer of Redis'")
        await fake.until(lambda: not fake.members.registry_up)
        fake.registry.error = None
        await fake.add(FakeWorker("decode-9", "decode", fake.prefill[0].script))
        await fake.until(lambda: len(fake.members.workers("decode")) == 2)
    assert caplog.text.count("registry lost") == 1


async def test_a_registry_that_never_answered_is_told(cluster: MakeCluster, caplog: pytest.LogCaptureFixture) -> None:
    fake = cluster("x", pools=(0, 0))
    fake.registry.error = RegistryUnavailable("nobody there")
    async with fake:
        await fake.until(lambda: "nobody there" in caplog.text)
        assert fake.metric("tandem_router_registry_up") == 0


async def test_two_incarnations_of_a_name_are_one_series(cluster: MakeCluster) -> None:
    """Prometheus refuses a page with the same series twice, and with it all the others."""
    async with cluster("x") as fake:
        loads = [Load(running=3, blocks_total=10, blocks_free=10), Load(running=2, blocks_total=30, blocks_free=10)]
        fake.decode[0].tell(load=loads[0])
        await fake.add(FakeWorker("decode-0", "decode", fake.prefill[0].script, load=loads[1]))
        await fake.until(lambda: {w.load for w in fake.members.workers("decode")} == set(loads))
        lines = (await fake.http.get("/metrics")).text.splitlines()
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    assert 'tandem_worker_running{role="decode",worker="decode-0"} 5.0' in lines
    assert 'tandem_worker_kv_usage_ratio{role="decode",worker="decode-0"} 0.5' in lines
    assert 'tandem_worker_blocks{role="decode",state="free",worker="decode-0"} 20.0' in lines


async def test_a_watch_that_skips_an_event_is_out_at_once_and_comes_back(cluster: MakeCluster) -> None:
    fake = cluster("x")
    worker = fake.decode[0]
    watch, skip, streams = worker.Watch, asyncio.Event(), 0

    async def skipping(request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerEvent]:
        nonlocal streams
        streams += 1
        async for event in watch(request, context):
            yield event
            if streams == 1:
                await skip.wait()
                yield convert.event_to_proto(WorkerEvent(2, "ready", Load()))  # event 1 is due

    worker.Watch = skipping  # type: ignore[method-assign]
    async with fake:
        joined = fake.members.workers("decode")
        skip.set()
        await fake.until(lambda: fake.members.workers("decode") not in ([], joined))
        assert streams == 2
        assert (await fake.complete()).status_code == 200


async def test_another_process_at_a_dead_workers_address_is_not_taken_for_it(cluster: MakeCluster) -> None:
    async with cluster("x", pools=(1, 2)) as fake:
        real = fake.decode[0].incarnation
        await fake.decode[0].die()
        await fake.until(lambda: len(fake.members.workers("decode")) == 1)
        impostor = FakeWorker("decode-9", "decode", fake.prefill[0].script)
        await impostor.start()
        fake.decode[0].address = impostor.address
        fake.registry.workers.append(impostor)
        await fake.until(lambda: impostor.incarnation in {w.incarnation for w in fake.members.workers()})
        assert real not in {worker.incarnation for worker in fake.members.all_workers()}


async def test_the_context_is_the_smallest_workers(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("x", pools=(1, 2)) as fake:
        small = FakeWorker("decode-small", "decode", fake.prefill[0].script, max_model_len=40)
        await fake.add(small)
        await fake.until(lambda: fake.members.max_model_len == 40)
        answer = await fake.complete(prompt=[5] * 41)
        assert "maximum context length is 40 tokens" in answer.json()["error"]["message"]
        await small.die()
        await fake.until(lambda: fake.members.max_model_len == 256)


async def test_workers_with_another_block_size_pair_and_match_by_their_own_hashes(cluster: MakeCluster) -> None:
    """What counts is how many tokens of the prompt a worker has, in whatever blocks."""
    async with cluster("x", pools=(1, 1)) as fake:
        script = fake.prefill[0].script
        wide = replace(LAYOUT, block_size=8)
        others = [FakeWorker(f"{role}-wide", role, script, layout=wide) for role in ("prefill", "decode")]
        for worker in others:
            await fake.add(worker)
        await fake.until(lambda: len(fake.members.workers()) == 4)
        chains = {
            layout: tuple(block_hashes(PROMPT, layout.block_size, chain_root(b"", layout.fingerprint)))
            for layout in (LAYOUT, wide)
        }
        fake.prefill[0].tell(blocks=chains[LAYOUT][:1])  # 4 tokens
        others[0].tell(blocks=chains[wide][:1])  # 8
        fake.decode[0].tell(blocks=chains[LAYOUT])  # 8
        others[1].tell(blocks=chains[LAYOUT])  # foreign hashes, worth nothing here or there
        await fake.until(lambda: len(fake.members.index) == 3)
        await fake.until(lambda: len(fake.members.index.match(chains[LAYOUT])) == 3)
        assert (await fake.complete(prompt=PROMPT)).status_code == 200
        assert [len(worker.legs) for worker in (fake.prefill[0], others[0], fake.decode[0])] == [0, 1, 1]
        ticket = Ticket.open(others[0].legs[0].ticket, KEY)
        assert ticket.pairing == LAYOUT.pairing == wide.pairing
    assert LAYOUT.fingerprint != wide.fingerprint


async def test_another_dtype_takes_no_part(cluster: MakeCluster, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster("x", pools=(1, 1)) as fake:
        odd = FakeWorker("decode-odd", "decode", fake.prefill[0].script, layout=replace(LAYOUT, dtype="bfloat16"))
        await fake.add(odd)
        await fake.until(lambda: len(fake.members.all_workers()) == 3)
        assert {worker.name for worker in fake.members.workers()} == {"prefill-0", "decode-0"}
    assert "decode-odd" in caplog.text and "dtype" in caplog.text


async def test_a_worker_that_registers_again_is_followed_while_its_last_legs_end(cluster: MakeCluster) -> None:
    """Its old connection stays open for a minute for the legs on it: no reason not to see that it is back."""
    async with cluster("long answer", pools=(1, 1)) as fake:
        worker, going_on = fake.decode[0], asyncio.Event()
        worker.pace = going_on.wait
        running = asyncio.create_task(fake.complete())
        await fake.until(lambda: worker.active == 1)
        fake.registry.workers.remove(worker)  # Redis forgot it …
        await fake.until(lambda: worker.incarnation not in fake.members.listed)
        worker.end_watch.set()  # … and its Watch stream breaks
        worker.tell()
        await fake.until(lambda: not fake.members.workers("decode"))
        fake.registry.workers.append(worker)
        await fake.until(lambda: bool(fake.members.workers("decode")))
        going_on.set()
        assert (await running).json()["choices"][0]["text"] == "long answer"


async def test_a_stopping_router_does_not_wait_for_last_legs(cluster: MakeCluster) -> None:
    async with cluster("x") as fake:
        fake.decode[0].pace = asyncio.Event().wait
        call = asyncio.create_task(fake.complete())
        await fake.until(lambda: fake.decode[0].active == 1)
        workers, fake.registry.workers = fake.registry.workers, []
        await fake.until(lambda: not fake.members.listed)
        fake.decode[0].end_watch.set()
        fake.decode[0].tell()
        await fake.until(lambda: not fake.members.workers("decode"))
        async with asyncio.timeout(5):
            await fake.members.stop()
        assert (await call).status_code >= 500
        fake.registry.workers = workers  # to be ended


async def test_a_stopping_router_does_not_wait_for_what_cannot_be_cancelled(
    cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(membership, "STOP_TIMEOUT", 0.05)
    async with cluster("x") as fake:
        inside, let_go = asyncio.Event(), asyncio.Event()

        async def stubborn() -> list[Any]:
            inside.set()
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            return []

        monkeypatch.setattr(fake.registry, "list", stubborn)
        await fake.until(inside.is_set)
        async with asyncio.timeout(5):
            await fake.members.stop()
        assert "not stopped within 0 s: membership" in caplog.text
        let_go.set()
