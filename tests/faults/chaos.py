"""A router, a P and a D over links that lose, delay and reorder what they carry (E61).

Every message between the workers, and every call of the router, passes `Weather`, which lets it through, drops it, or
keeps it until long after the router has tried again. The router retries as the real one does: a new ticket for each
attempt, behind the tokens the client has, at most ATTEMPTS times.
"""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from tandem.common.errors import TandemError, TransferFailed
from tandem.common.handoff import Message, Ticket
from tandem.common.request import LegUpdate
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Reservation
from tandem.kv_transfer.inproc import InprocChannel
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.push import PushLink
from tandem.prefill_worker.worker import PrefillLimits
from tests import worker_pair
from tests.fakes import make_leg
from tests.worker_pair import KEY, Pair

ATTEMPTS = 3
ATTEMPT_TIMEOUT = 0.4  # seconds without a token until the router tries again
TIMER = 0.15  # seconds, of everything the workers wait for
LATE = 2 * ATTEMPT_TIMEOUT  # seconds, at most, that a late message is kept: the router's next attempt overtakes it
DEADLINE = 6.0  # seconds for a request, all attempts together

Mode = Literal["lost", "late"]
Deliver = Callable[[], None]


class Weather:
    """What becomes of everything that is `kind`. Drops and delays come from a seeded generator, in order of sending."""

    def __init__(self, kind: str, mode: Mode, probability: float, seed: int) -> None:
        self.hits = 0
        self._kind, self._mode, self._probability = kind, mode, probability
        self._rng = random.Random(f"{kind} {mode} {probability} {seed}")
        self._late: queue.SimpleQueue[tuple[float, Deliver]] = queue.SimpleQueue()
        self._due: list[tuple[float, Deliver]] = []

    def carry(self, kind: str, deliver: Deliver) -> None:
        if kind != self._kind or self._rng.random() >= self._probability:
            deliver()
            return
        self.hits += 1
        if self._mode == "late":
            self._late.put((time.monotonic() + self._rng.uniform(0.0, LATE), deliver))

    def turn(self) -> None:
        """Deliver what is due, on the thread that drives the pair."""
        while not self._late.empty():
            self._due.append(self._late.get())
        now = time.monotonic()
        due, self._due = [d for at, d in self._due if at <= now], [item for item in self._due if item[0] > now]
        for deliver in due:
            deliver()

    @property
    def calm(self) -> bool:
        """Nothing is kept any more."""
        return not self._due and self._late.empty()


class WeatherChannel(InprocChannel):
    weather: Weather

    def send(self, message: Message) -> None:
        self.weather.carry(type(message).__name__, lambda: self._pass_on(message))

    def _pass_on(self, message: Message) -> None:
        with suppress(TransferFailed):  # the link has ended meanwhile, and said so to its owner
            super().send(message)


