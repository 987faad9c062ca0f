"""The numbers a decode worker is held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    lease: float = 30.0  # seconds a reservation lives without progress
    park: float = 5.0  # seconds a Reserve waits for room before P is told to ask again later
