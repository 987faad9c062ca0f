"""A table in shared memory through which the workers of one machine lend each other the cores they do not use.

    a line of 64 bytes a worker      when it last began a task | cores of its own | prompts it has      (cpu/team.h)

A line belongs to whoever holds a lock on its first byte. The system releases that with its holder, and a line whose
holder is gone says nothing any more, because its time grows old: there is nothing to tidy up after a crash.

Behind the lines a byte for each processor is locked by whom it is a home of. A worker's own thread stays at home, so
decode and prefill do not meet on one core while another is idle; the helpers that it lends and borrows go anywhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

LINE, LINES = 64, 64  # bytes of a line; workers of one user on one machine
FIELDS = np.dtype({"names": ["seen", "cores", "prompts"], "formats": ["<i8", "<i4", "<i4"], "itemsize": LINE})
BUSY = 5_000_000  # nanoseconds since its last task after which a worker is at rest, as in team.h


class CoreTable:
    """`own` cores belong to this process while it lives; it may use others as long as nobody else does."""

    def __init__(self, descriptor: int, mine: int, own: int) -> None:
        self._descriptor = descriptor  # closing it would release the lock
        self._memory = mmap.mmap(descriptor, LINE * LINES)
        self._table = np.frombuffer(self._memory, FIELDS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.lines, self.mine, self.own = LINES, mine, own
        self._home: set[int] | None = None  # None: nobody has looked for one yet

    def stay_home(self) -> set[int]:
        """Keep the calling thread on `own` processors that are nobody else's home, if there are; once a process.

        Returns them.
        """
        if self._home is None:
            self._home = set()
            homes = (cpu for cpu in sorted(os.sched_getaffinity(0)) if _lock(self._descriptor, LINE * LINES + cpu))
            found = set(islice(homes, self.own))
            if len(found) == self.own:
                os.sched_setaffinity(0, found)
                self._home = found
            else:
                _unlock(self._descriptor, [LINE * LINES + cpu for cpu in found])
        return self._home

    def post_prompts(self, count: int) -> None:
        """Tell the others how many prompts this worker computes or has waiting."""
        self._table["prompts"][self.mine] = count

    def prompts_elsewhere(self) -> int:
        """What the others that are busy now have told."""
        busy = time.monotonic_ns() - self._table["seen"] < BUSY
        busy[self.mine] = False
        return int(self._table["prompts"][busy].sum())

    @classmethod
    def join(cls, own: int, path: Path) -> CoreTable | None:
        """Take a line. None where that cannot be: no room for one more, a file of somebody else's, or no locks."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                os.posix_fallocate(descriptor, 0, LINE * LINES)  # a write into a full file system would end us
                mine = next((line for line in range(LINES) if _lock(descriptor, line * LINE)), None)
                if mine is not None:
                    return cls(descriptor, mine, own)
        except OSError:
            pass
        os.close(descriptor)
        return None


@functools.cache
def table(own: int) -> CoreTable | None:
    """This process's line in the table of this machine and user."""
    memory = Path("/dev/shm")
    directory = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return CoreTable.join(own, directory / f"tandem-cores-{os.getuid()}")


def _lock(descriptor: int, byte: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError:
        return False
    return True


def _unlock(descriptor: int, found: Iterable[int]) -> None:
    for byte in found:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, byte)
