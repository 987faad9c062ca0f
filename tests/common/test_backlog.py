"""What waits is bounded in requests and tokens; whoever is refused learns how long the backlog takes to drain."""

from __future__ import annotations

import pytest

from tandem.common.backlog import MAX_RETRY_AFTER, MIN_RETRY_AFTER, Backlog, DrainRate
from tandem.common.errors import Overloaded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(backlog: Backlog, requests: int, tokens: int, more: int) -> float:
    with pytest.raises(Overloaded) as caught:
        backlog.check(requests, tokens, more)
    assert caught.value.retry_after is not None
    return caught.value.retry_after


def test_both_bounds_hold() -> None:
    backlog = Backlog(max_requests=4, max_tokens=100, clock=Clock())
    backlog.check(3, 60, 40)
    refused(backlog, 4, 0, 1)
    refused(backlog, 3, 60, 41)


def test_a_request_larger_than_the_bound_is_taken_when_nothing_waits() -> None:
    Backlog(max_requests=4, max_tokens=100, clock=Clock()).check(0, 0, 5000)


def test_retry_after_is_the_backlog_over_the_recent_rate() -> None:
    clock = Clock()
    backlog = Backlog(max_requests=10, max_tokens=100, clock=clock)
    assert refused(backlog, 10, 0, 1) == MIN_RETRY_AFTER, "nothing is known yet"
    for _ in range(1000):  # five each second, until the average has settled
        clock.now += 0.2
        backlog.left()
    assert refused(backlog, 40, 0, 1) == pytest.approx(40 / 5, abs=1)
    assert refused(backlog, 10**6, 0, 1) == MAX_RETRY_AFTER


def test_a_rate_falls_while_nothing_leaves() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    rate.begin()
    for _ in range(10):
        clock.now += 0.1
        rate.count(1)
    assert rate.now() == pytest.approx(10)
    clock.now += 9.0
    assert rate.now() == pytest.approx(1)
