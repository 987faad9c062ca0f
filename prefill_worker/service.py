"""The prefill worker as a process sees it: loads the engine, serves Prefill, and opens links to decode workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import grpc

from tandem.common import convert, rpc
from tandem.common.errors import TandemError, TransferFailed
from tandem.common.handoff import Message, TicketGate, decode, encode
from tandem.common.hosted import OnProgress
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.service import WorkerServer, WorkerShell, describe, new_incarnation
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_watch import WatchHub
from tandem.engine.block_pool import BlockPool
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.heart import Heart
from tandem.kv_transfer.negotiation import NegotiatedSender
from tandem.kv_transfer.push import PushLink
from tandem.kv_transfer.registry import choose
from tandem.prefill_worker.worker import PrefillLimits, PrefillWorker

TRANSFER_TIMEOUT = 30.0  # seconds a frame may take


class PrefillServer(WorkerServer):
    def __init__(self, shell: WorkerShell, facts: Mapping[str, object], pool: BlockPool, heart: Heart) -> None:
        super().__init__(shell, facts)
        self.pool = pool  # for looking at, from other threads
        self._heart = heart

    @classmethod
    def start(cls, config: WorkerConfig, engine: EngineConfig, on_progress: OnProgress | None = None) -> PrefillServer:
        """Load the model, listen, register. Raises ConfigError or ModelError."""
        loaded = Engine.load(engine, on_progress)
        incarnation = new_incarnation()
        allowed, why = choose(config.kv_connector, loaded.device)
        pool = BlockPool(loaded.num_blocks, engine.block_size, engine.enable_prefix_caching)
        gate = TicketGate(config.cluster_key, "prefill", incarnation, loaded.layout.pairing)
        heart = Heart()
        connect = _Connector(config, allowed, incarnation, loaded, heart)
        limits = PrefillLimits(engine.max_num_batched_tokens, engine.max_num_seqs)
        worker = PrefillWorker(loaded, pool, gate, connect, limits)
        description = describe(config, incarnation, loaded.layout, loaded.max_model_len, engine.max_num_seqs)
        shell = WorkerShell(config, description, worker, WatchHub(description, worker.load, pool))
        connect.address = lambda: shell.address
        shell.start(lambda server, shell: services.add_PrefillWorkerServicer_to_server(_Prefill(shell, worker), server))
        heart.start(shell.healthy)
        return cls(shell, {**loaded.describe(), "connector": why}, pool, heart)

    def healthy(self) -> bool:
        return super().healthy() and self._heart.beating

    def stop(self) -> None:
        super().stop()
        self._heart.stop()


class _Prefill(services.PrefillWorkerServicer):
    def __init__(self, shell: WorkerShell, worker: PrefillWorker) -> None:
        self._shell, self._worker = shell, worker

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> AsyncIterator[pb.LegUpdate]:
        try:
            leg = convert.leg_from_proto(request.leg)
        except TandemError as exc:
            await rpc.abort(context, exc)
        address = request.decode_address
        async for update in self._shell.run_leg(
            leg, lambda leg_id, sink: self._worker.submit(leg_id, leg, address, sink), context
        ):
            yield update

    async def Quiet(self, request: pb.QuietRequest, context: Any) -> pb.QuietReply:
        try:
            quiet = await self._shell.ask(lambda: self._worker.quiet(request.decode_incarnation))
        except TandemError as exc:
            await rpc.abort(context, exc)
        return pb.QuietReply(incarnation=self._shell.description.incarnation, quiet=quiet)


class _Connector:
    """Opens links to decode workers; a link dials and sets its data path up on threads of its own."""

    def __init__(
        self, config: WorkerConfig, allowed: tuple[str, ...], incarnation: str, engine: Engine, heart: Heart
    ) -> None:
        self._config, self._allowed, self._incarnation = config, allowed, incarnation
        self._engine, self._heart = engine, heart
        self.address: Callable[[], str] = str  # this worker's, once it listens: where D can ask whether it lives

    def __call__(
        self, address: str, incarnation: str, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> PushLink:
        metadata = (("tandem-from", self._incarnation), ("tandem-to", incarnation), ("tandem-address", self.address()))
        channel = HandoffChannel(rpc.create_sync_channel(address, self._config.cluster_key), metadata)
        store = self._engine.store
        context = Context(channel, store.layout, self._engine.device, self._config.host, store.memory, store.fd)
        link = PushLink(context, NegotiatedSender(context, self._allowed), on_message, on_lost, TRANSFER_TIMEOUT)
        link.open()
        self._heart.add(link)
        return link


class HandoffChannel:
    """P's end of Handoff.Channel: a kv_transfer Channel over one gRPC stream."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._outgoing: queue.SimpleQueue[pb.Envelope | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        requests: Iterator[pb.Envelope] = iter(self._outgoing.get, None)
        self._call = services.HandoffStub(channel).Channel(requests, metadata=metadata)

    def send(self, message: Message) -> None:
        if self._closed.is_set():
            raise TransferFailed("the channel to the decode worker is closed")
        self._outgoing.put(pb.Envelope(message=encode(message)))

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        def read() -> None:
            reason = "the decode worker closed the channel"
            try:
                for envelope in self._call:
                    on_message(decode(envelope.message))
            except grpc.RpcError as exc:
                reason = rpc.to_error(exc).message
            except TransferFailed as exc:
                reason = exc.message
            self.close()
            on_close(reason)

        threading.Thread(target=read, name="handoff-channel", daemon=True).start()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._outgoing.put(None)
            self._call.cancel()
            self._channel.close()
