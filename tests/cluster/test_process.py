"""Children bound to their parent's life, and the reaper for those that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tandem.cluster import process, reaper

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def wait_up(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"up\n"


def test_stop_is_polite_first_and_then_is_not() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    polite = process.spawn(SLEEP, stdout=subprocess.PIPE)
    deaf = process.spawn([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    for child in (polite, deaf):
        wait_up(child)
        process.stop(child, grace=0.2 if child is deaf else 5.0)
    assert (polite.returncode, deaf.returncode) == (-15, -9)


def test_a_child_is_in_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it() -> None:
    child = process.spawn(SLEEP, stdout=subprocess.PIPE)
    try:
        wait_up(child)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        process.stop(child, grace=5.0)


def test_descendants_are_found_through_every_generation() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = process.spawn([sys.executable, "-c", nested, SLEEP[-1]], stdout=subprocess.PIPE)
    try:
        wait_up(child)
        expected = {p.pid for p in psutil.Process(child.pid).children()} | {child.pid}
        found = reaper.descendants([os.getpid()])
        assert len(expected) == 2 and expected <= found.keys()
        assert os.getpid() not in found
    finally:
        for grandchild in psutil.Process(child.pid).children():
            grandchild.kill()
        process.stop(child, grace=5.0)


def test_the_reaper_ends_what_a_killed_serve_left(tmp_path: Path) -> None:
    """A grandchild that outlives its parents, as Ray's agents do."""
    directory = tmp_path / "run"
    directory.mkdir()
    program = (
        "import pathlib, subprocess, sys, time; from tandem.cluster import process\n"
        "reaper = process.start_reaper(pathlib.Path(sys.argv[1]))\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[2]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, reaper.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(directory), SLEEP[-1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as serve:
        assert serve.stdout is not None
        orphan, watcher = (psutil.Process(int(pid)) for pid in serve.stdout.readline().split())
        looks = watcher.num_ctx_switches().voluntary
        while watcher.num_ctx_switches().voluntary <= looks:  # until it has woken up, and so looked, once more
            assert watcher.is_running()
        serve.kill()
    watcher.wait(15.0)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert not directory.exists()
