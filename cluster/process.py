"""Child processes that cannot outlive this one, and the certainty that nothing is left when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from tandem.common import proc

_PR_SET_CHILD_SUBREAPER = 36

# Runs before the real program, in its process: asks the kernel for SIGKILL on the parent's death, then execs.
# Not a preexec_fn, which would run Python between fork and exec of a process with threads.
_SHIM = Path(proc.__file__)
_REAPER = Path(__file__).with_name("reaper.py")


def spawn(command: Sequence[str], env: Mapping[str, str] | None = None, stdout: int | IO[bytes] | None = None,
          stderr: int | IO[bytes] | None = None) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start `command` in a session of its own (a terminal's Ctrl-C is ours to handle), bound to this process's life.

    Call it on the main thread only: to the kernel the parent is the thread, and dies with it.
    """
    shim = [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid())]
    return subprocess.Popen(
        [*shim, *command],
        env=None if env is None else dict(env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds. Returns when the process is gone."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    if process.poll() is None:
        process.kill()
        process.wait(5.0)


def start_reaper(directory: Path) -> subprocess.Popen[bytes] | None:
    """The process that tidies up, `directory` included, if this one is killed. None where there is no /proc."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-I", "-S", str(_REAPER), str(os.getpid()), str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def adopt_orphans() -> None:
    """Descendants whose parent dies become our children, so that `kill_descendants` finds every one (Linux)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def runs(process: psutil.Process) -> bool:
    """Zombies have ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(process: psutil.Process) -> bool:
    """Reaps it, if it has and is a child."""
    try:
        process.wait(0)
    except psutil.TimeoutExpired:
        return False
    return True


def family(process: psutil.Process) -> list[int]:
    """The pids of the process and of whatever it started, directly or not, and is still there."""
    try:
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def kill_descendants(grace: float = 3.0, spare: Collection[int] = ()) -> None:
    """End whatever this process started, directly or not, and is still there, but for the pids to `spare`."""
    deadline = time.monotonic() + grace
    while alive := [child for child in psutil.Process().children(recursive=True) if child.pid not in spare]:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=0.5)
        _reap()
        if time.monotonic() > deadline:
            return  # in uninterruptible sleep: the kernel ends it, we cannot wait


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
