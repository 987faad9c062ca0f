"""What the model of the hand-off remembers: the router, P, D, and everything in between, as one hashable value.

Requests A and B share one P and one D. A may be retried once, so there are three transfers: A0, A1 (the retry) and B0.
A prompt is one block, and a pool has fewer blocks than two requests need: every block is used again and again. A
request is two tokens: the first of an attempt comes from P, the next from D.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from tests.model.checker import Broken

T = TypeVar("T")

NAMES = ("A0", "A1", "B0")  # transfers, by number
REQUEST = (0, 0, 1)  # of which request
RETRY = {0: 1}  # the transfer that follows a failed one
TOKENS = 2
NONE = -1  # no block, no owner, no KV
DAMAGED = -2  # KV

# The router's side of a transfer; `CLOSED` legs are cancelled and have no voice any more.
UNBORN, OPEN, CLOSED = "unborn", "open", "closed"

# P: NEW ─leg, Reserve► ASKED ─Grant► GRANTED ─compute► WRITING (one-sided only) ─► SENT ─Ack► GONE
NEW, ASKED, GRANTED, WRITING, SENT = "new", "asked", "granted", "writing", "sent"
DRAINING = "draining"  # over, but its write is still in flight
# D: NEW ─leg► EXPECTED ─Reserve, room: Grant► LANDING ─Manifest verified: Ack► RUNNING ─last token► GONE
EXPECTED, LANDING, RUNNING = "expected", "landing", "running"
QUARANTINE = "quarantine"
# Both
GONE = "gone"
DEAD = "dead"  # its incarnation or its connection is: nothing of this transfer gets through to here any more

OVER = (GONE, DEAD)
ACTIVE = (ASKED, GRANTED, WRITING, SENT)  # on P: its heartbeats name the transfer

# What is on its way. Nothing is ordered: a message that is not delivered yet is delayed.
PREFILL, DECODE = "Prefill", "Decode"  # legs, with the ticket
CANCEL_P, CANCEL_D = "cancel→P", "cancel→D"
FIRST, NEXT = "token of P", "token of D"
RESERVE, GRANT = "Reserve", "Grant"
FRAME = "Frame"  # two-sided: with its payload
WRITE = "write"  # one-sided: from P's block into D's
MANIFEST, ACK = "Manifest", "Ack"  # one-sided: the frame headers travel with the manifest
ABORT_P, ABORT_D = "Abort→P", "Abort→D"
RELEASED = "Released"  # implies the Abort before it
RELEASED_0 = "Released, no generation"  # likewise; P gave up before it had the grant, which may be on its way

TO_P = frozenset({PREFILL, CANCEL_P, GRANT, ACK, ABORT_P})
TO_D = frozenset({DECODE, CANCEL_D, RESERVE, FRAME, WRITE, MANIFEST, ABORT_D, RELEASED, RELEASED_0})


class Leg(NamedTuple):
    """One transfer, wherever it is."""

    router: str = UNBORN
    p: str = NEW
    d: str = NEW
    net: frozenset[str] = frozenset()
    base: int = 0  # tokens that the client had when the attempt began: they are part of its prompt
    granted: int = NONE  # D's block that P was told

    @property
    def over(self) -> bool:
        return self.router != OPEN and not self.net and self.p in (NEW, *OVER) and self.d in (NEW, *OVER)


class Request(NamedTuple):
    tokens: int = 0  # that the client has
    ended: bool = False  # the client has seen a terminal, or is gone


class Pools(NamedTuple):
    """One item per block."""

    pins: tuple[int, ...]  # P's: the transfer that owns it
    owners: tuple[int, ...]  # D's: the transfer that owns it
    content: tuple[int, ...]  # D's: whose KV lies there; matters between Grant and the last token

    @classmethod
    def of(cls, blocks: int) -> Pools:
        return cls((NONE,) * blocks, (NONE,) * blocks, (NONE,) * blocks)


class State(NamedTuple):
    """Everything."""

    legs: tuple[Leg, ...]  # by transfer
    requests: tuple[Request, ...]
    pools: Pools
    happened: frozenset[str] = frozenset()  # of what may happen once

    def __str__(self) -> str:
        legs = (
            f"{name}[router {leg.router}, P {leg.p}, D {leg.d}, on the way {sorted(leg.net)}]"
            for name, leg in zip(NAMES, self.legs, strict=True)
            if leg.router != UNBORN
        )
        pins, owners = ([NAMES[t] if t != NONE else "free" for t in pool] for pool in self.pools[:2])
        return f"{' '.join(legs)} blocks of P: {pins}, of D: {owners}"


class View(NamedTuple):
    """What the steps of one transfer can see and change: itself, its request, and the pools. Fields as above."""

    t: int
    router: str
    p: str
    d: str
    net: frozenset[str]
    base: int
    granted: int
    tokens: int
    ended: bool
    pins: tuple[int, ...]
    owners: tuple[int, ...]
    content: tuple[int, ...]
    retry: str  # "": there is none; "possible"; "begins"

    @property
    def name(self) -> str:
        return NAMES[self.t]

    def send(self, *messages: str) -> View:
        """Nothing can be sent to the dead."""
        dead = (TO_P if self.p == DEAD else frozenset()) | (TO_D if self.d == DEAD else frozenset())
        return self._replace(net=self.net | (frozenset(messages) - dead))

    def drop(self, *messages: str) -> View:
        return self._replace(net=self.net.difference(messages))

    def pin(self) -> View | None:
        """One of P's blocks, if there is one."""
        return self._replace(pins=put(self.pins, self.pins.index(NONE), self.t)) if NONE in self.pins else None

    def unpin(self) -> View:
        return self._replace(pins=put(self.pins, self.pins.index(self.t), NONE)) if self.t in self.pins else self

    def reserve(self) -> View | None:
        """One of D's blocks, if there is one."""
        if NONE not in self.owners:
            return None
        block = self.owners.index(NONE)
        return self._replace(owners=put(self.owners, block, self.t), granted=block)

    def free(self, block: int) -> View:
        return self._replace(owners=put(self.owners, block, NONE), content=put(self.content, block, NONE))


