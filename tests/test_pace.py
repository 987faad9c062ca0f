"""When a decode step may begin beside prefill on the same cores."""

from __future__ import annotations

import itertools

import pytest

from tandem.decode_worker.pace import LOOK, PERIOD, QUEUED_INTERVAL, REST, Pace

STEP = 0.02  # seconds


def begins(pace: Pace, began: float, took: float) -> float:
    """Seconds from the end of a step to the next."""
    now = began + took
    pace.stepped(began, now)
    while rest := pace.rest(now):
        assert 0 < rest <= LOOK
        now += rest
    return now - began - took


@pytest.mark.parametrize(
    ("prompts", "wanted"), [(0, 0.0), (1, (PERIOD - 1) * STEP), (2, QUEUED_INTERVAL - STEP), (9, 0.08)]
)
def test_a_step_waits_longer_the_more_prompts_want_the_cores(prompts: int, wanted: float) -> None:
    waiting = [0]
    pace = Pace(lambda: waiting[0])
    assert begins(pace, 10.0, STEP) == pytest.approx(0.0, abs=1e-9)
    waiting[0] = prompts
    assert begins(pace, 11.0, STEP) == pytest.approx(wanted, abs=1e-9)


def test_a_step_longer_than_the_interval_still_rests() -> None:
    pace = Pace(lambda: 3)
    assert begins(pace, 10.0, 0.1) == pytest.approx(REST * 0.1)


def test_tokens_come_at_even_intervals_though_steps_beside_prompts_take_longer() -> None:
    waiting, now = [0], 10.0
    pace = Pace(lambda: waiting[0])
    for _ in range(50):
        now += STEP + begins(pace, now, STEP)
    waiting[0] = 1
    ends = list[float]()
    for took in [1.1 * STEP, 1.2 * STEP] * 50:
        ends.append(now + took)
        now += took + begins(pace, now, took)
    intervals = [later - end for end, later in itertools.pairwise(ends)][50:]
    assert all(0.9 < interval / (PERIOD * STEP) < 1.1 for interval in intervals)


def test_nobody_waits_for_prompts_that_are_gone() -> None:
    prompts = [2]
    pace = Pace(lambda: prompts[0])
    pace.stepped(10.0, 10.0 + STEP)
    assert pace.rest(10.0 + STEP) == LOOK
    prompts[0] = 0
    assert pace.rest(10.0 + STEP) == 0.0
