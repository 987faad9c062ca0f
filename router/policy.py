"""Which worker gets a leg: pure functions over what the router knows at that moment.

Order: a worker that can take it now, then the longest cached prefix, then the least load. A worker much busier than
the idlest of its pool counts as one that cannot: otherwise the first worker to cache a system prompt that all
requests share would get all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMBALANCE = 4  # legs more than the idlest worker has, and the cached prefix no longer decides


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live worker of the wanted role, which may exchange KV with any of the others."""

    incarnation: str
    name: str
    load: int  # legs running and waiting
    capacity: int  # legs it runs at once
    waiting_tokens: int = 0  # prompt tokens not yet computed
    cached_tokens: int = 0  # the leading part of this prompt that it holds
    draining: bool = False
    avoid: bool = False  # it failed an earlier attempt of this request


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The best candidate; None when all are draining, because those refuse new legs."""
    taking = [candidate for candidate in candidates if not candidate.draining]
    if not taking:
        return None
    idlest = min(candidate.load for candidate in taking)
    return min(taking, key=lambda candidate: _rank(candidate, idlest))


def _rank(candidate: Candidate, idlest: int) -> tuple[bool, bool, int, int, int, str]:
    busy = candidate.load >= candidate.capacity or candidate.load > idlest + IMBALANCE
    load = (candidate.load, candidate.waiting_tokens)
    return (candidate.avoid, busy, -candidate.cached_tokens if not busy else 0, *load, candidate.name)
