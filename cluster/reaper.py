"""`python reaper.py PARENT_PID DIRECTORY`: waits until its stdin ends, then ends what the parent left.

For the one end `tandem serve` cannot tidy up itself, SIGKILL: most children die with it, but Ray's agents, which are
not its own children, would go on for minutes. Every two seconds this notes the parent's descendants; when the parent
is gone, those that still are the same processes are killed and the private directory is removed. Standard library
only, so that the process is small.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

LOOK_INTERVAL = 2.0  # seconds
PERSIST = 5.0  # seconds of killing what keeps appearing

Births = dict[int, int]  # pid → start time in clock ticks: together they name a process for good


def main() -> None:
    parent, directory = int(sys.argv[1]), sys.argv[2]
    known = descendants([parent])
    while not select.select([sys.stdin], [], [], LOOK_INTERVAL)[0]:
        known |= descendants([parent])
    deadline = time.monotonic() + PERSIST
    while (left := _still_there(known)) and time.monotonic() < deadline:
        known = left | descendants(list(left))
        for pid in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(directory, ignore_errors=True)


def descendants(roots: list[int]) -> Births:
    """Of these processes, without this one."""
    found: Births = {}
    table = _processes()
    wanted = set(roots)
    grown = True
    while grown:
        born = {pid: start for pid, (parent, start) in table.items() if parent in wanted and pid not in found}
        found |= born
        wanted |= born.keys()
        grown = bool(born)
    found.pop(os.getpid(), None)
    return found


def _still_there(known: Births) -> Births:
    table = _processes()
    return {pid: start for pid, start in known.items() if pid in table and table[pid][1] == start}


def _processes() -> dict[int, tuple[int, int]]:
    """pid → (parent, start time), zombies left out."""
    table: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                # pid (name, which may hold anything) state ppid …; the start time is field 22
                fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] != "Z":
                    table[int(path.name)] = (int(fields[1]), int(fields[19]))
    return table


if __name__ == "__main__":
    main()
