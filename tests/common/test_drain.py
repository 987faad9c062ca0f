"""A drained worker is done when its updates have been taken, not when it has computed them (rule H11)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tandem.common import convert
from tandem.common.errors import TandemError, WorkerFailed
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.request import Leg, LegStats, LegUpdate, SamplingParams, Token
from tandem.common.rpc import create_channel, to_error
from tandem.common.service import WorkerShell
from tandem.common.worker_loop import Sink
from tests.common.test_service import make_shell
from tests.worker_pair import KEY, Pair

TOKENS = 20_000  # more than a connection takes whose other end does not read


class Decode(services.DecodeWorkerServicer):
    def __init__(self, shell: WorkerShell) -> None:
        self._shell = shell

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> AsyncIterator[pb.LegUpdate]:
        async for update in self._shell.run_leg(convert.leg_from_proto(request.leg), send_all, context):
            yield update


def send_all(leg_id: int, sink: Sink) -> None:
    """As a worker whose client reads slowly: everything is computed, little of it has been sent."""
    for index in range(TOKENS):
        sink(LegUpdate((Token(0, index, 1),)))
    sink(LegUpdate((), LegStats()))


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    shell = make_shell(Pair(), f"unix://{tmp_path}/none.sock")
    shell.start(lambda server, shell: services.add_DecodeWorkerServicer_to_server(Decode(shell), server))
    yield shell
    shell.stop()


def request() -> pb.DecodeRequest:
    return pb.DecodeRequest(leg=convert.leg_to_proto(Leg("r", 0, (1,), SamplingParams(TOKENS))))


async def test_a_drain_waits_for_a_client_that_reads_slowly(shell: WorkerShell) -> None:
    async with create_channel(shell.address, KEY) as channel:
        call: Any = services.DecodeWorkerStub(channel).Decode(request(), timeout=30)
        updates = aiter(call)
        received = len((await anext(updates)).tokens)
        draining = asyncio.create_task(asyncio.to_thread(shell.drain, 30.0))
        while shell._hub.state != "draining":
            await asyncio.sleep(0.01)  # bounded by the test's own timer
        for _ in range(3):  # the worker's thread has looked whether it is done
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(shell.ask(lambda: None), shell._loop))
        assert not shell._drained.is_set(), "drained, with tokens on their way"
        async for update in updates:
            received += len(update.tokens)
        assert received == TOKENS
        assert await draining is True


async def test_a_draining_worker_refuses_as_one_that_is_gone(shell: WorkerShell) -> None:
    """Not as a full one: the router may try again elsewhere as often as it takes."""
    assert await asyncio.to_thread(shell.drain, 30.0)
    async with create_channel(shell.address, KEY) as channel:
        call: Any = services.DecodeWorkerStub(channel).Decode(request(), timeout=30)
        with pytest.raises(Exception) as caught:
            await call.read()
    error: TandemError = to_error(caught.value)  # pyright: ignore[reportArgumentType]
    assert isinstance(error, WorkerFailed) and "draining" in error.message
