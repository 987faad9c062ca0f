"""The receiving end of the hand-off: from a ticket to a verified sequence in the running batch.

Fails closed: a sequence starts only behind a manifest that agrees with every byte that landed (rule H4). Blocks of
a reservation that fails leave it in `_fail`, nowhere else: to the pool, or to quarantine while P may still write.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tandem.common.errors import DeadlineExceeded, TandemError, TransferFailed
from tandem.common.failpoints import failpoint
from tandem.common.handoff import (
    Abort,
    Ack,
    Frame,
    Grant,
    Heartbeat,
    Manifest,
    Message,
    Refuse,
    Released,
    Reserve,
    TicketGate,
)
from tandem.common.request import Leg, LegUpdate
from tandem.common.worker_loop import Sink
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Phase, Quarantined, Reservation
from tandem.engine.allocation import blocks_for
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.base import BlockStore
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.landing import Landing
from tandem.kv_transfer.payload import Payload


class RunningBatch(Protocol):
    """Where landed sequences go on: the decode worker."""

    @property
    def vocab_size(self) -> int: ...

    def room_for(self, num_blocks: int, landing: int) -> bool:
        """Whether a reservation may take so many blocks, with `landing` others in progress."""
        ...

    def run_landed(self, reservation: Reservation, first_tokens: tuple[int, ...]) -> None:
        """The KV is verified and owned; one first token for each choice."""
        ...


@dataclass(frozen=True, slots=True)
class Early:
    """A Reserve that overtook its Decode call."""

    link: LandLink
    message: Reserve
    expiry: float  # monotonic seconds


class Handoffs:
    """All reservations of one decode worker. Used by the worker's thread only."""

    def __init__(
        self, batch: RunningBatch, pool: BlockPool, store: BlockStore, gate: TicketGate, limits: DecodeLimits
    ) -> None:
        self._batch, self._pool, self._store, self._gate, self._limits = batch, pool, store, gate, limits
        self._reservations: dict[bytes, Reservation] = {}  # by transfer id, in order of arrival
        self._early: dict[bytes, Early] = {}
        self._quarantine: dict[bytes, Quarantined] = {}  # by transfer id
        self._generations = itertools.count(1)
        self._links: dict[str, LandLink] = {}  # the latest of each P, by its incarnation

    @property
    def count(self) -> int:
        return len(self._reservations)

    @property
    def queued_tokens(self) -> int:
        """Of prompts whose KV has not landed."""
        return sum(len(reservation.sequence.token_ids) for reservation in self._reservations.values())

    @property
    def idle(self) -> bool:
        return not self._reservations and not self._early

    # ------------------------------------------------------------------ from the router

    def expect(self, leg_id: int, leg: Leg, sequence: Sequence, sink: Sink) -> None:
        """A leg whose KV a prefill worker will push. Raises TicketRefused."""
        ticket = self._gate.admit(leg.ticket)
        reservation = Reservation(leg_id, sequence, ticket, sink, sequence.arrival + leg.timeout)
        self._reservations[ticket.transfer_id] = reservation
        failpoint("decode.expected")
        early = self._early.pop(ticket.transfer_id, None)
        if early is not None:
            self._on_reserve(early.link, early.message)

    def cancel(self, leg_id: int, error: TandemError) -> None:
        for reservation in [r for r in self._reservations.values() if r.leg_id == leg_id]:
            self._fail(reservation, error)

    # ------------------------------------------------------------------ from P

    def on_message(self, link: LandLink, message: Message) -> None:
        match message:
            case Reserve():
                self._on_reserve(link, message)
            case Heartbeat():
                self._on_heartbeat(link, message)
            case Released():
                self._on_released(link, message)
            case _:
                self._on_transfer_message(link, message)

    def _on_transfer_message(self, link: LandLink, message: Message) -> None:
        reservation = self._current(link, message)
        if reservation is None:
            if isinstance(message, Abort):
                self._early.pop(message.transfer_id, None)
            return  # of an attempt that ended here; P has been told
        match message:
            case Manifest():
                failpoint("decode.manifest")
                self._on_manifest(reservation, message)
            case Abort():
                self._fail(reservation, TransferFailed(f"the prefill worker aborted: {message.reason}"), tell=False)
            case _:
                self._fail(reservation, TransferFailed(f"unexpected {type(message).__name__} from the prefill worker"))

    def _on_heartbeat(self, link: LandLink, message: Heartbeat) -> None:
        """P still works on these: queued, computing or sending, its loop goes round."""
        until = time.monotonic() + self._limits.lease
        for transfer_id in message.transfers:
            reservation = self._reservations.get(transfer_id)
            if reservation is not None and reservation.link is link and reservation.phase is Phase.LANDING:
                reservation.lease = until

    def on_frame(self, link: LandLink, frame: Frame, payload: Payload) -> None:
        """Frames of no current reservation are dropped (rule H2); the others land within their grant (rule H1)."""
        reservation = self._current(link, frame)
        if reservation is None or reservation.landing is None:
            return
        try:
            blocks = reservation.landing.accept(frame)
        except TransferFailed as exc:
            self._fail(reservation, exc)
            return
        if not link.one_sided:
            self._store.write(blocks, payload.tensor(), frame.first_layer, frame.num_layers)
        reservation.lease = time.monotonic() + self._limits.lease
        failpoint("decode.landed")

    def on_lost(self, link: LandLink, reason: str) -> None:
        self._early = {key: early for key, early in self._early.items() if early.link is not link}
        for reservation in [r for r in self._reservations.values() if r.link is link]:
            error = TransferFailed(f"the link to prefill worker {reservation.ticket.prefill} broke: {reason}")
            self._fail(reservation, error, tell=False)

    # ------------------------------------------------------------------ quarantine (rule H3)

    def attached(self, link: LandLink, peer: str) -> None:
        """P opens a link only when nothing of its former one is in flight: that is over, whether we know it or not."""
        former = self._links.get(peer)
        if former is not None:
            former.close()
            self.on_lost(former, "the prefill worker opened another one")
            self.is_quiet(former)
        kept = {key: latest for key, latest in self._links.items() if not latest.ended or self.has_quarantined(latest)}
        self._links = kept | {peer: link}

    def is_quiet(self, link: LandLink) -> None:
        """Nothing that P sent over `link`, which has ended, is in flight any more."""
        self._release_quarantined(lambda item: item.link is link)

    def has_quarantined(self, link: LandLink) -> bool:
        return any(item.link is link for item in self._quarantine.values())

    def _on_released(self, link: LandLink, message: Released) -> None:
        """Generation 0: P gave up while the grant was on its way, so it has written nothing."""
        item = self._quarantine.get(message.transfer_id)
        if item is not None and item.link is link and message.generation in (0, item.generation):
            self._release_quarantined(lambda other: other is item)

    def _release_quarantined(self, over: Callable[[Quarantined], bool]) -> None:
        for transfer_id, item in [pair for pair in self._quarantine.items() if over(pair[1])]:
            del self._quarantine[transfer_id]
            self._give_back(item.blocks)

    def _give_back(self, reserved: list[int]) -> None:
        """What landed was never verified: it might be anything, a NaN too, and must not outlive the reservation."""
        self._store.zero(reserved)
        self._pool.unreserve(reserved)

    # ------------------------------------------------------------------ reserve

    def _current(self, link: LandLink, message: Message) -> Reservation | None:
        """The reservation a message is about, if the message is of its present link and generation (rule H6)."""
        reservation = self._reservations.get(getattr(message, "transfer_id", b""))
        if reservation is None or reservation.link is not link:
            return None
        generation = getattr(message, "generation", 0)
        if generation == 0:  # before the grant: only an Abort can be meant
            return reservation if isinstance(message, Abort) else None
        return reservation if generation == reservation.generation else None

    def _on_reserve(self, link: LandLink, message: Reserve) -> None:
        failpoint("decode.reserve")
        if link.ended:
            return  # nothing of it may begin behind its end, which was the last that we hear of it
        try:
            ticket = self._gate.verify(message.ticket)
            if ticket.transfer_id != message.transfer_id:
                raise TransferFailed("the Reserve names another transfer than its ticket")
        except TandemError as exc:
            link.post(Refuse(message.transfer_id, False, exc.message))
            return
        now = time.monotonic()
        reservation = self._reservations.get(ticket.transfer_id)
        if reservation is None:
            self._early[ticket.transfer_id] = Early(link, message, now + self._limits.park)
        elif reservation.phase is not Phase.EXPECTED or message.num_tokens != len(reservation.sequence.token_ids):
            self._fail(reservation, TransferFailed("the prefill worker's Reserve does not fit the request"))
        else:
            reservation.link, reservation.phase, reservation.lease = link, Phase.PARKED, now + self._limits.park

    # ------------------------------------------------------------------ grant, verify, admit

    def tick(self) -> None:
        """Timers, then grants to those parked, strictly oldest first: a large prompt is not overtaken by small ones
        that use up the room it waits for."""
        now, room = time.monotonic(), True
        for reservation in list(self._reservations.values()):
            if now >= reservation.deadline:
                self._fail(reservation, DeadlineExceeded("the request's deadline passed during the hand-off"))
            elif reservation.phase is Phase.LANDING and now >= reservation.lease:
                self._fail(reservation, TransferFailed("the hand-off made no progress within its lease"))
            elif reservation.phase is Phase.PARKED:
                room = room and self._grant(reservation)
                if not room and now >= reservation.lease:
                    self._later(reservation)
        for item in self._quarantine.values():
            if now >= item.patience:
                item.link.lose("the prefill worker does not say that nothing of an aborted transfer is in flight")
        for key, early in [(key, early) for key, early in self._early.items() if now >= early.expiry]:
            del self._early[key]
            early.link.post(Refuse(key, True, "the decode worker has not heard of this request yet"))

    def _later(self, reservation: Reservation) -> None:
        link, reservation.link, reservation.phase = reservation.link, None, Phase.EXPECTED
        if link is not None:
            link.post(Refuse(reservation.id, True, "no room for the prompt"))

    def _grant(self, reservation: Reservation) -> bool:
        sequence, size = reservation.sequence, self._pool.block_size
        layout, link = self._store.layout, reservation.link
        assert link is not None, "parked without a link"
        hashes = sequence.block_hashes(size, layout.fingerprint)
        cached = self._pool.match(hashes)
        missing = blocks_for(len(sequence.token_ids), size) - len(cached)
        self._pool.take(cached)  # before room is counted: cached blocks that are taken cannot be evicted
        landing = sum(1 for other in self._reservations.values() if other.phase is Phase.LANDING)
        reserved = self._pool.reserve(missing) if self._batch.room_for(missing, landing) else None
        if reserved is None:
            self._pool.release(cached)
            return False
        reservation.cached, reservation.reserved, reservation.phase = cached, reserved, Phase.LANDING
        reservation.generation, reservation.lease = next(self._generations), time.monotonic() + self._limits.lease
        targets = tuple(reserved) if link.one_sided else ()
        grant = Grant(reservation.id, reservation.generation, len(cached), missing, size, targets)
        reservation.landing = Landing(grant, reserved, len(sequence.token_ids), hashes, layout)
        failpoint("decode.granted")
        link.grant(grant, reserved)
        return True

    def _on_manifest(self, reservation: Reservation, manifest: Manifest) -> None:
        sequence, landing, link = reservation.sequence, reservation.landing, reservation.link
        assert landing is not None and link is not None, "a manifest passes only with a current generation"
        try:
            landing.verify(manifest)
            if len(manifest.first_tokens) != len(sequence.choices):
                raise TransferFailed("the manifest names another number of choices than the request")
            if max(manifest.first_tokens) >= self._batch.vocab_size:
                raise TransferFailed("the manifest's first tokens are not in the model's vocabulary")
        except TransferFailed as exc:
            self._fail(reservation, exc)
            return
        del self._reservations[reservation.id]
        link.revoke(reservation.id)
        self._pool.adopt(reservation.reserved)
        sequence.blocks = reservation.cached + reservation.reserved
        sequence.cached = len(reservation.cached) * self._pool.block_size
        sequence.computed = len(sequence.token_ids)
        if not failpoint("decode.admitted"):
            link.post(Ack(reservation.id, reservation.generation))
        failpoint("decode.acked")
        self._batch.run_landed(reservation, manifest.first_tokens)

    def _fail(self, reservation: Reservation, error: TandemError, tell: bool = True) -> None:
        """The one place where a reservation is released. Over a two-sided connector nothing can land any more, so the
        blocks are free at once (rule H2); over a one-sided one they wait for P's word."""
        del self._reservations[reservation.id]
        self._pool.release(reservation.cached)
        link, reserved = reservation.link, reservation.reserved
        if link is not None:
            link.revoke(reservation.id)
        if link is not None and reserved and link.one_sided:
            self._pool.quarantine(reserved)
            patience = time.monotonic() + self._limits.quarantine
            self._quarantine[reservation.id] = Quarantined(reserved, reservation.generation, link, patience)
        else:
            self._give_back(reserved)
        if tell and link is not None:
            link.post(Abort(reservation.id, reservation.generation, error.message))
        failpoint("decode.aborted")
        reservation.sink(LegUpdate(error=error))

    def close(self, error: TandemError) -> None:
        for reservation in list(self._reservations.values()):
            self._fail(reservation, error)
