"""Which cores a worker's own thread stays on, beside other workers of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.engine.kernels.cores import CoreTable

WORKER = """
import os, sys
from pathlib import Path
from tandem.engine.kernels.cores import CoreTable
table = CoreTable.join(int(sys.argv[2]), Path(sys.argv[1]))
home = table.stay_home()
assert table.stay_home() == home
print(*sorted(home), "|", *sorted(os.sched_getaffinity(0)), flush=True)
sys.stdin.read()
"""
ALLOWED = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="there is one core")


class Workers:
    def __init__(self, path: Path) -> None:
        self._path, self._running = path, list[subprocess.Popen[str]]()

    def start(self, own: int = 1) -> tuple[list[int], list[int]]:
        """The home of a new worker, and where its thread may run."""
        command = [sys.executable, "-c", WORKER, str(self._path), str(own)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._running.append(worker)
        assert worker.stdout is not None
        home, _, may = worker.stdout.readline().partition("|")
        return [int(cpu) for cpu in home.split()], [int(cpu) for cpu in may.split()]

    def kill(self) -> None:
        """All of them."""
        while self._running:
            worker = self._running.pop()
            worker.kill()
            worker.communicate(timeout=30)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    found = Workers(tmp_path / "table")
    yield found
    found.kill()


def test_homes_are_apart_and_free_when_their_worker_dies(workers: Workers) -> None:
    homes = [workers.start() for _ in ALLOWED]
    assert homes == [([cpu], [cpu]) for cpu in ALLOWED]
    assert workers.start() == ([], ALLOWED), "one worker more than there are cores goes anywhere"
    workers.kill()
    assert workers.start() == ([ALLOWED[0]], [ALLOWED[0]])


def test_a_worker_of_more_cores_than_are_left_goes_anywhere(workers: Workers) -> None:
    assert workers.start(len(ALLOWED) - 1)[0] == ALLOWED[:-1]
    assert workers.start(2) == ([], ALLOWED)
    assert workers.start() == ([ALLOWED[-1]], [ALLOWED[-1]]), "nor does it keep others from the ones that are left"


def test_only_the_thread_that_asked_stays(tmp_path: Path) -> None:
    table, found = CoreTable.join(1, tmp_path / "table"), list[set[int]]()
    assert table is not None

    def ask() -> None:
        found.extend((table.stay_home(), os.sched_getaffinity(0)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(10)
    assert found == [{ALLOWED[0]}, {ALLOWED[0]}]
    assert sorted(os.sched_getaffinity(0)) == ALLOWED
