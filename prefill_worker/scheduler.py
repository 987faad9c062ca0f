"""Chunked prefill: which tokens of which prompts the next step computes.

Invariant: a sequence in `running` owns blocks for its whole prompt, so it never waits for memory half-way, and it
holds a grant of its decode worker, so what it computes has a place to go (rule H8). First come, first served.
"""

from __future__ import annotations

from tandem.engine.allocation import allocate, is_coming, publish
from tandem.engine.batch import Scheduled
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence


class PrefillScheduler:
    def __init__(self, pool: BlockPool, fingerprint: bytes, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._budget = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []

    def start(self, sequence: Sequence) -> bool:
        """Give the sequence its blocks, cached ones first. False (and no change) when there is no room now, or when it
        begins as a prompt that is being computed: its beginning will be cached then."""
        if len(self.running) >= self._max_num_seqs or is_coming(self._pool, sequence, self.running, self._fingerprint):
            return False
        if not allocate(self._pool, sequence, self._fingerprint):
            return False
        self.running.append(sequence)
        return True

    def schedule(self) -> list[Scheduled]:
        budget, scheduled = self._budget, list[Scheduled]()
        for sequence in self.running:
            count = min(sequence.remaining, budget)
            if count == 0:
                break
            scheduled.append(Scheduled(sequence, count))
            budget -= count
        return scheduled

    def advance(self, scheduled: list[Scheduled]) -> None:
        """The step is done: full blocks become findable; finished sequences leave (and keep their blocks)."""
        for item in scheduled:
            before = item.sequence.computed
            item.sequence.computed += item.num_tokens
            publish(self._pool, item.sequence, self._fingerprint, since=before)
            if item.sequence.remaining == 0:
                self.running.remove(item.sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever state; it keeps its blocks, which may be on their way."""
        if sequence in self.running:
            self.running.remove(sequence)
