"""A hosted worker's phases, with a server that does what the test tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from tandem.common.errors import ModelError
from tandem.common.hosted import HostedWorker, HostOptions, OnProgress, Phase


class FakeServer:
    incarnation = "abc"

    def __init__(self) -> None:
        self.may_finish = threading.Event()
        self.stopped = False
        self.alive = True

    def describe(self) -> Mapping[str, object]:
        return {"kv_blocks": 7}

    def healthy(self) -> bool:
        return self.alive

    def drain(self) -> None:
        assert self.may_finish.wait(10.0)

    def stop(self) -> None:
        self.alive = False
        self.stopped = True


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
    worker.drain()
    reach(worker, "draining")
    assert not server.stopped
    server.may_finish.set()
    reach(worker, "stopped")
    assert server.stopped


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
