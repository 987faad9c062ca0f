"""The shell around a worker, as far as it needs no model."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.common import service
from tandem.common.errors import ConfigError, WorkerFailed
from tandem.common.service import WorkerShell, describe, new_incarnation
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_watch import WatchHub
from tests.fakes import Client, make_leg
from tests.worker_pair import KEY, Pair


def make_shell(pair: Pair, redis_url: str) -> WorkerShell:
    decode = pair.d
    config = WorkerConfig(name="decode-0", role="decode", redis_url=redis_url, cluster_key=KEY)
    about = describe(config, new_incarnation(), decode.engine.layout, max_model_len=64, max_num_seqs=4)
    return WorkerShell(config, about, decode.worker, WatchHub(about, decode.worker.load, decode.pool))


def test_a_redis_url_that_cannot_be_is_an_error_at_the_start() -> None:
    """Not a worker that runs and that no router ever hears of."""
    shell = make_shell(Pair(), "nonsense")
    with pytest.raises(ConfigError, match="Redis URL"):
        shell.start(lambda server, shell: None)
    shell.stop()


def test_stop_answers_whoever_waits_for_the_drain_and_closes_the_loop(tmp_path: Path) -> None:
    """An unclosed loop is a leaked socket pair; a drain that waits on would hold up the process's exit."""
    pair = Pair()
    shell = make_shell(pair, f"unix://{tmp_path}/none.sock")
    shell.start(lambda server, shell: None)
    client = Client()
    leg = make_leg("r", [1, 2, 3], ticket=pair.ticket("r"))  # its KV never comes
    pair.d.worker.inbox.put(lambda: pair.d.worker.submit(1, leg, client))
    with ThreadPoolExecutor(1) as executor:
        drained = executor.submit(shell.drain, 60.0)
        shell.stop()
        assert drained.result(timeout=10.0) is False
    assert client.ended and client.error is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del shell
        gc.collect()  # an unclosed loop would warn here, as an unraisable error


# ------------------------------------------------------------------------------------------- health is progress (E63)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[WorkerShell]:
    shell = make_shell(Pair(), f"unix://{tmp_path}/none.sock")
    shell.start(lambda server, shell: None)
    assert shell.healthy()
    yield shell
    shell.stop()


def unhealthy(shell: WorkerShell, within: float = 2.0) -> bool:
    deadline = time.monotonic() + within
    while shell.healthy() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not shell.healthy()


def test_a_dead_worker_loop_is_no_health(shell: WorkerShell) -> None:
    def die() -> None:
        raise WorkerFailed("the engine is lost, says the test")

    shell._worker.inbox.put(die)
    assert unhealthy(shell)
    started = time.monotonic()
    assert shell.drain(60.0) is False, "nobody is left who could finish"
    assert time.monotonic() - started < 5.0


def test_a_dead_heartbeat_is_no_health(shell: WorkerShell) -> None:
    assert shell._heartbeat is not None
    shell._loop.call_soon_threadsafe(shell._heartbeat.cancel)
    assert unhealthy(shell)


def test_a_dead_service_loop_is_no_health(tmp_path: Path) -> None:
    shell = make_shell(Pair(), f"unix://{tmp_path}/none.sock")
    shell.start(lambda server, shell: None)
    shell._loop.call_soon_threadsafe(shell._loop.stop)
    assert unhealthy(shell)
    shell.stop()
    shell._loop.run_until_complete(shell._shut_down())  # what its own thread cannot do any more
    shell._loop.close()


@pytest.mark.parametrize("which", ["worker", "service"])
def test_a_loop_that_stands_still_is_no_health(shell: WorkerShell, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STALLED", 1.5)
    release = threading.Event()

    def stand_still() -> None:
        release.wait(20.0)

    if which == "worker":
        shell._worker.inbox.put(stand_still)
    else:
        shell._loop.call_soon_threadsafe(stand_still)
    try:
        assert unhealthy(shell, within=4.0)
    finally:
        release.set()


def test_a_worker_that_only_waits_is_healthy(shell: WorkerShell, monkeypatch: pytest.MonkeyPatch) -> None:
    """No work, and no Redis: both loops come round all the same."""
    monkeypatch.setattr(service, "STALLED", 1.5)
    assert not unhealthy(shell, within=3.0)
