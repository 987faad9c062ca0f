"""Children bound to their parent's life, and the reaper for those that are not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

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


def test_the_reaper_ends_what_a_killed_serve_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild that outlives its parents, as Ray's agents do."""
    (tmp_path / "run").mkdir()
    nested = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    looked, look = threading.Event(), reaper.descendants

    def tell(roots: list[int]) -> reaper.Births:
        found = look(roots)
        looked.set()
        return found

    monkeypatch.setattr(reaper, "descendants", tell)
    read_end, write_end = os.pipe()
    with (
        subprocess.Popen([sys.executable, "-c", nested, SLEEP[-1]], stdout=subprocess.PIPE) as serve,
        os.fdopen(read_end) as stdin,
    ):
        assert serve.stdout is not None
        orphan = psutil.Process(int(serve.stdout.readline()))
        monkeypatch.setattr(sys, "argv", ["reaper.py", str(serve.pid), str(tmp_path / "run")])
        monkeypatch.setattr(sys, "stdin", stdin)
        watching = threading.Thread(target=reaper.main)
        watching.start()
        assert looked.wait(10.0)
        serve.kill()
        serve.wait()
        os.close(write_end)
        watching.join(15.0)
        assert not watching.is_alive()
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "run").exists()
