"""Prompts that begin alike and arrive together: the beginning is computed once."""

from __future__ import annotations

import pytest

from tandem.common.request import Leg, SamplingParams
from tandem.decode_worker.scheduler import DecodeScheduler
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence
from tandem.prefill_worker.scheduler import PrefillScheduler

SIZE, BUDGET = 4, 16
PREFIX = tuple(range(40))


def sequence(*suffix: int, prefix: tuple[int, ...] = PREFIX, arrival: float = 0.0) -> Sequence:
    return Sequence.from_leg(Leg("r", 0, prefix + suffix, SamplingParams(max_tokens=4)), arrival)


class Prefill:
    def __init__(self, caching: bool = True) -> None:
        self.pool = BlockPool(64, SIZE, caching)
        self.scheduler = PrefillScheduler(self.pool, b"f", BUDGET, 8)
        self.waiting: list[Sequence] = []
        self.tokens = 0  # computed in all

    def add(self, *sequences: Sequence) -> None:
        self.waiting += sequences

    def step(self) -> None:
        while self.waiting and self.scheduler.start(self.waiting[0]):
            self.waiting.pop(0)
        scheduled = self.scheduler.schedule()
        self.tokens += sum(item.num_tokens for item in scheduled)
        self.scheduler.advance(scheduled)

    def end(self, item: Sequence) -> None:
        self.scheduler.leave(item)
        self.pool.release(item.blocks)


class Decode(Prefill):
    def __init__(self, caching: bool = True) -> None:
        super().__init__(caching)
        self.decode = DecodeScheduler(self.pool, b"f", BUDGET, 8)

    def add(self, *sequences: Sequence) -> None:
        for item in sequences:
            self.decode.add(item)

    def step(self) -> None:
        scheduled = self.decode.schedule()
        self.tokens += sum(item.num_tokens for item in scheduled)
        self.decode.advance(scheduled)

    def end(self, item: Sequence) -> None:
        self.decode.remove(item)


both = pytest.mark.parametrize("make", [Prefill, Decode])


@both
def test_a_common_beginning_is_computed_once(make: type[Prefill]) -> None:
    worker, items = make(), [sequence(100 + number, 7, 8, arrival=number) for number in range(4)]
    worker.add(*items)
    for _ in range(10):
        worker.step()
    assert all(item.remaining == 0 for item in items)
    assert worker.tokens == len(PREFIX) + 4 * 3
    assert len({tuple(item.blocks[: len(PREFIX) // SIZE]) for item in items}) == 1


@both
def test_without_a_cache_nobody_waits_for_it(make: type[Prefill]) -> None:
    worker, items = make(caching=False), [sequence(100 + number, arrival=number) for number in range(2)]
    worker.add(*items)
    for _ in range(10):
        worker.step()
    assert all(item.remaining == 0 for item in items) and worker.tokens == 2 * (len(PREFIX) + 1)


@both
def test_prompts_that_differ_do_not_wait(make: type[Prefill]) -> None:
    worker = make()
    items = [sequence(prefix=(50 + number, *PREFIX[:6]), arrival=number) for number in range(2)]
    worker.add(*items)
    worker.step()
    assert [item.computed for item in items] == [7, 7]


@both
def test_when_the_first_one_ends_early_the_next_computes_the_beginning(make: type[Prefill]) -> None:
    worker, (first, second) = make(), (sequence(1, arrival=0.0), sequence(2, arrival=1.0))
    worker.add(first, second)
    worker.step()
    assert (first.computed, second.computed, second.blocks) == (BUDGET, 0, [])
    worker.end(first)
    for _ in range(4):
        worker.step()
    assert second.remaining == 0 and second.blocks
    assert worker.tokens == len(PREFIX) + 1
