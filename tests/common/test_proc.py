"""A child that asked for it dies with its parent, even when the parent is killed outright."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from tandem.common.proc import die_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

GRANDCHILD = """
import os, signal, sys
from tandem.common.proc import die_with_parent
die_with_parent(os.getppid(), signal.SIGKILL)
print(os.getpid(), flush=True)
signal.pause()
"""
CHILD = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
signal.pause()
"""


def test_killed_parent_takes_the_child_along() -> None:
    parent = subprocess.Popen([sys.executable, "-c", CHILD, GRANDCHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.wait(10)
            readable, _, _ = select.select([pidfd], [], [], 10)  # readable once the process has ended
            assert readable
        finally:
            os.close(pidfd)


def test_parent_gone_before_the_call() -> None:
    script = "import os, signal; from tandem.common.proc import die_with_parent; die_with_parent(os.getpid())"
    done = subprocess.run([sys.executable, "-c", script], timeout=30, check=False)
    assert done.returncode == -signal.SIGTERM


def test_impossible_signal_is_an_error() -> None:
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG"):
        die_with_parent(how=9999)  # pyright: ignore[reportArgumentType]
