"""A router, a P and a D over links that lose, delay and reorder what they carry (E61).

Every message between the workers, and every call of the router and its replies, passes `Weather`, which lets it
through, drops it, or keeps it until the router has tried again. The router retries as the real one does: a new ticket
for each attempt, behind the tokens the client has, at most ATTEMPTS times.
"""

from __future__ import annotations

import queue
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal
from unittest import mock

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
PAUSE = 0.05  # seconds between two attempts
TIMER = 0.15  # seconds, of everything the workers wait for
BEAT = 0.03  # seconds between heartbeats
LATE = 2 * ATTEMPT_TIMEOUT  # seconds, at most, that something is kept: the router's next attempt overtakes it

Mode = Literal["lost", "late"]
Deliver = Callable[[], object]


class Weather:
    """What becomes of everything of one kind. The choices come from a seeded generator, in the order of sending."""

    def __init__(self, kind: str, mode: Mode, probability: float, seed: int) -> None:
        self.hits = 0
        self._kind, self._mode, self._probability = kind, mode, probability
        self._rng = random.Random(f"{kind} {mode} {probability} {seed}")
        self._kept: queue.SimpleQueue[tuple[float, Deliver]] = queue.SimpleQueue()
        self._due: list[tuple[float, Deliver]] = []

    def carry(self, kind: str, deliver: Deliver) -> None:
        if kind != self._kind or self._rng.random() >= self._probability:
            deliver()
            return
        self.hits += 1
        if self._mode == "late":
            self.keep(self._rng.uniform(0.0, LATE), deliver)

    def keep(self, seconds: float, deliver: Deliver) -> None:
        self._kept.put((time.monotonic() + seconds, deliver))

    def turn(self) -> None:
        """Deliver what is due, on the thread that drives the pair."""
        while not self._kept.empty():
            self._due.append(self._kept.get())
        now = time.monotonic()
        due, self._due = [d for at, d in self._due if at <= now], [item for item in self._due if item[0] > now]
        for deliver in due:
            deliver()

    @property
    def calm(self) -> bool:
        """Nothing is kept any more."""
        return not self._due and self._kept.empty()


class WeatherChannel(InprocChannel):
    weather: Weather

    def send(self, message: Message) -> None:
        self.weather.carry(type(message).__name__, lambda: self._pass_on(message))

    def _pass_on(self, message: Message) -> None:
        with suppress(TransferFailed):  # the link has ended meanwhile, and said so to its owner
            super().send(message)


class ChaosPair(Pair):
    """A pair with short timers whose links are exposed to `weather`. D's pool is too small for all at once."""

    def __init__(self, weather: Weather, connector: str) -> None:
        super().__init__(
            decode_blocks=16,
            prefill_limits=PrefillLimits(
                grant_timeout=TIMER, ack_timeout=TIMER, retry_pause=0.01, max_num_batched_tokens=16, pipelined_from=0
            ),
            decode_limits=DecodeLimits(lease=TIMER, park=0.0),
            connector=connector,
        )
        self.weather = weather
        self.admitted = Counter[bytes]()  # transfers that D began to decode
        self.beats = True
        self._next_beat = 0.0
        run_landed = self.d.worker.run_landed

        def counted(reservation: Reservation, first_tokens: tuple[int, ...]) -> None:
            self.admitted[reservation.id] += 1
            run_landed(reservation, first_tokens)

        self.d.worker.run_landed = counted

    def _connect(self, *args: Any, **kwargs: Any) -> PushLink:
        with mock.patch.multiple(
            worker_pair,
            channel_pair=self._channel_pair,
            LandLink=lambda *args, **kwargs: LandLink(*args, **(kwargs | {"timeout": TIMER})),
            PushLink=lambda *args: PushLink(args[0], args[1], args[2], args[3], TIMER),
        ):
            return super()._connect(*args, **kwargs)

    def _channel_pair(self) -> tuple[InprocChannel, InprocChannel]:
        one: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        two: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        left, right = WeatherChannel(one, two), WeatherChannel(two, one)
        left.peer, right.peer = right, left
        left.weather = right.weather = self.weather
        return left, right

    def turn(self) -> None:
        self.weather.turn()
        if self.beats and time.monotonic() > self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            for link in (*self.p.links, *self.d.links):
                link.beat()
        super().turn()


