"""Room for requests: what waits for its first token is bounded in sequences, in prompt tokens and in time.

    arrival ──admit──► waiting ──first token──► running ──end──►
                       ▲ bounded here            bounded by the decode workers' blocks

Over a bound a request is refused at once with 503 and the time the backlog needs to drain, before any worker hears
of it: `check` before its prompt is looked at, `admit` when its size is known. A request larger than a bound is
admitted when nothing else waits: it could never be served otherwise.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

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


class Admission:
    """Invariant: `sequences` and `tokens` are the sums over the entries that have not left the queue."""

    def __init__(
        self, max_sequences: int, max_tokens: int, max_wait: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_wait`: seconds that the backlog may need to drain when a request joins it."""
        self.sequences = 0
        self.tokens = 0
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._max_wait = max_wait
        self._rate = DrainRate(clock)

    def check(self) -> None:
        """Raises Overloaded if not even the smallest request would be admitted now."""
        self._check(1, 1)

    def admit(self, prompts: Sequence[int], choices: int = 1) -> list[Entry]:
        """Room for one request: prompts of so many tokens, `choices` sequences each. Raises Overloaded."""
        sequences, tokens = len(prompts) * choices, sum(prompts)
        self._check(sequences, tokens)
        if not self.sequences:
            self._rate.begin()
        self.sequences += sequences
        self.tokens += tokens
        return [Entry(self, length, choices) for length in prompts]

    def _check(self, sequences: int, tokens: int) -> None:
        if not self.sequences:
            return
        rate = self._rate.now()
        full = self.sequences + sequences > self._max_sequences or self.tokens + tokens > self._max_tokens
        slow = rate is not None and self.sequences / rate > self._max_wait
        if full or slow:
            wait = self.retry_after()
            raise Overloaded(
                f"{self.sequences} sequences with {self.tokens} prompt tokens already wait for their first token; "
                f"try again in {wait} s",
                retry_after=wait,
            )

    def retry_after(self) -> int:
        """Seconds until today's backlog has drained at the recent rate, bounded both ways."""
        rate = self._rate.now() or self._rate.last
        wait = self.sequences / rate if rate else MIN_RETRY_AFTER
        return math.ceil(min(max(wait, MIN_RETRY_AFTER), MAX_RETRY_AFTER))

    def release(self, entry: Entry, served: bool) -> None:
        self.sequences -= entry.choices
        self.tokens -= entry.prompt_tokens
        if served:
            self._rate.count(entry.choices)


class Entry:
    """One admitted prompt's place in the queue; leaves it once, at its first token or at its end."""

    def __init__(self, admission: Admission, prompt_tokens: int, choices: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.choices = choices
        self._admission: Admission | None = admission

    def leave(self, *, served: bool) -> None:
        if self._admission is not None:
            self._admission.release(self, served)
            self._admission = None
