"""A decode or prefill worker dies in the middle of an answer: the client's stream goes on, token for token.

Real workers with the demo model; every way of sampling at once, so that a death hits them all together. The oracle is
the same cluster without the death.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, LegStats
from tandem.common.tokenizer import Tokenizer
from tandem.engine.config import EngineConfig
from tests.faults.clients import PLAIN
from tests.faults.local import DEMO_MODEL, cut, pace, worker_of
from tests.integration.local_cluster import LocalCluster
from tests.router.fake_cluster import FakeCluster, FakeWorker, Script, update

TOKENS = 40
PROMPT = "Once upon a time there was a prefill worker and a decode worker. "

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.6, "seed": 7},
    "seeded top": {"temperature": 1.8, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"temperature": 0, "repetition_penalty": 1.9},
    "frequency and presence": {"temperature": 1.4, "seed": 9, "frequency_penalty": 0.8, "presence_penalty": 0.5},
    "logit bias": {"temperature": 0, "logit_bias": {"1303": -100.0, "963": -100.0, "319": 5.0}},
    "min tokens": {"temperature": 0, "ignore_eos": False, "min_tokens": 30},
    "stop string": {"temperature": 0, "stop": ["before it runs the seq"]},
    "stop token ids": {"temperature": 2.0, "seed": 10, "stop_token_ids": list(range(260, 275)), "min_tokens": 12},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "three choices": {"temperature": 1.6, "seed": 11, "n": 3, "logprobs": 1},
}


@dataclass
class Choice:
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: str | None = None


OnToken = Callable[[int], Any]  # how many tokens of choice 0 the client has; may be awaited


async def ask(client: httpx.AsyncClient, fields: dict[str, Any], on_token: OnToken | None = None) -> list[Choice]:
    choices = [Choice() for _ in range(fields.get("n", 1))]
    body: dict[str, Any] = {
        "model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
        "return_token_ids": True, **fields,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            take(choices, event["choices"][0])
            if on_token is not None:
                await on_token(len(choices[0].token_ids))
    return choices


def take(choices: list[Choice], delta: dict[str, Any]) -> None:
    choice = choices[delta["index"]]
    assert choice.finish_reason is None, "something came behind the end"
    choice.token_ids += delta["token_ids"]
    choice.text += delta["text"]
    choice.finish_reason = delta["finish_reason"]
    if delta.get("logprobs"):
        choice.logprobs += delta["logprobs"]["token_logprobs"]


async def ask_all(cluster: LocalCluster, on_token: OnToken | None = None) -> dict[str, list[Choice]]:
    """Every case at once; `on_token` follows the greedy one."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60.0, verify=PLAIN) as client:
        callbacks = {"greedy": on_token}
        answers = await asyncio.gather(*(ask(client, case, callbacks.get(name)) for name, case in CASES.items()))
    return dict(zip(CASES, answers, strict=True))


def assert_same(answers: dict[str, list[Choice]], expected: dict[str, list[Choice]]) -> None:
    for name, choices in answers.items():
        for index, (got, wanted) in enumerate(zip(choices, expected[name], strict=True)):
            where = f"{name}, choice {index}"
            assert got.token_ids == wanted.token_ids, where
            assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason), where
            assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4), where


async def retries(cluster: LocalCluster) -> int:
    async with httpx.AsyncClient(base_url=cluster.url, verify=PLAIN) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("tandem_router_retries_total"))


