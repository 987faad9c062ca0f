"""What can be removed from the model of the hand-off, and the worlds it is put into."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rule(Enum):
    """What can be removed."""

    CURRENT_FRAMES = "H2: D drops frames of transfers that are not current"
    QUARANTINE = "H3: blocks of an aborted one-sided transfer are quarantined"
    EARLY_RELEASE = "H3: D also takes the word of a P that never saw the grant, so names no generation"
    TEAR_DOWN = "H3: a quarantine that ends without Released ends the connection first"
    VERIFY = "H4: D admits only what agrees with the manifest"
    LEASE = "H5: D's reservation has a lease"
    TIMERS = "H5: P's wait for Grant and Ack has a timer"
    GENERATION = "H6: a free names transfer and generation, not a block"
    ONE_END = "H7: what a closed leg still says is dropped"
    CONTIGUOUS = "H7: token indices are contiguous"
    GRANT_FIRST = "H8: no block is taken before Reserve on D, before Grant on P"
    CANCEL_P = "H9: a cancel reaches P"
    CANCEL_D = "H9: a cancel reaches D"
    LIVENESS = "H10: the router notices that a worker died or fell silent"
    SINGLE_USE = "ticket: single use"
    INCARNATION = "ticket: bound to an incarnation"
    PIN = "P pins its blocks until nothing of them is in flight"


@dataclass(frozen=True)
class World:
    """Who is there and what can go wrong."""

    one_sided: bool
    requests: int = 2
    retry: bool = True
    losses: bool = True
    once: frozenset[str] = frozenset({"P", "D"})  # each crashes; "replay": a leg comes again; "damage": to a payload
    blocks: int = 1  # of each pool

    @property
    def faulty(self) -> bool:
        return self.losses or bool(self.once)
