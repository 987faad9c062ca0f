"""The decode worker as a process sees it: loads the engine, serves Decode, and takes links from prefill workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc.aio

from tandem.common import convert, rpc
from tandem.common.errors import TandemError, TicketRefused, TransferFailed
from tandem.common.handoff import Frame, Message, TicketGate, decode, encode
from tandem.common.hosted import OnProgress
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.service import WorkerServer, WorkerShell, describe, new_incarnation
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_watch import WatchHub
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.undertaker import Answer, Peer, Undertaker
from tandem.decode_worker.worker import DecodeWorker
from tandem.engine.block_pool import BlockPool
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.heart import Heart
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.negotiation import NegotiatedReceiver
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.registry import choose

TRANSFER_TIMEOUT = 30.0  # seconds a frame may take
FRAMES_AHEAD = 4  # of a link, that wait for the worker's thread; during a long step the next ones wait on the wire


class DecodeServer(WorkerServer):
    def __init__(self, shell: WorkerShell, facts: Mapping[str, object], pool: BlockPool, heart: Heart) -> None:
        super().__init__(shell, facts)
        self.pool = pool  # for looking at, from other threads
        self._heart = heart

    @classmethod
    def start(cls, config: WorkerConfig, engine: EngineConfig, on_progress: OnProgress | None = None) -> DecodeServer:
        """Load the model, listen, register. Raises ConfigError or ModelError."""
        loaded = Engine.load(engine, on_progress)
        incarnation = new_incarnation()
        allowed, why = choose(config.kv_connector, loaded.device)
        pool = BlockPool(loaded.num_blocks, engine.block_size, engine.enable_prefix_caching)
        gate = TicketGate(config.cluster_key, "decode", incarnation, loaded.layout.pairing)
        limits = DecodeLimits(engine.max_num_batched_tokens, engine.max_num_seqs)
        worker = DecodeWorker(loaded, pool, gate, limits)
        description = describe(config, incarnation, loaded.layout, loaded.max_model_len, engine.max_num_seqs)
        shell = WorkerShell(config, description, worker, WatchHub(description, worker.load, pool))
        heart = Heart()
        handoff = _Handoff(shell, config, allowed, worker, loaded, heart)

        def add(server: grpc.aio.Server, shell: WorkerShell) -> None:
            services.add_DecodeWorkerServicer_to_server(_Decode(shell, worker), server)
            services.add_HandoffServicer_to_server(handoff, server)

        shell.start(add)
        heart.start(shell.healthy)
        return cls(shell, {**loaded.describe(), "connector": why}, pool, heart)

    def healthy(self) -> bool:
        return super().healthy() and self._heart.beating

    def stop(self) -> None:
        super().stop()
        self._heart.stop()


class _Decode(services.DecodeWorkerServicer):
    def __init__(self, shell: WorkerShell, worker: DecodeWorker) -> None:
        self._shell, self._worker = shell, worker

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> AsyncIterator[pb.LegUpdate]:
        try:
            leg = convert.leg_from_proto(request.leg)
        except TandemError as exc:
            await rpc.abort(context, exc)
        async for update in self._shell.run_leg(
            leg, lambda leg_id, sink: self._worker.submit(leg_id, leg, sink), context
        ):
            yield update


class _Handoff(services.HandoffServicer):
    """One link per prefill incarnation, for as long as P keeps its stream open."""

    def __init__(
        self,
        shell: WorkerShell,
        config: WorkerConfig,
        allowed: tuple[str, ...],
        worker: DecodeWorker,
        engine: Engine,
        heart: Heart,
    ) -> None:
        self._shell, self._config, self._allowed = shell, config, allowed
        self._worker, self._engine, self._heart = worker, engine, heart
        self._incarnation = shell.description.incarnation

    async def Channel(self, request_iterator: AsyncIterator[pb.Envelope], context: Any) -> AsyncIterator[pb.Envelope]:
        peer = await self._peer(context)
        channel = HandoffChannel(asyncio.get_running_loop())
        link = self._accept(channel)
        self._worker.inbox.put(lambda: self._worker.handoffs.attached(link, peer.incarnation))
        reader = asyncio.create_task(channel.read(request_iterator))
        try:
            async for envelope in channel.outgoing():
                yield envelope
        finally:
            reader.cancel()
            channel.peer_gone("the prefill worker closed the channel")
            link.close()
            self._watch(peer, link)

    def _watch(self, peer: Peer, link: LandLink) -> None:
        """Behind a broken link: end the quarantine of what it wrote to, when that is safe."""
        inbox, handoffs = self._worker.inbox, self._worker.handoffs
        inbox.put(lambda: handoffs.on_lost(link, "it ended"))  # whoever ended it may not have said so yet
        undertaker = Undertaker(
            lambda: self._shell.ask(lambda: handoffs.has_quarantined(link)),
            lambda: inbox.put(lambda: handoffs.is_quiet(link)),
            lambda address: ask_prefill_worker(address, self._config.cluster_key, self._incarnation),
        )
        self._shell.spawn(undertaker.follow(peer), f"undertaker-{peer.incarnation}")

    async def _peer(self, context: Any) -> Peer:
        metadata = dict(context.invocation_metadata())
        if metadata.get("tandem-to") != self._incarnation:
            await rpc.abort(context, TicketRefused("this address now belongs to another incarnation; try again"))
        return Peer(str(metadata.get("tandem-from", "")), str(metadata.get("tandem-address", "")))

    def _accept(self, channel: HandoffChannel) -> LandLink:
        inbox, handoffs = self._worker.inbox, self._worker.handoffs
        store = self._engine.store
        context = Context(channel, store.layout, self._engine.device, self._config.host, store.memory, store.fd)
        places = threading.Semaphore(FRAMES_AHEAD)

        def on_frame(frame: Frame, payload: Payload) -> None:
            while not places.acquire(timeout=1.0):
                if link.ended:
                    return
            inbox.put(lambda: take(frame, payload))

        def take(frame: Frame, payload: Payload) -> None:
            handoffs.on_frame(link, frame, payload)
            places.release()

        link = LandLink(
            context,
            NegotiatedReceiver(context, self._allowed),
            on_message=lambda message: inbox.put(lambda: handoffs.on_message(link, message)),
            on_frame=on_frame,
            on_lost=lambda reason: inbox.put(lambda: handoffs.on_lost(link, reason)),
            timeout=TRANSFER_TIMEOUT,
        )
        link.open()
        self._heart.add(link)
        return link


async def ask_prefill_worker(address: str, cluster_key: bytes, incarnation: str) -> Answer:
    """Who is there, and whether anything is in flight to the decode worker of that incarnation. Raises TandemError."""
    channel = rpc.create_channel(address, cluster_key)
    try:
        stub: Any = services.PrefillWorkerStub(channel)  # generated code without types
        reply = await stub.Quiet(pb.QuietRequest(decode_incarnation=incarnation))
        return Answer(reply.incarnation, reply.quiet)
    except grpc.aio.AioRpcError as exc:
        if exc.code() is grpc.StatusCode.UNIMPLEMENTED:  # it has the key, and is no prefill worker
            return Answer("", False)
        raise rpc.to_error(exc) from exc
    finally:
        await channel.close(None)


class HandoffChannel:
    """D's end of Handoff.Channel: a kv_transfer Channel over the stream of an asyncio handler."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[pb.Envelope | None] = asyncio.Queue()
        self._closed = False
        self._on_message: Callable[[Message], None] | None = None
        self._on_close: Callable[[str], None] | None = None

    def send(self, message: Message) -> None:
        if self._closed:
            raise TransferFailed("the channel to the prefill worker is closed")
        self._loop.call_soon_threadsafe(self._queue.put_nowait, pb.Envelope(message=encode(message)))

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        self._on_message, self._on_close = on_message, on_close

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def outgoing(self) -> AsyncIterator[pb.Envelope]:
        while (envelope := await self._queue.get()) is not None:
            yield envelope

    async def read(self, incoming: AsyncIterator[pb.Envelope]) -> None:
        """Deliver until the stream ends; runs on the event loop, where `_on_message` only queues."""
        reason = "the prefill worker closed the channel"
        try:
            async for envelope in incoming:
                if self._on_message is not None:
                    self._on_message(decode(envelope.message))
        except TransferFailed as exc:
            reason = exc.message
        except grpc.aio.AioRpcError as exc:
            reason = rpc.to_error(exc).message
        self.peer_gone(reason)

    def peer_gone(self, reason: str) -> None:
        self.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(reason)
