"""Bounds of the queue, and how long a refused client is told to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.common.errors import Overloaded
from tandem.router.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sequences_are_bounded() -> None:
    admission = Admission(3, 1000)
    admission.admit([5], 2)
    (entry,) = admission.admit([5])
    with pytest.raises(Overloaded):
        admission.admit([5])
    entry.leave(served=True)
    admission.admit([5])


def test_tokens_are_bounded() -> None:
    admission = Admission(100, 10)
    admission.admit([4, 4])
    with pytest.raises(Overloaded, match="8 prompt tokens"):
        admission.admit([3])
    admission.admit([2])


def test_what_is_larger_than_the_bound_is_served_alone() -> None:
    admission = Admission(2, 10)
    entries = admission.admit([50, 50, 50])
    with pytest.raises(Overloaded):
        admission.admit([1])
    for entry in entries:
        entry.leave(served=False)
    admission.admit([1])


def test_an_entry_leaves_once() -> None:
    admission = Admission(5, 10)
    (entry,) = admission.admit([4], 2)
    entry.leave(served=True)
    entry.leave(served=False)
    assert (admission.sequences, admission.tokens) == (0, 0)


def test_retry_after_is_the_backlog_over_the_drain_rate() -> None:
    clock = Clock()
    admission = Admission(1000, 10**9, clock)
    assert admission.retry_after() == 1
    for _ in range(600):  # two sequences a second for five minutes
        clock.now += 0.5
        (entry,) = admission.admit([1])
        entry.leave(served=True)
    admission.admit([1], 40)
    assert admission.retry_after() in (19, 20, 21)
    clock.now += 600  # nothing drains any more: the longest we ever say
    assert admission.retry_after() == 60


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(1, 4)), max_size=60))
def test_counts_are_the_sums_of_what_waits(steps: list[tuple[bool, int, int]]) -> None:
    admission, waiting = Admission(12, 40), []
    for leave, tokens, choices in steps:
        if leave and waiting:
            waiting.pop(0).leave(served=True)
        else:
            try:
                waiting += admission.admit([tokens], choices)
            except Overloaded as exc:
                assert waiting and 1 <= (exc.retry_after or 0) <= 60
        assert admission.sequences == sum(entry.choices for entry in waiting) <= 12
        assert admission.tokens == sum(entry.prompt_tokens for entry in waiting) <= 40
