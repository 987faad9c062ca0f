"""Two models in one cluster, as while one replaces the other: no answer is a mixture, none is lost for nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tandem.common.request import Leg
from tandem.common.tokenizer import Tokenizer
from tests.router.conftest import MakeCluster
from tests.router.fake_cluster import LAYOUT, FakeCluster, FakeWorker, Script
from tests.router.test_failures import TEXT, hanging

OTHER_TEXT = "ZZZ and nothing else"


async def outvote(fake: FakeCluster, tokenizer: Tokenizer) -> list[FakeWorker]:
    """Workers of another model join and become the largest group."""
    script = Script([[*tokenizer.encode(OTHER_TEXT, False), tokenizer.eos_token_ids[0]]])
    layout = replace(LAYOUT, revision="another-model")
    roles = ("prefill", "decode", "decode", "decode")
    others = [FakeWorker(f"other-{i}", role, script, layout=layout) for i, role in enumerate(roles)]
    for worker in others:
        await fake.add(worker)
    await fake.until(lambda: {w.name for w in fake.members.workers()} == {w.name for w in others})
    return others


def legs_of(workers: list[FakeWorker]) -> list[Leg]:
    return [leg for worker in workers for leg in worker.legs]


async def begun(fake: FakeCluster) -> None:
    """The client has a token, and the first decode worker is the one that goes on."""
    await fake.until(lambda: fake.metric("tandem_router_generation_tokens_total") >= 1)
    await fake.until(lambda: fake.decode[0].active == 1)


async def test_a_request_with_output_goes_on_on_its_own_model_only(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    """It went on on whichever group was the largest by then: one model's answer, continued by another."""
    async with cluster(TEXT, pools=(1, 2)) as fake:
        fake.decode[0].pace = asyncio.Event().wait
        running = asyncio.create_task(fake.complete(max_tokens=200))
        await begun(fake)
        others = await outvote(fake, tokenizer)
        await fake.decode[0].die()
        answer = await running
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, TEXT)
        assert legs_of(others) == []
        assert fake.decode[1].legs[0].output_ids != ()
        assert fake.decode[1].legs[0].ticket != b"", "its own prefill worker took part, too"
        fresh = await fake.complete(max_tokens=200)
        assert fresh.json()["choices"][0]["text"] == OTHER_TEXT


async def test_without_a_worker_of_its_model_it_ends_in_an_error(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster(TEXT, recovery_wait=0.3) as fake:
        fake.decode[0].pace = asyncio.Event().wait
        running = asyncio.create_task(fake.complete(max_tokens=200))
        await begun(fake)
        others = await outvote(fake, tokenizer)
        await fake.decode[0].die()
        answer = await running
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_overloaded")
        assert legs_of(others) == []


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_without_output_may_go_anywhere(cluster: MakeCluster, tokenizer: Tokenizer, role: str) -> None:
    async with cluster(TEXT) as fake:
        fake.prefill[0].on_leg = fake.decode[0].on_leg = hanging()
        running = asyncio.create_task(fake.complete(max_tokens=200))
        await fake.until(lambda: fake.prefill[0].active == fake.decode[0].active == 1)
        await outvote(fake, tokenizer)
        await (fake.prefill[0] if role == "prefill" else fake.decode[0]).die()
        answer = await running
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, OTHER_TEXT)
