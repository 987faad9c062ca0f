"""Every story of scenarios.py and life.py, over one connector of each kind."""

from __future__ import annotations

import pytest

from tests.faults.life import LIFE_STORIES
from tests.faults.scale import SCALE
from tests.faults.scenarios import STORIES, Story, a_late_write_into_a_block_that_was_given_up


@pytest.mark.parametrize("connector", ["inproc", "shm"])
@pytest.mark.parametrize("story", [*STORIES, *LIFE_STORIES], ids=lambda story: story.__name__)
def test_story(story: Story, connector: str) -> None:
    story(connector)


@pytest.mark.parametrize("connector", ["inproc", "shm"])
def test_e11_late_writes(connector: str) -> None:
    """E10, E11: prompts of all lengths, so that the write comes into blocks of whoever happens to have them."""
    for seed in range(20 * SCALE):
        try:
            a_late_write_into_a_block_that_was_given_up(connector, seed)
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}: {exc}") from exc
