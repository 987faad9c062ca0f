"""A bounded queue's bookkeeping: how much may wait, and how long whoever is turned away should stay away.

Nothing waits without bound: over a limit a request is refused at once, with the time that today's backlog needs to
drain at the recent rate. A request larger than a limit is taken when nothing else waits: it could never be served
otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tandem.common.errors import Overloaded

MIN_RETRY_AFTER = 1.0  # seconds
MAX_RETRY_AFTER = 60.0
RATE_WINDOW = 10.0  # seconds over which the drain rate forgets


class DrainRate:
    """What leaves a queue each second, exponentially averaged over RATE_WINDOW."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate = 0.0
        self._updated = clock()

    def count(self) -> None:
        self._rate = self.value + 1 / RATE_WINDOW

    @property
    def value(self) -> float:
        now = self._clock()
        self._rate *= math.exp((self._updated - now) / RATE_WINDOW)
        self._updated = now
        return self._rate

    def retry_after(self, waiting: int) -> int:
        """Seconds until so many have left at the recent rate, bounded both ways."""
        rate = self.value
        wait = waiting / rate if rate > 0 else MIN_RETRY_AFTER
        return math.ceil(min(max(wait, MIN_RETRY_AFTER), MAX_RETRY_AFTER))


class Backlog:
    """The limits of one worker's queue; the queue itself is the worker's."""

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._rate = DrainRate(clock)

    def check(self, requests: int, tokens: int, more: int) -> None:
        """Whether one more request of `more` tokens may join so many. Raises Overloaded."""
        if requests == 0 or (requests < self._max_requests and tokens + more <= self._max_tokens):
            return
        wait = self._rate.retry_after(requests)
        raise Overloaded(
            f"{requests} requests with {tokens} tokens already wait on this worker; try again in {wait} s",
            retry_after=wait,
        )

    def left(self) -> None:
        """A request's turn came."""
        self._rate.count()
