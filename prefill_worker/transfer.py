"""One hand-off on P, and the states it goes through (docs/protocol.md).

    QUEUED ──ask──► ASKED ──Grant──► GRANTED ──first chunk──► COMPUTING ──token 1, Manifest──► SENT ──Ack──► gone
       ▲              │
       └──Refuse(later)   any state: Abort, cancel, deadline or a lost link ──► gone

Blocks are owned by the sequence from the first chunk until it is gone: P pins what it sends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum

from tandem.common.handoff import Ticket
from tandem.common.request import LegStats
from tandem.common.worker_loop import Sink
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.push import PushLink


class Phase(Enum):
    QUEUED = "queued"
    ASKED = "asked"
    GRANTED = "granted"
    COMPUTING = "computing"
    SENT = "sent"


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
    generation: int = 0
    pushed: int = 0  # D has the prompt's blocks before this one, or they are on their way
    started: float = 0.0  # monotonic; first chunk
    sampled: float = 0.0  # monotonic; first token
    first_tokens: tuple[int, ...] = ()  # of each choice, once sampled

    def stats(self) -> LegStats:
        return LegStats(
            queued=self.started - self.sequence.arrival,
            computed=self.sampled - self.started,
            handed_off=time.monotonic() - self.sampled,
            cached_tokens=self.sequence.cached,
        )
