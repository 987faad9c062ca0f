"""P workers and D workers in one process, driven step by step from the test's own thread; links are the real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tandem.common.handoff import Message, Ticket, TicketGate, new_transfer_id
from tandem.common.request import Leg
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.worker import DecodeWorker
from tandem.engine.block_pool import BlockPool
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import InprocChannel, channel_pair
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.negotiation import NegotiatedReceiver, NegotiatedSender
from tandem.kv_transfer.push import PushLink
from tandem.prefill_worker.worker import PrefillLimits, PrefillWorker
from tests.fakes import Client, FakeEngine, make_leg
from tests.faults.faulty import Fault, FaultySender

KEY = b"k" * 32
CPU = torch.device("cpu")
PATIENCE = 10.0  # seconds that workers get to reach what a test waits for


@dataclass(eq=False)
class Decode:
    incarnation: str
    engine: FakeEngine
    pool: BlockPool
    worker: DecodeWorker
    links: list[LandLink] = field(default_factory=list[LandLink])


@dataclass(eq=False)
class Prefill:
    incarnation: str
    engine: FakeEngine
    pool: BlockPool
    worker: PrefillWorker
    links: list[PushLink] = field(default_factory=list[PushLink])


class Pair:
    """1P1D and the router's part of a request: minting tickets, opening both legs."""

    def __init__(
        self,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        prefill_limits: PrefillLimits | None = None,
        decode_limits: DecodeLimits | None = None,
        connector: str = "inproc",
        block_sizes: tuple[int, int] = (4, 4),  # of P and of D
    ) -> None:
        self._connector = connector
        self.senders: list[FaultySender] = []  # of each link
        self.fault: Fault = lambda frame, payload: None  # for links opened from now on
        self.hold: threading.Event | None = None  # likewise
        self.d = self._decode(FakeEngine(decode_blocks, block_sizes[1]), decode_limits or DecodeLimits())
        self.p = self._prefill(FakeEngine(prefill_blocks, block_sizes[0]), prefill_limits or PrefillLimits())
        self._legs = 0
        self.channels: list[InprocChannel] = []

    def _decode(self, engine: FakeEngine, limits: DecodeLimits) -> Decode:
        pool = BlockPool(engine.num_blocks, engine.layout.block_size)
        gate = TicketGate(KEY, "decode", "d-1", engine.layout.pairing)
        return Decode("d-1", engine, pool, DecodeWorker(engine, pool, gate, limits))  # pyright: ignore[reportArgumentType]

    def _prefill(self, engine: FakeEngine, limits: PrefillLimits) -> Prefill:
        pool = BlockPool(engine.num_blocks, engine.layout.block_size)
        gate = TicketGate(KEY, "prefill", "p-1", engine.layout.pairing)
        worker = PrefillWorker(engine, pool, gate, self._connect, limits)  # pyright: ignore[reportArgumentType]
        return Prefill("p-1", engine, pool, worker)

    def _connect(
        self, address: str, incarnation: str, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> PushLink:
        left, right = channel_pair()
        self.channels.append(left)
        inbox, handoffs = self.d.worker.inbox, self.d.worker.handoffs
        here, there = _context(left, self.p.engine), _context(right, self.d.engine)
        land = LandLink(
            there,
            NegotiatedReceiver(there, [self._connector]),
            on_message=lambda message: inbox.put(lambda: handoffs.on_message(land, message)),
            on_frame=lambda frame, payload: inbox.put(lambda: handoffs.on_frame(land, frame, payload)),
            on_lost=lambda reason: inbox.put(lambda: handoffs.on_lost(land, reason)),
            timeout=5.0,
        )
        inbox.put(lambda: handoffs.attached(land, self.p.incarnation))
        sender = FaultySender(NegotiatedSender(here, [self._connector]), self.fault, self.hold)
        push = PushLink(here, sender, on_message, on_lost, 5.0)
        self.senders.append(sender)
        land.open()
        push.open()
        self.d.links.append(land)
        self.p.links.append(push)
        return push

    # ------------------------------------------------------------------ the router's part

    def ticket(self, request_id: str, timeout: float = 30.0, **changes: object) -> bytes:
        fields: dict[str, object] = dict(
            request_id=request_id, attempt=1, transfer_id=new_transfer_id(), prefill="prefill-0",
            prefill_incarnation="p-1", decode="decode-0", decode_incarnation="d-1",
            pairing=self.p.engine.layout.pairing, timeout=timeout,
        )  # fmt: skip
        return Ticket(**(fields | changes)).seal(KEY)  # pyright: ignore[reportArgumentType]

    def request(self, request_id: str, prompt: Sequence[int], max_tokens: int = 8, **changes: object) -> Call:
        leg = make_leg(request_id, prompt, max_tokens, ticket=self.ticket(request_id), **changes)
        call = Call(self, leg, self._next_leg(), self._next_leg())
        self.d.worker.submit(call.decode_leg, leg, call.decode)
        self.p.worker.submit(call.prefill_leg, leg, "d", call.prefill)
        return call

    def local(self, request_id: str, prompt: Sequence[int], max_tokens: int = 8, **changes: object) -> Call:
        leg = make_leg(request_id, prompt, max_tokens, **changes)
        call = Call(self, leg, 0, self._next_leg())
        self.d.worker.submit(call.decode_leg, leg, call.decode)
        return call

    def _next_leg(self) -> int:
        self._legs += 1
        return self._legs

    # ------------------------------------------------------------------ driving

    def turn(self) -> None:
        """One turn of both loops; waits briefly for links' threads only when nothing else is to be done."""
        busy = False
        for worker in (self.p.worker, self.d.worker):
            ran = worker.inbox.run_pending()
            busy = worker.step() or ran or busy
            self.check()
        if not busy:
            self.d.worker.inbox.run_pending(0.002)

    def turn_decode(self) -> None:
        """A turn of D alone: P stands still."""
        self.d.worker.inbox.run_pending(0.002)
        self.d.worker.step()
        self.check()

    def turn_prefill(self) -> None:
        """A turn of P alone: D stands still."""
        self.p.worker.inbox.run_pending(0.002)
        self.p.worker.step()
        self.check()

    def until(
        self, condition: Callable[[], bool], seconds: float | None = None, turn: Callable[[], None] | None = None
    ) -> None:
        deadline = time.monotonic() + (seconds or PATIENCE)
        while not condition():
            assert time.monotonic() < deadline, "the workers did not get there in time"
            (turn or self.turn)()

    def check(self) -> None:
        for side in (self.p, self.d):
            counts = side.pool.counts()
            total = counts.free + counts.cached + counts.owned + counts.reserved + counts.quarantined
            assert total == side.pool.num_blocks

    def at_rest(self) -> bool:
        return self.p.worker.idle and self.d.worker.idle

    def assert_conserved(self) -> None:
        self.until(lambda: self.at_rest() and self.d.pool.counts().quarantined == 0)
        for side in (self.p, self.d):
            side.pool.check_integrity()
            assert side.pool.counts().at_rest, side.pool.counts()

    def close(self) -> None:
        self.p.worker.close()
        self.d.worker.close()
        for link in (*self.p.links, *self.d.links):
            link.close()
            assert link.join(5.0)


def _context(channel: InprocChannel, engine: FakeEngine) -> Context:
    return Context(channel, engine.layout, CPU, memory=engine.store.memory, fd=engine.store.fd)


class Call:
    """Both legs of one request, as the router would see them."""

    def __init__(self, pair: Pair, leg: Leg, prefill_leg: int, decode_leg: int) -> None:
        self.leg, self.prefill_leg, self.decode_leg = leg, prefill_leg, decode_leg
        self.prefill, self.decode = Client(), Client()
        self._pair = pair

    @property
    def ended(self) -> bool:
        return self.decode.ended and (self.prefill.ended or not self.leg.ticket)

    @property
    def error(self) -> Exception | None:
        return self.prefill.error or self.decode.error

    def output(self, choice: int = 0) -> list[int]:
        return self.prefill.tokens.get(choice, []) + self.decode.tokens.get(choice, [])

    def cancel(self) -> None:
        self._pair.p.worker.cancel(self.prefill_leg)
        self._pair.d.worker.cancel(self.decode_leg)
