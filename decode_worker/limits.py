"""The numbers a decode worker is held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_num_queued_reqs: int = 1024  # legs that wait here for their first step
    max_num_queued_tokens: int = 1 << 20  # of those legs, still to be computed
    lease: float = 5.0  # seconds a reservation lives without a frame or a heartbeat that names it
    park: float = 5.0  # seconds a Reserve waits for room before P is told to ask again later
    quarantine: float = 30.0  # seconds P may take to say that nothing of an aborted transfer is in flight