class Fault:
    """`act` happens once, as soon as the client has `at` tokens."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.done = False
        self._at = at
        self._act = act

    async def __call__(self, tokens: int) -> None:
        if tokens >= self._at and not self.done:
            self.done = True
            await asyncio.to_thread(self._act)


# ---------------------------------------------------------------------- real workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    engine = EngineConfig(model=str(DEMO_MODEL), device="cpu", kv_cache_memory_bytes=16 << 20)
    with LocalCluster(engine, 2, 2) as running:
        yield running


@pytest.fixture(scope="module")
def expected(cluster: LocalCluster) -> dict[str, list[Choice]]:
    """Without a fault; each case must be worth comparing."""
    answers = asyncio.run(ask_all(cluster))
    greedy = answers["greedy"][0].token_ids
    assert len(greedy) == TOKENS and len({tuple(c.token_ids) for case in answers.values() for c in case}) >= 9
    assert [choice.finish_reason for choice in answers["stop string"]] == ["stop"]
    assert len(answers["stop string"][0].token_ids) > 20
    assert answers["stop token ids"][0].finish_reason == "stop"
    assert len(answers["logprobs"][0].logprobs) == TOKENS
    return answers


@pytest.fixture
def two_pairs(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """2P2D, whatever the test before did; steps take long enough that a death comes before the end."""
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        if name not in cluster.workers:
            role, index = name.split("-")
            cluster.add(role, int(index))  # type: ignore[arg-type]
    cluster.wait_ready()
    for name, server in cluster.workers.items():
        if name.startswith("decode"):
            pace(server, 0.005)
    yield cluster
    cluster.assert_at_rest()


def kill(cluster: LocalCluster, name: str, how: str) -> None:
    """ "stopped": the worker ends its legs with an error. "cut": its connections break and it says nothing."""
    server = cluster.workers.pop(name)
    if how == "cut":
        cut(server)
    server.stop()


@pytest.mark.parametrize("how", ["cut", "stopped"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 25])
async def test_a_dead_decode_worker_changes_no_token(
    two_pairs: LocalCluster, expected: dict[str, list[Choice]], tokens: int, how: str
) -> None:
    before = await retries(two_pairs)
    fault = Fault(tokens, lambda: kill(two_pairs, "decode-0", how))
    answers = await ask_all(two_pairs, fault)
    assert fault.done and await retries(two_pairs) > before, "nothing was moved: the worker died too late"
    assert_same(answers, expected)


async def test_two_deaths_in_a_row_change_no_token(two_pairs: LocalCluster, expected: dict[str, list[Choice]]) -> None:
    def first() -> None:
        kill(two_pairs, "decode-0", "cut")
        pace(two_pairs.add("decode", 2), 0.005)

    deaths = [Fault(3, first), Fault(18, lambda: kill(two_pairs, "decode-1", "cut"))]

    async def both(tokens: int) -> None:
        for death in deaths:
            await death(tokens)

    before = await retries(two_pairs)
    answers = await ask_all(two_pairs, both)
    kill(two_pairs, "decode-2", "stopped")
    assert all(death.done for death in deaths) and await retries(two_pairs) >= before + 2
    assert_same(answers, expected)


async def test_a_prefill_worker_dead_behind_token_1_changes_no_token(
    two_pairs: LocalCluster, expected: dict[str, list[Choice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hand-off is held before its manifest is verified, so D has nothing to go on with but a new attempt."""
    for name in ("decode-0", "decode-1"):
        handoffs = worker_of(two_pairs.workers[name]).handoffs
        monkeypatch.setattr(handoffs, "_on_manifest", lambda *_: None)

    def die() -> None:
        monkeypatch.undo()
        kill(two_pairs, "prefill-0", "cut")
        kill(two_pairs, "prefill-1", "cut")
        two_pairs.add("prefill", 0)

    before = await retries(two_pairs)
    fault = Fault(1, die)
    answers = await ask_all(two_pairs, fault)
    assert fault.done and await retries(two_pairs) > before
    assert_same(answers, expected)


async def test_attempts_are_bounded(cluster: LocalCluster) -> None:
    """With --migration-limit 1 a death is one error event, and the stream ends."""
    with LocalCluster(cluster.engine, 1, 1, ("--migration-limit", "1")) as single:
        pace(single.workers["decode-0"], 0.005)
        fault = Fault(3, lambda: kill(single, "decode-0", "cut"))
        async with httpx.AsyncClient(base_url=single.url, timeout=30.0, verify=PLAIN) as client:
            with pytest.raises(AssertionError, match="worker_failed"):
                await ask(client, CASES["greedy"], fault)
        assert await retries(single) == 0


# ---------------------------------------------------------------------- what comes too late (rule H7)


async def test_what_comes_behind_a_choices_end_is_dropped(tokenizer: Tokenizer, model_dir: Any) -> None:
    """The router ends a choice at a stop string its worker does not know; the worker goes on, and ends it again."""
    text = "one two three STOP four five six"
    ids = [*tokenizer.encode(text, False), tokenizer.eos_token_ids[0]]

    async def careless(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        yield update(*(worker.script.token(leg, 0, index) for index in range(1, len(ids))))
        yield update(worker.script.token(leg, 0, len(ids) - 1), stats=LegStats())

    async with FakeCluster(model_dir, Script([ids])) as fake:
        fake.decode[0].on_leg = careless
        answer = (await fake.complete(stop="STOP", max_tokens=100, return_token_ids=True)).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("one two three ", "stop")
        assert choice["token_ids"] == ids[: len(choice["token_ids"])] != ids
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
        assert "STOP" in tokenizer.decode(choice["token_ids"])
        assert fake.metric("tandem_router_choices_total", finish_reason="stop") == 1
        assert fake.metric("tandem_router_generation_tokens_total") == len(choice["token_ids"])
