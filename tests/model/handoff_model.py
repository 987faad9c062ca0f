"""The hand-off of docs/protocol.md as a model: one function per step, and a switch that removes each rule.

Messages overtake each other and may be late without limit, which is how they are lost: where the world has losses,
coming to rest counts on no delivery. A write of a one-sided connector may be late as well. Timers fire at any time, the
client leaves at any time, P and D crash once each and come back as new incarnations.

What is left out, because the model allows more than it: Refuse(later) (a Reserve that takes long), heartbeats (a lease
may end although they come, but only without them does anything count on it), most of the order of the channel, and a
lost link (its messages are late and the timers fire). A prompt is one block and one frame. H1 and H11 are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

from tests.model import handoff_state as at
from tests.model.checker import Broken
from tests.model.handoff_rules import Rule, World
from tests.model.handoff_state import DAMAGED, NAMES, NONE, TOKENS, Change, Leg, Pools, Request, State, View

L = TypeVar("L", Leg, View)
Action = Callable[[View], View | None]  # None: not now
Outcome = View | Broken
Sure = Callable[[View], bool]


class Handoff:
    def __init__(self, world: World, without: Rule | None = None) -> None:
        self._world = world
        self._without = without
        self._receive: dict[str, Action] = {
            at.FIRST: self.router_takes_first_token,
            at.NEXT: self.router_takes_next_token,
            at.PREFILL: self.p_takes_leg,
            at.GRANT: self.p_gets_grant,
            at.ACK: self.p_gets_ack,
            at.ABORT_P: self.p_gets_abort,
            at.CANCEL_P: self.p_gets_cancel,
            at.WRITE: self.write_lands,
            at.DECODE: self.d_takes_leg,
            at.RESERVE: self.d_gets_reserve,
            at.FRAME: self.d_gets_frame,
            at.MANIFEST: self.d_gets_manifest,
            at.ABORT_D: self.d_gets_abort,
            at.RELEASED: self.d_gets_released,
            at.RELEASED_0: self.d_gets_released_without_generation,
            at.CANCEL_D: self.d_gets_cancel,
        }
        self._spontaneous: list[tuple[Action, Sure]] = [
            (self.router_sees_leg_fail, self._leg_failed),
            (self.deadline_or_disconnect, at.never),
            (self.p_computes, at.always),
            (self.p_timer_fires, self._p_waits_in_vain),
            (self.p_loses_link, at.always),
            (self.d_decodes, at.always),
            (self.d_gives_link_up, at.always),
            (self.d_timer_fires, self._nobody_renews),
        ]
        early = () if self._has(Rule.GRANT_FIRST) else (at.ASKED, at.GRANTED, at.EXPECTED)
        self._p_holds = frozenset({at.WRITING, at.SENT, at.DRAINING, *early})
        self._d_holds = frozenset({at.LANDING, at.RUNNING, at.QUARANTINE, *early})
        self._mishaps: dict[str, tuple[Action, ...]] = {
            "replay": (self.p_takes_leg, self.d_takes_leg),
            "damage": (self.payload_lands_damaged,),
        }
        self._local = cache(self._steps_of)  # the same few thousand views come up again and again
        self._crash = cache(self._crashed)

    def _has(self, rule: Rule) -> bool:
        return rule is not self._without

    # ------------------------------------------------------------------ what the checker asks

    def initial(self) -> State:
        legs = (at.minted(0), Leg(), at.minted(0) if self._world.requests == 2 else Leg())
        requests = (Request(), Request(ended=self._world.requests == 1))
        return State(legs, requests, Pools.of(self._world.blocks))

    def steps(self, s: State) -> Iterator[tuple[str, bool, State | Broken]]:
        for t, leg in enumerate(s.legs):
            if leg.router == at.UNBORN or leg.over:
                continue
            for label, sure, after in self._local(at.view(s, t)):
                yield label, sure, after if isinstance(after, Broken) else at.merge(s, after)
        for worker in ("P", "D"):
            if worker in self._world.once and worker not in s.happened:
                yield f"{worker} crashes and restarts", False, self._after_crash(s, worker)
        for kind, actions in self._mishaps.items():
            if kind in self._world.once - s.happened:
                yield from self._befalls(s, kind, actions)

    def broken(self, s: State) -> str:
        """Whoever should hold a block owns one, and nobody else does."""
        holding = [t for t, leg in enumerate(s.legs) if leg.d in self._d_holds]
        if holding != sorted(t for t in s.pools.owners if t != NONE):
            return f"D's blocks should be held by {[NAMES[t] for t in holding]}; {s}"
        pinning = [t for t, leg in enumerate(s.legs) if leg.p in self._p_holds]
        if pinning != sorted(t for t in s.pools.pins if t != NONE) and self._has(Rule.PIN):
            return f"P's blocks should be held by {[NAMES[t] for t in pinning]}; {s}"
        return ""

    def at_rest(self, s: State) -> bool:
        """Every request ended, nothing is on its way, and all blocks are free."""
        free = all(t == NONE for t in (*s.pools.pins, *s.pools.owners))
        return free and all(r.ended for r in s.requests) and all(leg.over for leg in s.legs)

    # ------------------------------------------------------------------ steps

    def _steps_of(self, v: View) -> list[tuple[str, bool, Change | Broken]]:
        """All that `v` can do next; ways to the same end are one step, which is sure if one of them is."""
        steps: dict[View | str, tuple[str, bool, Outcome]] = {}
        for label, sure, after in self._ways(v):
            key = str(after) if isinstance(after, Broken) else after
            if key != v:
                first, before, _ = steps.get(key, (label, False, after))
                steps[key] = (first, before or sure, after)
        return [(label, sure, at.shared(after)) for label, sure, after in steps.values()]

    def _ways(self, v: View) -> Iterator[tuple[str, bool, Outcome]]:
        for message in sorted(v.net):
            sure = not self._world.losses or message == at.WRITE
            yield from self._try(self._receive[message], v.drop(message), sure)
        for action, sure in self._spontaneous:
            yield from self._try(action, v, sure(v))

    def _try(self, action: Action, v: View, sure: bool) -> Iterator[tuple[str, bool, Outcome]]:
        label = f"{v.name}: {action.__name__.replace('_', ' ')}"
        try:
            after = action(v)
        except Broken as broken:
            yield label, sure, broken
        else:
            if after is not None:
                yield label, sure, self._settled(after)

    def _settled(self, v: L) -> L:
        """`v` without messages that nobody heeds any more, so that fewer states differ."""
        useless = set[str]()
        if v.p in (*at.OVER, at.DRAINING):
            useless |= {at.PREFILL, at.GRANT, at.ACK, at.CANCEL_P, at.ABORT_P}
        if v.d in (*at.OVER, at.QUARANTINE):
            useless |= {at.DECODE, at.CANCEL_D, at.RESERVE, at.MANIFEST}
            if self._has(Rule.CURRENT_FRAMES):
                useless.add(at.FRAME)
        if v.d in (*at.OVER, at.QUARANTINE, at.RUNNING) and self._has(Rule.GENERATION):
            useless |= {at.ABORT_D} | ({at.RELEASED, at.RELEASED_0} if v.d != at.QUARANTINE else set())
        v = v._replace(net=v.net - useless)
        heard = v.router == at.CLOSED or self._has(Rule.LIVENESS)
        if v.p in at.OVER and v.d in at.OVER and not v.net and heard:  # all such are the same
            base = 0 if v.router == at.CLOSED else v.base
            v = v._replace(p=at.GONE, d=at.GONE, base=base, granted=NONE)
        return v

    # ------------------------------------------------------------------ mishaps that happen once

    def _after_crash(self, s: State, worker: str) -> State:
        legs = tuple(self._crash(leg, worker) for leg in s.legs)
        fresh = Pools.of(self._world.blocks)
        pools = s.pools._replace(pins=fresh.pins) if worker == "P" else fresh._replace(pins=s.pools.pins)
        return State(legs, s.requests, pools, s.happened | {worker})

    def _crashed(self, leg: Leg, worker: str) -> Leg:
        """What the worker knew is lost, and so is whatever was meant for the old incarnation."""
        if leg.router == at.UNBORN:
            return leg
        dead, lost = (at.DEAD, True) if self._has(Rule.INCARNATION) else (at.GONE, False)
        leg = leg._replace(p=dead) if worker == "P" else leg._replace(d=dead)
        meant = at.TO_P if worker == "P" else at.TO_D
        return self._settled(leg._replace(net=leg.net - meant) if lost else leg)

    def _befalls(self, s: State, kind: str, actions: tuple[Action, ...]) -> Iterator[tuple[str, bool, State | Broken]]:
        seen = s._replace(happened=s.happened | {kind})
        for t, leg in enumerate(s.legs):
            for action in actions if leg.router != at.UNBORN else ():
                for label, sure, after in self._try(action, at.view(s, t), False):
                    change = at.shared(after)
                    yield f"{label} ({kind})", sure, at.merge(seen, change) if isinstance(change, Change) else change

    def payload_lands_damaged(self, v: View) -> View | None:
        if at.WRITE in v.net:
            return self._write_ends(self._lands(v.drop(at.WRITE), DAMAGED))
        return self._lands(v.drop(at.FRAME), DAMAGED) if at.FRAME in v.net and v.d == at.LANDING else None

    # ------------------------------------------------------------------ router

    def router_takes_first_token(self, v: View) -> View | None:
        return self._client_gets(v, v.base)

    def router_takes_next_token(self, v: View) -> View | None:
        """D may be faster than P: its token waits for the first one."""
        index = v.base + 1
        waits = self._has(Rule.CONTIGUOUS) and v.tokens != index
        return None if waits else self._client_gets(v, index)

    def router_sees_leg_fail(self, v: View) -> View | None:
        """An error, a broken call, a silent or dead worker; possibly a false alarm."""
        told = at.GONE in (v.p, v.d)
        if v.router == at.CLOSED:
            late = told and not self._has(Rule.ONE_END)
            return self._end(v) if late else None
        if not told and not self._has(Rule.LIVENESS):
            return None
        v = self._close(v)
        return v._replace(retry="begins") if v.retry and self._world.retry else self._end(v)

    def _leg_failed(self, v: View) -> bool:
        """Whether there is something to see."""
        p, d, net = v.p, v.d, v.net
        broke = self._world.losses or not net & {at.PREFILL, at.DECODE, at.FIRST}
        computed = p in (at.WRITING, at.SENT, at.DRAINING)
        lost = at.NEW in (p, d) or (computed and v.tokens == v.base)
        return (broke and lost) or d in at.OVER or (p in at.OVER and d != at.RUNNING)

    def deadline_or_disconnect(self, v: View) -> View | None:
        return self._end(self._close(v)) if v.router == at.OPEN else None

    def _client_gets(self, v: View, index: int) -> View:
        if v.ended:
            raise Broken(f"token {index} of {v.name} reaches the client behind the request's end")
        if v.tokens != index:
            raise Broken(f"token {index} of {v.name} reaches the client when token {v.tokens} is due")
        v = v._replace(tokens=index + 1)
        return self._end(self._close(v)) if v.tokens == TOKENS else v

    def _end(self, v: View) -> View:
        if v.ended:
            raise Broken(f"{v.name} ends its request a second time")
        return v._replace(ended=True)

    def _close(self, v: View) -> View:
        """Rule H9: both legs hear of it; one that has not begun never will."""
        v = v._replace(router=at.CLOSED)
        if self._has(Rule.ONE_END):
            v = v.drop(at.FIRST, at.NEXT)
        if self._has(Rule.CANCEL_P):
            v = v._replace(p=at.GONE).drop(at.PREFILL) if v.p == at.NEW else v.send(at.CANCEL_P)
        if self._has(Rule.CANCEL_D):
            v = v._replace(d=at.GONE).drop(at.DECODE) if v.d == at.NEW else v.send(at.CANCEL_D)
        return v

    def _say(self, v: View, token: str) -> View:
        """A worker sends a token to the router; nobody listens to a closed leg."""
        return v if v.router == at.CLOSED and self._has(Rule.ONE_END) else v.send(token)

    # ------------------------------------------------------------------ prefill worker

    def p_takes_leg(self, v: View) -> View | None:
        """And asks D for room: time in P's queue is time that the leg takes."""
        if v.p != at.NEW and self._has(Rule.SINGLE_USE):
            return v
        ready = v if self._has(Rule.GRANT_FIRST) else v.pin()
        return ready and ready._replace(p=at.ASKED).send(at.RESERVE)

    def p_gets_grant(self, v: View) -> View | None:
        return v._replace(p=at.GRANTED)

    def p_computes(self, v: View) -> View | None:
        """Prefill, the first token, and everything on its way to D."""
        if v.p != at.GRANTED:
            return None
        ready = self._pinned(v)
        if ready is None:
            return None
        ready = self._say(ready, at.FIRST)
        if self._world.one_sided:
            return ready._replace(p=at.WRITING).send(at.WRITE)
        return ready._replace(p=at.SENT).send(at.FRAME, at.MANIFEST)

    def _pinned(self, v: View) -> View | None:
        if not self._has(Rule.PIN):
            return v._replace(pins=(v.t,))  # computed in a block from which another transfer may still be written
        return v.pin() if self._has(Rule.GRANT_FIRST) else v

    def p_gets_ack(self, v: View) -> View | None:
        return v.unpin()._replace(p=at.GONE)

    def p_gets_abort(self, v: View) -> View | None:
        """Of a transfer that is over here D has been told, or will be when its write has landed."""
        return self._p_ends(v) if v.p in at.ACTIVE else v

    def p_gets_cancel(self, v: View) -> View | None:
        return self._p_ends(v)

    def p_timer_fires(self, v: View) -> View | None:
        """The timer of its phase, or the request's deadline."""
        return self._p_ends(v) if v.p in at.ACTIVE else None

    def _p_waits_in_vain(self, v: View) -> bool:
        """For Grant or Ack. Only what holds no block may count on the deadline."""
        return self._world.faulty and (v.p == at.ASKED or (v.p == at.SENT and self._has(Rule.TIMERS)))

    def p_loses_link(self, v: View) -> View | None:
        return self._p_ends(v) if v.d == at.DEAD and v.p in (*at.ACTIVE, at.DRAINING) else None

    def _p_ends(self, v: View) -> View:
        """The one place where a pin is released without an Ack: when nothing is in flight. Then D may know that, from
        a P that waits for its grant without a generation, though the Grant may be on its way."""
        if at.WRITE in v.net:
            return v._replace(p=at.DRAINING).send(at.ABORT_D)
        released = at.RELEASED_0 if v.p == at.ASKED else at.RELEASED
        return v.unpin()._replace(p=at.GONE).send(released if self._world.one_sided else at.ABORT_D)

    # ------------------------------------------------------------------ one-sided write

    def write_lands(self, v: View) -> View | None:
        return self._write_ends(self._lands(v, v.t if self._has(Rule.PIN) else v.pins[0]))

    def _write_ends(self, v: View) -> View:
        if v.p == at.WRITING:
            return v._replace(p=at.SENT).send(at.MANIFEST)
        return self._p_ends(v) if v.p == at.DRAINING else v

    def _lands(self, v: View, kv: int) -> View:
        """Bytes reach the block that was granted, whosever it is by now."""
        block = v.granted
        if v.owners[block] not in (v.t, NONE):
            raise Broken(f"KV of {v.name} lands in a block of {NAMES[v.owners[block]]}")
        return v._replace(content=at.put(v.content, block, kv)) if v.owners[block] == v.t else v

    # ------------------------------------------------------------------ decode worker

    def d_takes_leg(self, v: View) -> View | None:
        if v.d != at.NEW and self._has(Rule.SINGLE_USE):
            return v
        ready = v if self._has(Rule.GRANT_FIRST) else v.reserve()
        return ready and ready._replace(d=at.EXPECTED)

    def d_gets_reserve(self, v: View) -> View | None:
        if v.d != at.EXPECTED:
            return None
        room = v.reserve() if self._has(Rule.GRANT_FIRST) else v
        return room and room._replace(d=at.LANDING).send(at.GRANT)

    def d_gets_frame(self, v: View) -> View | None:
        current = v.d == at.LANDING
        return self._lands(v, v.t) if current or not self._has(Rule.CURRENT_FRAMES) else v

    def d_gets_manifest(self, v: View) -> View | None:
        """What came as P sent it agrees with P's digests, whosever KV it is."""
        if v.d != at.LANDING:
            return v
        if v.content[v.granted] in (NONE, DAMAGED) and self._has(Rule.VERIFY):
            return self._d_fails(v).send(at.ABORT_P)
        at.check_kv(v)
        return v._replace(d=at.RUNNING).send(at.ACK)

    def d_gets_abort(self, v: View) -> View | None:
        if v.d in (at.EXPECTED, at.LANDING):
            return self._d_fails(v)
        return v if self._has(Rule.GENERATION) or v.granted == NONE else v.free(v.granted)

    def d_gets_released(self, v: View) -> View | None:
        if at.RESERVE in v.net:
            return None  # here the order of the channel counts
        if v.d in (at.EXPECTED, at.LANDING, at.QUARANTINE):
            return self._d_over(v)
        return v if self._has(Rule.GENERATION) or v.granted == NONE else v.free(v.granted)

    def d_gets_released_without_generation(self, v: View) -> View | None:
        """The Abort before it has none either, and ends what it finds; then the blocks are in quarantine."""
        v = self._d_fails(v) if v.d in (at.EXPECTED, at.LANDING) else v
        return self.d_gets_released(v) if v.d != at.QUARANTINE or self._has(Rule.EARLY_RELEASE) else v

    def d_gets_cancel(self, v: View) -> View | None:
        return self._d_fails(v).send(*([at.ABORT_P] if v.d == at.LANDING else []))

    def d_timer_fires(self, v: View) -> View | None:
        """The lease, or the request's deadline."""
        return self.d_gets_cancel(v) if v.d in (at.EXPECTED, at.LANDING, at.RUNNING) else None

    def _nobody_renews(self, v: View) -> bool:
        """The lease of a reservation. Only what holds no block may count on the deadline."""
        lapses = v.d == at.LANDING and v.p not in at.ACTIVE and self._has(Rule.LEASE)
        return self._world.faulty and (lapses or v.d == at.EXPECTED)

    def d_gives_link_up(self, v: View) -> View | None:
        """Released does not come, or P died: the connection is torn down, and what is in flight lands no more."""
        if v.d != at.QUARANTINE or not self._world.faulty:
            return None
        v = self._d_over(v)
        return v._replace(d=at.DEAD).drop(*at.TO_D) if self._has(Rule.TEAR_DOWN) else v

    def d_decodes(self, v: View) -> View | None:
        """The rest of the tokens."""
        if v.d != at.RUNNING:
            return None
        at.check_kv(v)
        v = self._d_over(v)
        return self._say(v, at.NEXT) if v.base + 1 < TOKENS else v

    def _d_fails(self, v: View) -> View:
        """Rules H2 and H3: where P may still be writing, the blocks must wait."""
        waits = self._world.one_sided and v.d == at.LANDING and self._has(Rule.QUARANTINE)
        return v._replace(d=at.QUARANTINE) if waits else self._d_over(v)

    def _d_over(self, v: View) -> View:
        v = v.free(v.owners.index(v.t)) if v.t in v.owners else v
        return v._replace(d=at.GONE)
