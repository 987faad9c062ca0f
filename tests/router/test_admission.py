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
    admission = Admission(3, 1000, 60)
    admission.admit([5], 2)
    (entry,) = admission.admit([5])
    with pytest.raises(Overloaded):
        admission.admit([5])
    entry.leave(served=True)
    admission.admit([5])


def test_tokens_are_bounded() -> None:
    admission = Admission(100, 10, 60)
    admission.admit([4, 4])
    with pytest.raises(Overloaded, match="8 prompt tokens"):
        admission.admit([3])
    admission.admit([2])


def test_what_is_larger_than_the_bound_is_served_alone() -> None:
    admission = Admission(2, 10, 60)
    entries = admission.admit([50, 50, 50])
    with pytest.raises(Overloaded):
        admission.admit([1])
    for entry in entries:
        entry.leave(served=False)
    admission.admit([1])


def test_an_entry_leaves_once() -> None:
    admission = Admission(5, 10, 60)
    (entry,) = admission.admit([4], 2)
    entry.leave(served=True)
    entry.leave(served=False)
    assert (admission.sequences, admission.tokens) == (0, 0)


def drain(admission: Admission, clock: Clock, departures: int, every: float) -> None:
    """So many sequences leave a queue of at least one more, one every `every` seconds."""
    for entry in admission.admit([1] * departures):
        clock.now += every
        entry.leave(served=True)


def test_retry_after_is_the_backlog_over_the_drain_rate() -> None:
    clock = Clock()
    admission = Admission(1000, 10**9, 10**9, clock)
    assert admission.retry_after() == 1
    (rest,) = admission.admit([1], 40)
    drain(admission, clock, 600, every=0.5)
    assert admission.retry_after() == 20  # 40 sequences at two a second
    clock.now += 600  # nothing drains any more: the longest we ever say
    assert admission.retry_after() == 60
    rest.leave(served=False)
    assert admission.retry_after() == 1


def test_a_new_burst_is_not_judged_by_a_quiet_hour() -> None:
    """One request at a time tells nothing about how many a second would be served."""
    clock = Clock()
    admission = Admission(1000, 10**9, 5, clock)
    for _ in range(100):
        drain(admission, clock, 1, every=1.0)
        clock.now += 35.0
    admission.admit([1], 500)
    admission.check()


def test_the_expected_wait_is_bounded() -> None:
    clock = Clock()
    admission = Admission(1000, 10**9, 5, clock)
    (first,), _ = admission.admit([1], 9), admission.admit([1], 12)
    admission.check()  # nothing is known yet
    drain(admission, clock, 10, every=0.25)
    with pytest.raises(Overloaded, match="21 sequences") as refused:
        admission.check()
    assert refused.value.retry_after == 6  # 21 at four a second
    first.leave(served=False)
    admission.check()  # 12 wait: three seconds
    clock.now += 60  # … and now nothing leaves any more
    with pytest.raises(Overloaded):
        admission.admit([1])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(1, 4)), max_size=60))
def test_counts_are_the_sums_of_what_waits(steps: list[tuple[bool, int, int]]) -> None:
    admission, waiting = Admission(12, 40, 60), []
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