class ChaosPair(Pair):
    """A pair with short timers whose links are exposed to `weather`."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.admitted = Counter[bytes]()  # transfers that D began to decode
        super().__init__(
            prefill_limits=PrefillLimits(
                grant_timeout=TIMER, ack_timeout=TIMER, retry_pause=0.01, max_num_batched_tokens=16, pipelined_from=0
            ),
            decode_limits=DecodeLimits(lease=TIMER, park=TIMER / 2),
        )
        run_landed = self.d.worker.run_landed

        def counted(reservation: Reservation, first_tokens: tuple[int, ...]) -> None:
            self.admitted[reservation.id] += 1
            run_landed(reservation, first_tokens)

        self.d.worker.run_landed = counted  # pyright: ignore[reportAttributeAccessIssue]

    def channel_pair(self) -> tuple[InprocChannel, InprocChannel]:
        one: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        two: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        left, right = WeatherChannel(one, two), WeatherChannel(two, one)
        left.peer, right.peer = right, left
        left.weather = right.weather = self.weather
        return left, right

    def turn(self) -> None:
        self.weather.turn()
        for link in (*self.p.links, *self.d.links):
            link.beat()
        super().turn()


def short_links(patch: Callable[[object, str, object], None], pair_of: Callable[[], ChaosPair]) -> ChaosPair:
    """A ChaosPair; its links give up after TIMER seconds and use its channels."""
    patch(worker_pair, "LandLink", lambda *a, **kw: LandLink(*a, **(kw | {"timeout": TIMER})))
    patch(worker_pair, "PushLink", lambda *a: PushLink(*a[:-1], TIMER))
    pair = pair_of()
    patch(worker_pair, "channel_pair", pair.channel_pair)
    return pair


class Attempt:
    """One ticket and its two legs. What comes when the router has given it up is dropped (rule H7)."""

    def __init__(self, request: ChaosRequest, number: int) -> None:
        pair = request.pair
        self.request, self.over, self.ends = request, False, Counter[str]()
        self.until = time.monotonic() + ATTEMPT_TIMEOUT
        sealed = pair.ticket(request.id, attempt=number, timeout=DEADLINE)
        self.transfer_id = Ticket.open(sealed, KEY).transfer_id
        self._leg = make_leg(
            request.id, request.prompt, request.max_tokens, ticket=sealed, timeout=DEADLINE,
            output_ids=tuple(request.tokens),
        )  # fmt: skip
        self._ids = {"Prefill": pair._next_leg(), "Decode": pair._next_leg()}

    def open(self) -> None:
        pair, carry = self.request.pair, self.request.pair.weather.carry
        decode, prefill = self._ids["Decode"], self._ids["Prefill"]
        d, p, leg = pair.d.worker, pair.p.worker, self._leg
        carry("Decode", lambda: self.over or d.submit(decode, leg, self._sink("Decode")))
        carry("Prefill", lambda: self.over or p.submit(prefill, leg, "d", self._sink("Prefill")))

    def _sink(self, call: str) -> Callable[[LegUpdate], None]:
        """Replies are lost whole, not token by token: a stream has gaps only at its end."""
        carry, broken = self.request.pair.weather.carry, list[bool]()

        def take(update: LegUpdate) -> None:
            if broken:
                return
            broken.append(True)
            carry(f"{call} reply", lambda: broken.clear() or self._take(call, update))

        return take

    def _take(self, call: str, update: LegUpdate) -> None:
        if update.last:
            self.ends[call] += 1
        if not self.over:
            self.request.take(call, update)

    def give_up(self) -> None:
        self.over = True
        self.request.pair.p.worker.cancel(self._ids["Prefill"])
        self.request.pair.d.worker.cancel(self._ids["Decode"])


class ChaosRequest:
    """A request as the client sees it: contiguous tokens and one end."""

    def __init__(self, pair: ChaosPair, request_id: str, prompt: list[int], max_tokens: int) -> None:
        self.pair, self.id, self.prompt, self.max_tokens = pair, request_id, prompt, max_tokens
        self.tokens: list[int] = []
        self.attempts: list[Attempt] = []
        self.error: TandemError | None = None
        self.ended = 0
        self.retry()

    def take(self, call: str, update: LegUpdate) -> None:
        attempt = self.attempts[-1]
        for token in update.tokens:
            if token.index != len(self.tokens):
                self.fail(TransferFailed(f"token {token.index} came behind {len(self.tokens)}"))
                return
            self.tokens.append(token.token_id)
            attempt.until = time.monotonic() + ATTEMPT_TIMEOUT
        if update.error is not None:
            self.fail(update.error)
        elif update.last and call == "Decode":
            self._end(None)

    def fail(self, error: TandemError) -> None:
        self.attempts[-1].give_up()
        if len(self.attempts) < ATTEMPTS:
            self.pair.p.worker.inbox.put(self.retry)
        else:
            self._end(error)

    def retry(self) -> None:
        self.attempts.append(Attempt(self, len(self.attempts) + 1))
        self.attempts[-1].open()

    def turn(self) -> None:
        attempt = self.attempts[-1]
        if not self.ended and not attempt.over and time.monotonic() > attempt.until:
            self.fail(TransferFailed("no token in time"))

    def _end(self, error: TandemError | None) -> None:
        self.attempts[-1].over = True
        self.ended, self.error = self.ended + 1, error
