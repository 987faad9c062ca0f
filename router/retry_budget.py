"""How often the router may ask again where workers said that they are full.

A retry after a death moves work that a worker lost; a retry after a refusal adds work exactly when there is too much
of it. So those are bounded: to a share of the requests that came lately, and a few.
"""

from __future__ import annotations

RATIO = 0.1  # refused attempts tried again, per request
FEW = 16.0  # … that are always allowed after a quiet time


class RetryBudget:
    """Invariant: over any time, retries ≤ FEW + RATIO × requests."""

    def __init__(self) -> None:
        self._left = FEW

    def request(self) -> None:
        self._left = min(self._left + RATIO, FEW)

    def retry(self) -> bool:
        """Whether one more is allowed; then it is counted."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
