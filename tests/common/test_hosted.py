"""A hosted worker's phases, with a server that does what the test tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager

import pytest

from tandem.common.errors import ModelError
from tandem.common.hosted import KEEPER_INTERVAL, HostedWorker, HostOptions, OnProgress, Phase


class FakeServer:
    incarnation = "abc"

    def __init__(self) -> None:
        self.may_finish = threading.Event()
        self.drains: list[float] = []
        self.stops = 0
        self.alive = True

    def describe(self) -> Mapping[str, object]:
        return {"kv_blocks": 7}

    def healthy(self) -> bool:
        return self.alive

    def drain(self, timeout: float) -> bool:
        self.drains.append(timeout)
        return self.may_finish.wait(min(timeout, 10.0))

    def stop(self) -> None:
        self.stops += 1
        self.alive = False
        self.may_finish.set()

    @property
    def stopped(self) -> bool:
        return self.stops > 0


def reach(worker: HostedWorker, phase: Phase) -> None:
    until(lambda: worker.report().phase == phase)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def host(start: Callable[[OnProgress], FakeServer]) -> HostedWorker:
    return HostedWorker("decode-0", start, HostOptions())


def test_it_answers_while_it_loads_and_tells_the_progress() -> None:
    loaded = threading.Event()
    server = FakeServer()

    def start(on_progress: OnProgress) -> FakeServer:
        on_progress(3, 10)
        assert loaded.wait(10.0)
        return server

    worker = host(start)
    until(lambda: worker.report().loaded == 3)
    report = worker.report()
    assert (report.phase, report.total, report.facts) == ("loading", 10, ())
    loaded.set()
    reach(worker, "ready")
    assert worker.report().incarnation == "abc"
    assert worker.report().facts == (("kv_blocks", "7"),)
    assert repr(worker) == "decode-0"


def test_draining_ends_in_a_stopped_server() -> None:
    server = FakeServer()
    worker = host(lambda _: server)
    reach(worker, "ready")
    worker.drain(9.0)
    reach(worker, "draining")
    assert not server.stopped
    server.may_finish.set()
    reach(worker, "stopped")
    assert (server.drains, server.stops) == ([9.0], 1)


def test_what_does_not_end_in_time_is_given_up() -> None:
    server = FakeServer()
    worker = host(lambda _: server)
    reach(worker, "ready")
    worker.drain(0.01)
    reach(worker, "stopped")
    assert server.stopped


def test_draining_twice_is_draining_once() -> None:
    server = FakeServer()
    worker = host(lambda _: server)
    reach(worker, "ready")
    worker.drain(9.0)
    reach(worker, "draining")
    worker.drain(9.0)
    until(lambda: sum(thread.name == "drain" for thread in threading.enumerate()) == 1)  # the second has returned
    assert worker.report().phase == "draining" and not server.stopped
    server.may_finish.set()
    reach(worker, "stopped")
    assert (len(server.drains), server.stops) == (1, 1)


def test_stopping_cuts_a_drain_short() -> None:
    server = FakeServer()
    worker = host(lambda _: server)
    reach(worker, "ready")
    worker.drain(9.0)
    reach(worker, "draining")
    worker.stop()
    reach(worker, "stopped")
    assert server.stops == 1


def test_a_dead_loop_is_a_failure_that_another_start_may_heal() -> None:
    server = FakeServer()
    worker = host(lambda _: server)
    reach(worker, "ready")
    server.alive = False
    report = worker.report()
    assert (report.phase, report.permanent) == ("failed", False)
    assert report.error


def test_a_broken_model_is_permanent() -> None:
    def start(_: OnProgress) -> FakeServer:
        raise ModelError("config.json: missing")

    worker = host(start)
    reach(worker, "failed")
    assert worker.report().error == "config.json: missing"
    assert worker.report().permanent


def test_another_failure_names_its_class_and_is_not_permanent(caplog: pytest.LogCaptureFixture) -> None:
    def start(_: OnProgress) -> FakeServer:
        raise MemoryError("no room")

    worker = host(start)
    reach(worker, "failed")
    assert worker.report().error == "MemoryError: no room"
    assert not worker.report().permanent


def test_stopping_while_it_loads_stops_the_server_that_comes_late() -> None:
    loaded = threading.Event()
    server = FakeServer()

    def start(_: OnProgress) -> FakeServer:
        assert loaded.wait(10.0)
        return server

    worker = host(start)
    worker.stop()
    reach(worker, "stopped")
    loaded.set()
    until(lambda: server.stopped)
    assert worker.report().phase == "stopped"


# A process whose main thread is deep in native code, as an actor's in Ray's loop: no Python handler runs there.
_PROCESS = """
import hashlib, sys, threading
from tandem.common.hosted import HostedWorker, HostOptions

class Server:
    incarnation = "abc"
    def describe(self): return {}
    def healthy(self): return True
    def drain(self, timeout):
        print("draining", timeout, flush=True)
        return MAY_FINISH.wait(60)
    def stop(self): print("stopped", flush=True)

MAY_FINISH = threading.Event()
def wait(): sys.stdin.readline(); MAY_FINISH.set()
threading.Thread(target=wait, daemon=True).start()
worker = HostedWorker("decode-0", lambda _: Server(), HostOptions(drain_timeout=7.0, keeper=KEEPER))
worker.leave_on_sigterm()
while worker.report().phase != "ready": pass
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with start_process() as child:
        yield child


@contextmanager
def start_process(keeper: int = 0) -> Generator[subprocess.Popen[str]]:
    script = _PROCESS.replace("KEEPER", str(keeper))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


def test_sigterm_drains_and_ends_the_process_in_order(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "draining 7.0\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "stopped\n"
    assert process.wait(10.0) == 0


def test_a_second_sigterm_ends_it_at_once(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "draining 7.0\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(1.0) == 128 + signal.SIGTERM


def test_a_worker_whose_keeper_is_gone_ends() -> None:
    """Its Ray may be gone, and the process that would tidy up too: it must not serve nobody for ever."""
    with subprocess.Popen(["sleep", "60"]) as keeper, start_process(keeper.pid) as child:
        keeper.kill()
        keeper.wait(5.0)
        assert child.wait(KEEPER_INTERVAL + 5.0) == 1


def test_workers_that_share_a_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    HostedWorker("decode-0", lambda _: FakeServer(), HostOptions(sharing=1))
    assert os.environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    HostedWorker("decode-0", lambda _: FakeServer(), HostOptions(sharing=10_000))
    assert os.environ["OMP_NUM_THREADS"] == "1"
