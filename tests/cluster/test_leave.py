"""A pod's preStop hook: it tells the workers to drain, and nobody else, and it waits for them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = """
import signal, sys, time
def drain(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
while True: signal.pause()
"""

LEAVE = [sys.executable, "-m", "tandem.cluster.leave", str(os.getpid())]


def start(title: str, note: Path) -> subprocess.Popen[str]:
    command = f"exec -a {title} {shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} {note}"
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_every_worker_is_drained_and_waited_for(tmp_path: Path) -> None:
    titles = ["ray::PrefillActor", "ray::DecodeActor.report", "ray::IDLE"]
    processes = [start(title, tmp_path / str(number)) for number, title in enumerate(titles)]
    with processes[0] as prefill, processes[1] as decode, processes[2] as idle:
        try:
            hook = subprocess.Popen(LEAVE)
            assert prefill.wait(20) == 0 and decode.wait(20) == 0
            assert hook.wait(20) == 0
            assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "drained"
            assert psutil.pid_exists(idle.pid) and idle.poll() is None
        finally:
            for process in processes:
                process.kill()


def test_nothing_to_drain_is_done_at_once() -> None:
    started = time.monotonic()
    assert subprocess.run(LEAVE, timeout=20, check=False).returncode == 0
    assert time.monotonic() - started < 10.0
