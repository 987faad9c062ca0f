"""Workers without engines that speak the real protocol on loopback, and a router in front of them.

What a fake worker "generates" is a script: the token ids of each choice. Faults are put into a worker by replacing
`on_leg`; everything else, gRPC included, is the router's real counterpart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from tandem.common import convert, rpc
from tandem.common.block_hash import BlockHash
from tandem.common.errors import Overloaded
from tandem.common.handoff import Ticket
from tandem.common.kv_layout import KVLayout
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.registry import Registration
from tandem.common.request import Leg, LegStats, Logprobs, Token
from tandem.common.worker_config import Role
from tandem.common.worker_info import Description, Load, WorkerEvent, WorkerState
from tandem.router.__main__ import listen
from tandem.router.app import Services, create_app
from tandem.router.http_protocol import bounded_protocol
from tandem.router.settings import RouterSettings

KEY = b"k" * 32
LAYOUT = KVLayout("fake", "float32", block_size=4, layers=1, kv_heads=1, head_dim=1)
MODEL = "tiny"


class Script:
    """What the model says: one list of token ids per choice; behind its end, `filler` for ever."""

    def __init__(self, choices: Sequence[Sequence[int]], filler: int = 40) -> None:
        self.choices = [list(choice) for choice in choices]
        self.filler = filler

    def token(self, leg: Leg, choice: int, index: int) -> Token:
        ids = self.choices[choice % len(self.choices)]
        token_id = ids[index] if index < len(ids) else self.filler
        reason = leg.sampling.finish_reason(index + 1, token_id)
        logprobs = None
        if leg.sampling.logprobs is not None:
            ranked = ((token_id, -0.5), (self.filler, -1.5), (self.filler + 1, float("-inf")))
            logprobs = Logprobs(-0.5, ranked[: leg.sampling.logprobs])
        return Token(choice, index, token_id, reason, logprobs)


def update(*tokens: Token, stats: LegStats | None = None) -> pb.LegUpdate:
    return pb.LegUpdate(
        tokens=[convert.token_to_proto(token) for token in tokens],
        stats=convert.stats_to_proto(stats) if stats else None,
    )


OnLeg = Callable[["FakeWorker", Leg, Any], AsyncIterator[pb.LegUpdate]]


@dataclass
class FakeWorker(services.WorkerServicer, services.PrefillWorkerServicer, services.DecodeWorkerServicer):
    name: str
    role: Role
    script: Script
    layout: KVLayout = LAYOUT
    max_model_len: int = 256
    max_num_seqs: int = 8
    cached_tokens: int = 0
    load: Load = field(default_factory=lambda: Load(blocks_total=64, blocks_free=64))
    state: WorkerState = "ready"
    blocks: tuple[BlockHash, ...] = ()
    pace: Callable[[], Awaitable[object]] | None = None  # awaited before each decoded token
    on_leg: OnLeg | None = None  # instead of generating
    legs: list[Leg] = field(default_factory=list)
    cancelled: int = 0
    active: int = 0

    def __post_init__(self) -> None:
        self.incarnation = secrets.token_hex(8)
        self.changed = asyncio.Event()
        self.end_watch = asyncio.Event()  # the stream ends at the next change
        self.all_left = asyncio.Event()

    async def start(self) -> None:
        self.server = rpc.create_server()
        services.add_WorkerServicer_to_server(self, self.server)
        services.add_PrefillWorkerServicer_to_server(self, self.server)
        services.add_DecodeWorkerServicer_to_server(self, self.server)
        self.port = rpc.bind(self.server, "127.0.0.1", 0, KEY)
        self.address = rpc.format_address("127.0.0.1", self.port)
        await self.server.start()

    async def die(self) -> None:
        """As the process's end looks from outside: every stream breaks, the port is closed."""
        await self.server.stop(None)

    @property
    def registration(self) -> Registration:
        return Registration(self.name, self.role, self.incarnation, self.address, os.getpid(), self.state)

    @property
    def description(self) -> Description:
        return Description(
            self.name, self.role, self.incarnation, self.layout.revision, self.layout.fingerprint,
            self.layout.pairing, self.layout.block_size, self.max_model_len, self.max_num_seqs, os.getpid(),
        )  # fmt: skip

    def tell(self, **changes: Any) -> None:
        """Send a Watch event with these fields changed."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.changed.set()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerEvent]:
        sequence, stored = 0, self.blocks
        yield convert.event_to_proto(WorkerEvent(0, self.state, self.load, self.description, stored))
        self.end_watch.clear()
        while True:
            await self.changed.wait()
            self.changed.clear()
            if self.end_watch.is_set():
                return
            sequence += 1
            new = tuple(block for block in self.blocks if block not in stored)
            gone = tuple(block for block in stored if block not in self.blocks)
            stored = self.blocks
            yield convert.event_to_proto(WorkerEvent(sequence, self.state, self.load, None, new, gone))

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> AsyncIterator[pb.LegUpdate]:
        with self._leg(request.leg) as leg:
            async for message in self._on_leg(leg, context, self._prefill):
                yield message

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> AsyncIterator[pb.LegUpdate]:
        with self._leg(request.leg) as leg:
            async for message in self._on_leg(leg, context, self._decode):
                yield message

    @contextlib.contextmanager
    def _leg(self, message: pb.Leg) -> Generator[Leg]:
        leg = convert.leg_from_proto(message)
        self.legs.append(leg)
        self.active += 1
        self.all_left.clear()
        try:
            yield leg
        except BaseException:
            self.cancelled += 1
            raise
        finally:
            self.active -= 1
            if not self.active:
                self.all_left.set()

    async def _on_leg(self, leg: Leg, context: Any, normal: Any) -> AsyncIterator[pb.LegUpdate]:
        if self.state == "draining":
            await rpc.abort(context, Overloaded("draining"))
        async for message in self.on_leg(self, leg, context) if self.on_leg else normal(leg):
            yield message

    async def _prefill(self, leg: Leg) -> AsyncIterator[pb.LegUpdate]:
        ticket = Ticket.open(leg.ticket, KEY)
        assert ticket.prefill_incarnation == self.incarnation
        yield update(*(self.script.token(leg, choice, len(leg.output_ids)) for choice in leg.choices))
        yield update(stats=LegStats(cached_tokens=self.cached_tokens))

    async def _decode(self, leg: Leg) -> AsyncIterator[pb.LegUpdate]:
        first = len(leg.output_ids)
        ended: set[int] = set()
        if leg.ticket:
            assert Ticket.open(leg.ticket, KEY).decode_incarnation == self.incarnation
            ended = {c for c in leg.choices if self.script.token(leg, c, first).finish_reason}
            first += 1
        for index in range(first, leg.sampling.max_tokens):
            going_on = [choice for choice in leg.choices if choice not in ended]
            if not going_on:
                break
            if self.pace:
                await self.pace()
            tokens = [self.script.token(leg, choice, index) for choice in going_on]
            ended |= {token.choice for token in tokens if token.finish_reason}
            yield update(*tokens)
        yield update(stats=LegStats(cached_tokens=self.cached_tokens))


class FakeRegistry:
    """Discovery without Redis."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.error: Exception | None = None

    async def list(self) -> list[Registration]:
        if self.error:
            raise self.error
        return [worker.registration for worker in self.workers]

    async def close(self) -> None:
        pass


