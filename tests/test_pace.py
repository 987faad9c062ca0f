"""When a decode step may begin beside prefill on the same cores."""

from __future__ import annotations

import pytest

from tandem.decode_worker.pace import LOOK, QUEUED_INTERVAL, REST, Pace

STEP = 0.02  # seconds


def begins(prompts: list[int]) -> float:
    """Seconds from the end of a step that began at 10 to the next; `prompts[0]` is changed as it waits."""
    pace, now = Pace(lambda: prompts[0]), 10.0 + STEP
    pace.stepped(10.0, now)
    while rest := pace.rest(now):
        assert 0 < rest <= LOOK
        now += rest
    return now - 10.0 - STEP


@pytest.mark.parametrize(("prompts", "wanted"), [(0, 0.0), (1, REST * STEP), (2, QUEUED_INTERVAL - STEP), (9, 0.08)])
def test_a_step_waits_longer_the_more_prompts_want_the_cores(prompts: int, wanted: float) -> None:
    assert begins([prompts]) == pytest.approx(wanted)


def test_a_step_longer_than_the_interval_still_rests() -> None:
    pace = Pace(lambda: 3)
    pace.stepped(10.0, 10.1)
    assert pace.rest(10.1) == LOOK and pace.rest(10.1 + REST * 0.1 + 1e-6) == 0.0


def test_nobody_waits_for_prompts_that_are_gone() -> None:
    prompts = [2]
    pace = Pace(lambda: prompts[0])
    pace.stepped(10.0, 10.0 + STEP)
    assert pace.rest(10.0 + STEP) == LOOK
    prompts[0] = 0
    assert pace.rest(10.0 + STEP) == 0.0
