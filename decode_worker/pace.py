"""How decode shares cores with prefill workers of the same machine: it has priority, and uses it with moderation.

A decode step streams all weights for one token of each sequence, so the same tokens cost less in fewer, fuller steps.
While prompts want the cores, steps are spaced out: prefill gets the time between them, more sequences meet in a
batch, and the tokens of a stream still come at even intervals.

    no prompt        step│step│step│step            as fast as it goes, on every core
    one prompt       step│···│step│···│step│···│    tokens come every PERIOD calm steps; a short rest at least
    a queue of them  step│·····│step│·····│         a step every QUEUED_INTERVAL
"""

from __future__ import annotations

from collections.abc import Callable

REST = 0.15  # of a step's duration, behind it
PERIOD = 1.4  # of the duration of steps beside no prompt
LATEST = 10  # steps that such durations are told from
QUEUED_INTERVAL = 0.1  # seconds from step to step; people read slower than that
LOOK = 0.005  # seconds between looks whether prompts still wait


class Pace:
    def __init__(self, prompts: Callable[[], int]) -> None:
        """`prompts()` tells how many prompts wait for, or are computed on, the cores that are shared."""
        self._prompts = prompts
        self._next = 0.0  # monotonic seconds
        self._calm, self._usual = _Mean(), _Mean()  # seconds of a step: beside no prompt, and of any

    def stepped(self, began: float, ended: float) -> None:
        took, prompts = ended - began, self._prompts()
        self._usual.add(took)
        self._next = ended
        if prompts:
            self._next += max(REST * took, PERIOD * self._calm.value - self._usual.value)
        else:
            self._calm.add(took)
        if prompts > 1:
            self._next = max(self._next, began + QUEUED_INTERVAL)

    def rest(self, now: float) -> float:
        """Seconds to wait before the next look; 0: the next step may begin."""
        if now >= self._next or not self._prompts():
            return 0.0
        return min(self._next - now, LOOK)


class _Mean:
    """Of the latest values, about LATEST of them; 0.0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        self.value += (value - self.value) / LATEST if self.value else value