class _Server(uvicorn.Server):
    """Leaves the test process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class FakeCluster:
    """Use as a context manager; `prefill` and `decode` are its workers, `url` its router."""

    def __init__(self, model_dir: Path, script: Script, pools: tuple[int, int] = (1, 1), **settings: Any) -> None:
        self.registry = FakeRegistry()
        self.prefill = [FakeWorker(f"prefill-{i}", "prefill", script) for i in range(pools[0])]
        self.decode = [FakeWorker(f"decode-{i}", "decode", script) for i in range(pools[1])]
        defaults = RouterSettings(
            model_dir=str(model_dir), redis_url="", cluster_key=KEY, served_model_names=(MODEL,), port=0,
            prefill_expected=pools[0], worker_wait=0.2, recovery_wait=5.0,
        )  # fmt: skip
        self.settings = replace(defaults, **settings)

    async def __aenter__(self) -> FakeCluster:
        for worker in (*self.prefill, *self.decode):
            await self.add(worker)
        self.services = Services.create(self.settings, self.registry)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(self.services), http=bounded_protocol(self.settings.send_timeout), log_config=None,
            lifespan="on", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self.server = _Server(config)
        self._serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        no_certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading the usual ones takes 0.1 s
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20, verify=no_certificates)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, http_client=self.http
        )
        await self.until(lambda: len(self.members.all_workers()) == len(self.registry.workers))
        await self.until(lambda: self.server.started)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        self.server.should_exit = True
        await self._serving
        for worker in self.registry.workers:
            await worker.die()

    @property
    def members(self) -> Any:
        return self.services.membership

    async def add(self, worker: FakeWorker) -> None:
        await worker.start()
        self.registry.workers.append(worker)

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})

    def metric(self, name: str, **labels: str) -> float:
        return self.services.metrics.registry.get_sample_value(name, labels) or 0.0
