"""One hand-off on D until its sequences run, and the states it goes through (docs/protocol.md).

EXPECTED ──Reserve──► PARKED ──room: Grant──► LANDING ──Manifest verified: Ack──► running
    ▲                   │                        │
    └──Refuse(later)────┘         any state: Abort, cancel, deadline, lease or a lost link ──► gone
                                                 │ one-sided: P may still be writing
                                                 └──► quarantine ──Released, or P is dead──► gone

prompt blocks   [ cached: already here, shared ][ reserved: P fills these ]
                                                 first_block …
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tandem.common.handoff import Ticket
from tandem.common.worker_loop import Sink
from tandem.engine.sequence import Sequence
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.landing import Landing


class Phase(Enum):
    EXPECTED = "expected"
    PARKED = "parked"
    LANDING = "landing"


@dataclass(eq=False, slots=True)
class Reservation:
    leg_id: int
    sequence: Sequence  # the prompt, for all choices of the leg
    ticket: Ticket
    sink: Sink
    deadline: float  # monotonic seconds
    phase: Phase = Phase.EXPECTED
    link: LandLink | None = None  # to P, once it asked
    lease: float = 0.0  # monotonic; PARKED and LANDING end when nothing happens until then
    generation: int = 0
    cached: list[int] = field(default_factory=list[int])  # blocks, one reference each
    reserved: list[int] = field(default_factory=list[int])  # blocks
    landing: Landing | None = None

    @property
    def id(self) -> bytes:
        return self.ticket.transfer_id


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Blocks of an aborted reservation that P's one-sided writes may still reach (rule H3)."""

    blocks: list[int]
    generation: int
    link: LandLink
    patience: float  # monotonic; P's word is due until then, or its link is given up
