"""Every story of scenarios.py, over one connector of each kind."""

from __future__ import annotations

import pytest

from tests.faults.scenarios import STORIES, Story


@pytest.mark.parametrize("connector", ["inproc", "shm"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_story(story: Story, connector: str) -> None:
    story(connector)
