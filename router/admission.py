"""Room for requests: what waits for its first token is bounded in sequences, in prompt tokens and in time.

    arrival ──admit──► waiting ──first token──► running ──end──►
                       ▲ bounded here            bounded by the decode workers' blocks

Over a bound a request is refused at once with 503 and the time the backlog needs to drain, before any worker hears
of it: `check` before its prompt is looked at, `admit` when its size is known. A request larger than a bound is
admitted when nothing else waits: it could never be served otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tandem.common.backlog import Backlog


class Admission:
    """Invariant: `sequences` and `tokens` are the sums over the entries that have not left the queue."""

    def __init__(
        self, max_sequences: int, max_tokens: int, max_wait: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_wait`: seconds that the backlog may need to drain when a request joins it."""
        self.sequences = 0
        self.tokens = 0
        self._backlog = Backlog(max_sequences, max_tokens, clock, max_wait)

    def check(self) -> None:
        """Raises Overloaded if not even the smallest request would be admitted now."""
        self._backlog.check(self.sequences, self.tokens, 1)

    def admit(self, prompts: Sequence[int], choices: int = 1) -> list[Entry]:
        """Room for one request: prompts of so many tokens, `choices` sequences each. Raises Overloaded."""
        sequences, tokens = len(prompts) * choices, sum(prompts)
        self._backlog.check(self.sequences, self.tokens, tokens, sequences)
        self.sequences += sequences
        self.tokens += tokens
        return [Entry(self, length, choices) for length in prompts]

    def retry_after(self) -> int:
        """Seconds until today's backlog has drained at the recent rate."""
        return self._backlog.retry_after(self.sequences)

    def release(self, entry: Entry, served: bool) -> None:
        self.sequences -= entry.choices
        self.tokens -= entry.prompt_tokens
        if served:
            self._backlog.left(entry.choices)


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
