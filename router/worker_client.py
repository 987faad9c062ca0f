"""The router's end of the internal plane: one connection to one worker process (common/proto/tandem.proto).

Every method ends with its stream: cancelled here, the call is cancelled at the worker before the method returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from tandem.common.convert import event_from_proto, leg_to_proto, stats_from_proto, token_from_proto
from tandem.common.errors import Cancelled, TandemError, WorkerFailed
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto.tandem_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub, WorkerStub
from tandem.common.request import Leg, LegUpdate
from tandem.common.rpc import create_channel, to_error
from tandem.common.worker_info import WorkerEvent

TakeUpdate = Callable[[LegUpdate], Awaitable[None]]
TakeEvent = Callable[[WorkerEvent], None]

DEADLINE_SLACK = 1.0  # seconds that a worker gets to report a missed deadline itself


class WorkerClient:
    def __init__(self, address: str, cluster_key: bytes) -> None:
        self.address = address
        self._channel = create_channel(address, cluster_key)
        # The stubs are generated code without types.
        self._worker: Any = WorkerStub(self._channel)
        self._prefill: Any = PrefillWorkerStub(self._channel)
        self._decode: Any = DecodeWorkerStub(self._channel)

    async def watch(self, take: TakeEvent) -> None:
        """Until the worker ends the stream. Raises TandemError when it breaks."""

        async def parse(message: pb.WorkerEvent) -> None:
            take(event_from_proto(message))

        await _consume(self._worker.Watch(pb.WatchRequest()), parse)

    async def prefill(self, leg: Leg, decode_address: str, take: TakeUpdate) -> None:
        """Run a leg on a prefill worker, which hands its KV to the decode worker. Raises TandemError."""
        request = pb.PrefillRequest(leg=leg_to_proto(leg), decode_address=decode_address)
        await _follow_leg(self._prefill.Prefill(request, timeout=leg.timeout + DEADLINE_SLACK), take)

    async def decode(self, leg: Leg, take: TakeUpdate) -> None:
        """Run a leg on a decode worker; without a ticket it prefills the prompt itself. Raises TandemError."""
        request = pb.DecodeRequest(leg=leg_to_proto(leg))
        await _follow_leg(self._decode.Decode(request, timeout=leg.timeout + DEADLINE_SLACK), take)

    async def close(self, grace: float | None = None) -> None:
        """Calls that still run get `grace` seconds."""
        await self._channel.close(grace)


async def _follow_leg(call: Any, take: TakeUpdate) -> None:
    async def parse(message: pb.LegUpdate) -> None:
        tokens = tuple(token_from_proto(token) for token in message.tokens)
        stats = stats_from_proto(message.stats) if message.HasField("stats") else None
        await take(LegUpdate(tokens, stats))

    await _consume(call, parse)


async def _consume(call: Any, parse: Callable[[Any], Awaitable[None]]) -> None:
    try:
        async for message in call:
            await parse(message)
    except grpc.RpcError as exc:
        raise _translate(to_error(exc)) from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled us, so gRPC cancelled the call: its channel was closed.
        raise WorkerFailed("connection to the worker was closed") from exc
    finally:
        call.cancel()


def _translate(error: TandemError) -> TandemError:
    """The router itself sees its own cancellations as CancelledError: any other is the worker giving up."""
    return WorkerFailed(f"worker gave the leg up: {error.message}") if isinstance(error, Cancelled) else error
