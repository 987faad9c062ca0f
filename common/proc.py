"""Processes that must not outlive the one that started them.

As a script, `python proc.py PARENT_PID PROGRAM ARGS…` becomes PROGRAM, killed by the kernel when the parent dies: for
programs that are not ours. Standard library only, so that it costs next to nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int | None = None, how: signal.Signals = signal.SIGTERM) -> None:
    """Call in the child, early: the kernel will send it `how` when its parent is gone, however that ends.

    `parent_pid`, if the child was told it, closes the gap before this call: if that process is already gone, `how`
    is delivered now. The kernel means the parent's *thread*: start children from one that lives as long as the
    process. Linux only; elsewhere this does nothing. Raises OSError.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), how)


def main() -> None:
    die_with_parent(int(sys.argv[1]), signal.SIGKILL)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
