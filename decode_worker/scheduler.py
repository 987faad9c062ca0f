"""Continuous batching: every step computes one token of each decoding sequence, and chunks of prompts beside them.

There is no prefill phase and no decode phase: a sequence has tokens that remain to be computed. One remaining token
is decode; many are a prompt to prefill here, or a preempted sequence to recompute.

Invariant: sequences in `running` own blocks for all their tokens. Memory is given to the oldest first, and a
sequence that cannot grow preempts the youngest, so the oldest always advances and nothing waits for ever.
"""

from __future__ import annotations

import bisect

from tandem.engine.allocation import allocate, blocks_for, is_coming, publish
from tandem.engine.batch import Scheduled
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence


class DecodeScheduler:
    def __init__(self, pool: BlockPool, fingerprint: bytes, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._budget = max(max_num_batched_tokens, max_num_seqs)  # every decode has its token in every step
        self._max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []  # own no blocks; oldest first
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """A sequence whose prompt is to be computed here."""
        bisect.insort(self.waiting, sequence, key=_age)

    def join(self, sequence: Sequence) -> None:
        """A sequence that already owns blocks with its prompt's KV."""
        bisect.insort(self.running, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever state: give its blocks back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def schedule(self) -> list[Scheduled]:
        self._grow()
        self._admit()
        budget, scheduled = self._budget, list[Scheduled]()
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):  # decodes first, else by age
            count = min(sequence.remaining, budget)
            if count > 0:
                scheduled.append(Scheduled(sequence, count))
                budget -= count
        return scheduled

    def advance(self, scheduled: list[Scheduled]) -> None:
        """The step is done: its tokens are computed, blocks that became full are findable."""
        for item in scheduled:
            sequence, before = item.sequence, item.sequence.computed
            sequence.computed += item.num_tokens
            if sequence.computed // self._pool.block_size > before // self._pool.block_size:
                publish(self._pool, sequence, self._fingerprint, since=before)

    def room_for(self, num_blocks: int, landing: int) -> bool:
        """Whether a reservation may take blocks beside `landing` others: never ahead of waiting sequences, and
        never the last ones that those running (or about to) grow into."""
        soon = len(self.running) + landing
        return not self.waiting and soon < self._max_num_seqs and num_blocks + soon <= self._pool.available

    def _grow(self) -> None:
        for sequence in list(self.running):
            missing = blocks_for(len(sequence.token_ids), self._pool.block_size) - len(sequence.blocks)
            while missing > 0 and sequence.blocks:  # no blocks: it was preempted for an older one
                fresh = self._pool.allocate(missing)
                if fresh is not None:
                    sequence.blocks.extend(fresh)
                    break
                self._preempt(self.running[-1])

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._pool.release(victim.blocks)
        victim.blocks, victim.computed = [], 0
        self.preemptions += 1
        self.add(victim)

    def _admit(self) -> None:
        pending = sum(sequence.remaining for sequence in self.running)
        while self.waiting and pending < self._budget and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if is_coming(self._pool, sequence, self.running, self._fingerprint):
                return
            if not allocate(self._pool, sequence, self._fingerprint, spare=len(self.running)):
                return
            del self.waiting[0]
            pending += sequence.remaining
            self.join(sequence)


def _age(sequence: Sequence) -> float:
    return sequence.arrival
