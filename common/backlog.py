"""A bounded queue's bookkeeping: how much may wait, and how long whoever is turned away should stay away.

Nothing waits without bound: over a limit a request is refused at once, with the time that today's backlog needs to
drain at the recent rate. A request larger than a limit is taken when nothing else waits: it could never be served
otherwise.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from tandem.common.errors import Overloaded

MIN_RETRY_AFTER = 1.0  # seconds
MAX_RETRY_AFTER = 60.0
DEPARTURES = 64  # the latest ones tell the drain rate …
MIN_DEPARTURES = 8  # … and fewer tell none


class DrainRate:
    """Sequences per second that leave a queue while it is never empty.

        begin ──busy──┬────┬──┬─┬──── now        rate = Σ sequences of the departures / (now − `since`)
                      └ departures ┘

    An idle queue says nothing about how fast a full one drains, so each busy period is measured for itself; without
    departures the rate falls, because time goes on.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.last: float | None = None  # of this busy period, or of an earlier one that told any
        self._clock = clock
        self._since = clock()  # seconds, on the clock
        self._departures: deque[tuple[float, int]] = deque()  # when, and how many sequences
        self._sequences = 0  # their sum

    def begin(self) -> None:
        """The queue was empty and is not any more."""
        self._since, self._sequences = self._clock(), 0
        self._departures.clear()

    def count(self, sequences: int) -> None:
        self._departures.append((self._clock(), sequences))
        self._sequences += sequences
        if len(self._departures) > DEPARTURES:
            self._since, oldest = self._departures.popleft()
            self._sequences -= oldest

    def now(self) -> float | None:
        """Of this busy period; None when it has not told yet."""
        elapsed = self._clock() - self._since
        if len(self._departures) < MIN_DEPARTURES or elapsed <= 0:
            return None
        self.last = self._sequences / elapsed
        return self.last

    def retry_after(self, waiting: int) -> int:
        """Seconds until so many have left at the recent rate, bounded both ways."""
        rate = self.now() or self.last
        wait = waiting / rate if rate else MIN_RETRY_AFTER
        return math.ceil(min(max(wait, MIN_RETRY_AFTER), MAX_RETRY_AFTER))


class Backlog:
    """The limits of one queue; the queue itself is its owner's."""

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        max_wait: float = math.inf,
    ) -> None:
        """`max_wait`: seconds that what waits may need to drain when more joins it."""
        self._max_requests, self._max_tokens, self._max_wait = max_requests, max_tokens, max_wait
        self._rate = DrainRate(clock)

    def check(self, requests: int, tokens: int, more: int, joining: int = 1) -> None:
        """Whether `joining` more requests of together `more` tokens may join so many. Raises Overloaded."""
        if requests == 0:
            self._rate.begin()
            return
        rate = self._rate.now()
        full = requests + joining > self._max_requests or tokens + more > self._max_tokens
        if full or (rate is not None and requests / rate > self._max_wait):
            wait = self.retry_after(requests)
            raise Overloaded(
                f"{requests} sequences with {tokens} prompt tokens already wait; try again in {wait} s",
                retry_after=wait,
            )

    def retry_after(self, requests: int) -> int:
        """Seconds until so many have left at the recent rate."""
        return self._rate.retry_after(requests)

    def left(self, requests: int = 1) -> None:
        """Their turn came."""
        self._rate.count(requests)