class Attempt:
    """One ticket and its two legs. What comes when the router has given it up is dropped (rule H7)."""

    def __init__(self, request: ChaosRequest, number: int) -> None:
        pair = request.pair
        self.over, self.until = False, time.monotonic() + ATTEMPT_TIMEOUT
        self.opened, self.ended = Counter[str](), Counter[str]()  # legs at the workers, by call
        self._request = request
        sealed = pair.ticket(request.id, attempt=number)
        self.transfer_id = Ticket.open(sealed, KEY).transfer_id
        self._leg = make_leg(
            request.id, request.prompt, request.max_tokens, ticket=sealed, timeout=10.0,
            output_ids=tuple(request.tokens),
        )  # fmt: skip
        self._decode_id, self._prefill_id = pair._next_leg(), pair._next_leg()

    def open(self) -> None:
        weather = self._request.pair.weather
        weather.carry("Decode", self._open_decode)
        weather.carry("Prefill", self._open_prefill)

    def _open_decode(self) -> None:
        self._request.pair.d.worker.submit(self._decode_id, self._leg, self._sink("Decode"))
        self._cancel_if_over()

    def _open_prefill(self) -> None:
        self._request.pair.p.worker.submit(self._prefill_id, self._leg, "d", self._sink("Prefill"))
        self._cancel_if_over()

    def _cancel_if_over(self) -> None:
        """The router gave up before its call arrived: its cancel comes behind it, and not at once."""
        if self.over:
            self._request.pair.weather.keep(TIMER / 2, self._cancel)

    def _sink(self, call: str) -> Callable[[LegUpdate], None]:
        """Replies come in order: what is kept back keeps back all behind it, what is lost is lost to the end."""
        self.opened[call] += 1
        updates: deque[LegUpdate] = deque()

        def flush() -> None:
            while updates:
                self._request.take(self, updates[0])
                updates.popleft()

        def take(update: LegUpdate) -> None:
            self.ended[call] += update.last
            updates.append(update)
            if len(updates) == 1:
                self._request.pair.weather.carry(f"{call} reply", flush)

        return take

    def give_up(self) -> None:
        self.over = True
        self._request.pair.d.worker.inbox.put(self._cancel)

    def _cancel(self) -> None:
        self._request.pair.p.worker.cancel(self._prefill_id)
        self._request.pair.d.worker.cancel(self._decode_id)


class ChaosRequest:
    """A request as the client sees it: contiguous tokens and one end."""

    def __init__(self, pair: ChaosPair, request_id: str, prompt: Sequence[int], max_tokens: int) -> None:
        self.pair, self.id, self.prompt, self.max_tokens = pair, request_id, prompt, max_tokens
        self.tokens: list[int] = []
        self.attempts: list[Attempt] = []
        self.error: TandemError | None = None
        self.ends = 0
        self._early: dict[int, int] = {}  # tokens whose predecessor is still on its way, by index
        self._retry_at = 0.0

    def take(self, attempt: Attempt, update: LegUpdate) -> None:
        if attempt.over:
            return
        for token in update.tokens:
            assert token.index >= len(self.tokens) and token.index not in self._early, "one attempt repeats a token"
            self._early[token.index] = token.token_id
            attempt.until = time.monotonic() + ATTEMPT_TIMEOUT
        while len(self.tokens) in self._early:
            self.tokens.append(self._early.pop(len(self.tokens)))
        if len(self.tokens) == self.max_tokens:
            self._end(None)
        elif update.error is not None:
            self._fail(update.error)

    def turn(self) -> None:
        """Timers of the router."""
        now = time.monotonic()
        if self.ends:
            return
        if not self.attempts or (self.attempts[-1].over and now > self._retry_at):
            self._early.clear()
            self.attempts.append(Attempt(self, len(self.attempts) + 1))
            self.attempts[-1].open()
        elif not self.attempts[-1].over and now > self.attempts[-1].until:
            self._fail(TransferFailed("no token in time"))

    def leave(self) -> None:
        """The client is gone."""
        if not self.ends:
            self.attempts[-1].give_up()
            self._end(None)

    def _fail(self, error: TandemError) -> None:
        self.attempts[-1].give_up()
        self._retry_at = time.monotonic() + PAUSE
        if len(self.attempts) == ATTEMPTS:
            self._end(error)

    def _end(self, error: TandemError | None) -> None:
        """The legs of an answer that is whole end by themselves."""
        self.attempts[-1].over = True
        self.ends += 1
        self.error = error
