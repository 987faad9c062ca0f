"""What becomes of the workers of a Ray that died: they stay until replaced, then leave, if need be by force."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tandem.cluster.controller import STOP_GRACE, ClusterView, SlotPhase, WorkerView
from tandem.cluster.handover import LocalRay, Outgoing
from tandem.common.hosted import Report

POLITE = "print('up', flush=True); import time; time.sleep(600)"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); " + POLITE
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def run(*command: str, says: bytes = b"up\n") -> subprocess.Popen[bytes]:
            child = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(child.kill)
            assert child.stdout is not None
            assert not says or child.stdout.readline() == says
            return child

        yield run


def view(phase: SlotPhase, *pids: int) -> ClusterView:
    workers = (WorkerView(f"decode-{pid}", "decode", phase, Report("ready", pid=pid), 0, "") for pid in pids)
    return ClusterView({"decode": len(pids)}, tuple(workers))


def gone(*children: subprocess.Popen[bytes]) -> bool:
    return not any(psutil.pid_exists(child.pid) for child in children)


def step_until(outgoing: Outgoing, now: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        outgoing.step(False, now)
        time.sleep(0.01)


def test_they_stay_until_others_are_ready_and_leave_no_zombie(start: Start) -> None:
    old, loading = start(sys.executable, "-c", POLITE), start(sys.executable, "-c", POLITE)
    outgoing = Outgoing(patience=5.0)
    outgoing.add(view("ready", old.pid))
    outgoing.add(view("loading", loading.pid))
    outgoing.step(False, 0.0)
    assert old.poll() is None
    outgoing.step(True, 1.0)
    step_until(outgoing, 1.0, lambda: gone(old))
    assert loading.poll() is None, "what loads serves nobody, and is not kept"


def test_one_that_does_not_leave_is_killed_when_its_patience_is_over(start: Start) -> None:
    deaf = start(sys.executable, "-c", DEAF)
    outgoing = Outgoing(patience=5.0)
    outgoing.add(view("ready", deaf.pid))
    outgoing.step(True, 1.0)
    outgoing.step(True, 1.0 + 5.0 + STOP_GRACE - 0.1)
    assert not gone(deaf)
    outgoing.step(True, 1.0 + 5.0 + STOP_GRACE)
    step_until(outgoing, 100.0, lambda: gone(deaf))


def test_a_second_loss_keeps_those_of_the_first(start: Start) -> None:
    first, second = start(sys.executable, "-c", POLITE), start(sys.executable, "-c", POLITE)
    outgoing = Outgoing(patience=5.0)
    outgoing.add(view("ready", first.pid))
    outgoing.add(view("ready", second.pid))
    assert sorted(outgoing.family) == sorted([first.pid, second.pid])


def test_the_ranks_of_a_worker_are_kept_with_it(start: Start) -> None:
    worker = start(sys.executable, "-c", PARENT, POLITE)
    outgoing = Outgoing(patience=5.0)
    outgoing.add(view("ready", worker.pid))
    ranks = [child.pid for child in psutil.Process(worker.pid).children()]
    assert len(ranks) == 1 and set(outgoing.family) == {worker.pid, *ranks}
    os.kill(ranks[0], 9)


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_ray_without_one_of_its_parts_is_dead(part: str, tmp_path: Path, start: Start) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    parts = {name: start(shutil.copy(sleep, tmp_path / name), "600", says=b"") for name in ("gcs_server", "raylet")}
    expected = {child.pid for child in parts.values()}
    deadline = time.monotonic() + 10.0
    while {c.pid for c in psutil.Process().children() if c.name() in parts} != expected:
        assert time.monotonic() < deadline, "they have not become what they are called"
    ray = LocalRay()
    assert ray.alive
    parts[part].kill()
    while ray.alive:
        assert time.monotonic() < deadline
