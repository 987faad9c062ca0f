"""One hand-off on P, and the states it goes through (docs/protocol.md).

    QUEUED ──ask──► ASKED ──Grant──► GRANTED ──first chunk──► COMPUTING ──token 1, Manifest──► SENT ──Ack──► gone
       ▲              │                                                                          │
       └──Refuse(later)       any state: Abort, cancel, deadline or a lost link ──► LEAVING ──nothing in flight──► gone

Blocks are owned by the sequence from the first chunk until it is gone: P pins what it sends, and what it stopped
sending until the link has let go of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum

from tandem.common.handoff import Grant, Ticket
from tandem.common.request import LegStats
from tandem.common.worker_loop import Sink
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.push import PushLink
from tandem.prefill_worker.outgoing import Outgoing


class Phase(Enum):
    QUEUED = "queued"
    ASKED = "asked"
    GRANTED = "granted"
    COMPUTING = "computing"
    SENT = "sent"
    LEAVING = "leaving"


@dataclass(eq=False, slots=True)
class Transfer:
    leg_id: int
    sequence: Sequence
    ticket: Ticket
    sealed: bytes  # the ticket as the router sealed it; P passes it on
    link: PushLink
    sink: Sink
    deadline: float  # monotonic seconds
    phase: Phase = Phase.QUEUED
    phase_deadline: float = 0.0  # monotonic; for the answer awaited in ASKED and SENT
    retry_at: float = 0.0  # monotonic; not before may D be asked again
    grant: Grant | None = None
    outgoing: Outgoing | None = None  # from the first chunk on
    started: float = 0.0  # monotonic; first chunk
    sampled: float = 0.0  # monotonic; first token
    first_tokens: tuple[int, ...] = ()  # of each choice, once sampled
    poisoned: bool = False  # its computation failed: its KV may be anything

    @property
    def id(self) -> bytes:
        return self.ticket.transfer_id

    @property
    def generation(self) -> int:
        """0 before the grant."""
        return self.grant.generation if self.grant else 0

    def stats(self) -> LegStats:
        return LegStats(
            queued=self.started - self.sequence.arrival,
            computed=self.sampled - self.started,
            handed_off=time.monotonic() - self.sampled,
            cached_tokens=self.sequence.cached,
        )