def view(s: State, t: int) -> View:
    retry = "possible" if t in RETRY and s.legs[RETRY[t]].router == UNBORN else ""
    return View(t, *s.legs[t], *s.requests[REQUEST[t]], *s.pools, retry)


class Change(NamedTuple):
    """What a step of one transfer makes of it and of what it shares."""

    t: int
    leg: Leg
    request: Request
    pools: Pools
    retry: Leg | None


def shared(v: View | Broken) -> Change | Broken:
    if isinstance(v, Broken):
        return v
    retry = minted(v.tokens) if v.retry == "begins" else None
    return Change(v.t, Leg(*v[1:7]), Request(*v[7:9]), Pools(*v[9:12]), retry)


def merge(s: State, c: Change) -> State:
    legs = put(s.legs, c.t, c.leg)
    if c.retry:
        legs = put(legs, RETRY[c.t], c.retry)
    return State(legs, put(s.requests, REQUEST[c.t], c.request), c.pools, s.happened)


def minted(tokens: int) -> Leg:
    """The router opens both legs, with one ticket."""
    return Leg(router=OPEN, net=frozenset({PREFILL, DECODE}), base=tokens)


def put(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


def check_kv(v: View) -> None:
    """The property that all of this is for."""
    kv = v.content[v.granted]
    if kv != v.t:
        what = {NONE: "that never came", DAMAGED: "that was damaged"}.get(kv, f"of {NAMES[kv]}")
        raise Broken(f"{v.name} decodes on KV {what}")


def always(v: View) -> bool:
    return True


def never(v: View) -> bool:
    return False
