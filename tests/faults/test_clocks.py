"""No lease and no deadline knows the wall clock: whatever happens to it, nothing happens here (E33)."""

from __future__ import annotations

import ast

import pytest

from tests.faults.process_cluster import ROOT

FOLDERS = ("cluster", "common", "decode_worker", "engine", "kv_transfer", "prefill_worker", "router")
WALL = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "mktime", "strftime", "clock_gettime"},
    "datetime": {"now", "utcnow", "today", "fromtimestamp"},
    "date": {"today", "fromtimestamp"},
}
SHOWN = {  # what a user sees and nothing waits for
    ("cluster/bench/report.py", "datetime.now"),  # when a load was measured
    ("common/chat_template.py", "datetime.now"),  # strftime_now of a template
    ("router/app.py", "time.time"),  # `created` of the model
    ("router/formats.py", "time.time"),  # `created` of an answer
}


def wall_clocks(source: str) -> set[str]:
    """Every `time.time` and the like that the source names, also as `from time import time`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in WALL.get(owner, ()):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= {f"time.{alias.name}" for alias in node.names if alias.name in WALL["time"]}
    return found


def test_e33_no_lease_and_no_deadline_knows_the_wall_clock() -> None:
    used = {
        (str(path.relative_to(ROOT)), clock)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for clock in wall_clocks(path.read_text())
    }
    assert used == SHOWN


@pytest.mark.parametrize(
    "source",
    ["import time\ntime.time()", "from time import time", "import datetime\ndatetime.datetime.now()", "date.today()"],
)
def test_e33_the_search_finds_a_wall_clock(source: str) -> None:
    assert wall_clocks(source)
    assert not wall_clocks(source.replace("time()", "monotonic()").replace("now", "x").replace("today", "x").replace(
        "import time", "import monotonic"))  # fmt: skip
