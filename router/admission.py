"""Room for requests: what waits for its first token is bounded in sequences and in prompt tokens.

    arrival ──admit──► waiting ──first token──► running ──end──►
                       ▲ bounded here            bounded by the decode workers' blocks

Over the bound a request is refused at once with 503 and the time the backlog needs to drain, before any worker
hears of it. A request larger than a bound is admitted when nothing else waits: it could never be served otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from tandem.common.errors import Overloaded

MIN_RETRY_AFTER = 1.0  # seconds
MAX_RETRY_AFTER = 60.0
RATE_WINDOW = 10.0  # seconds over which the drain rate forgets


class DrainRate:
    """Sequences per second that leave the queue, exponentially averaged over RATE_WINDOW."""

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


class Admission:
    """Invariant: `sequences` and `tokens` are the sums over the entries that have not left the queue."""

    def __init__(self, max_sequences: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.sequences = 0
        self.tokens = 0
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._rate = DrainRate(clock)

    def admit(self, prompts: Sequence[int], choices: int = 1) -> list[Entry]:
        """Room for one request: prompts of so many tokens, `choices` sequences each. Raises Overloaded."""
        sequences, tokens = self.sequences + len(prompts) * choices, self.tokens + sum(prompts)
        if self.sequences and (sequences > self._max_sequences or tokens > self._max_tokens):
            wait = self.retry_after()
            raise Overloaded(
                f"{self.sequences} sequences with {self.tokens} prompt tokens already wait for their first token; "
                f"try again in {wait} s",
                retry_after=wait,
            )
        self.sequences, self.tokens = sequences, tokens
        return [Entry(self, length, choices) for length in prompts]

    def retry_after(self) -> int:
        """Seconds until today's backlog has drained at the recent rate, bounded both ways."""
        rate = self._rate.value
        wait = self.sequences / rate if rate > 0 else MIN_RETRY_AFTER
        return math.ceil(min(max(wait, MIN_RETRY_AFTER), MAX_RETRY_AFTER))

    def release(self, entry: Entry, served: bool) -> None:
        self.sequences -= entry.choices
        self.tokens -= entry.prompt_tokens
        if served:
            for _ in range(entry.choices):
                self._rate.count()


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
