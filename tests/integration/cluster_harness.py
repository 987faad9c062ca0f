"""Starts a real `tandem serve` for a test, and proves afterwards that it left nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Cluster:
    """A running `tandem serve`. `lines` grows while it runs."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list[str])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.base_url}/status", timeout=5.0) as response:
            return cast(dict[str, Any], json.load(response))

    def worker(self, name: str) -> dict[str, Any] | None:
        return next((worker for worker in self.status()["workers"] if worker["name"] == name), None)

    def wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"serve ended while waiting for {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s:\n{self.output}"
            time.sleep(0.05)

    def run(self, command: str, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`tandem COMMAND ARGUMENTS --url …`."""
        line = [sys.executable, "-m", "tandem", command, *arguments, "--url", self.base_url]
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def serve(
    *flags: str, env: Mapping[str, str] | None = None, ready_within: float = 120.0, end_within: float = 20.0
) -> Generator[Cluster]:
    """`tandem serve FLAGS` on a free port, ready to answer; ends with SIGINT and a look for what is left."""
    before = shared_memory()
    cluster = start(*flags, env=env)
    try:
        cluster.wait_until(lambda: "Tandem serves" in cluster.output, ready_within, "being ready")
        yield cluster
        family = family_of(cluster)
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(end_within) == 0, cluster.output
        assert_gone(cluster, family, before)
    finally:
        if cluster.process.poll() is None:
            cluster.process.send_signal(signal.SIGTERM)
            try:
                cluster.process.wait(end_within)
            except subprocess.TimeoutExpired:
                cluster.process.kill()


def start(*flags: str, env: Mapping[str, str] | None = None) -> Cluster:
    """Without waiting for anything."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", "serve", *flags, "--port", str(port)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    cluster = Cluster(process, port)
    threading.Thread(target=_collect, args=(cluster,), daemon=True).start()
    return cluster


def family_of(cluster: Cluster) -> list[psutil.Process]:
    return psutil.Process(cluster.process.pid).children(recursive=True)


def assert_gone(cluster: Cluster, family: list[psutil.Process], before: set[Path], within: float = 0.0) -> None:
    """No process of `family`, no listening socket, no file in shared memory and no directory is left.

    `before`: what shared memory held before the start.
    """
    psutil.wait_procs(family, timeout=within)
    left = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"still running: {[(process.pid, process.name()) for process in left]}"
    orphaned = {path for path in shared_memory() - before if not _mapped(path)}
    assert not orphaned, f"left behind: {orphaned}"
    assert not run_directories(cluster), f"left behind: {run_directories(cluster)}"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", cluster.port))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return cast(int, listener.getsockname()[1])


def shared_memory() -> set[Path]:
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def _mapped(path: Path) -> bool:
    """Some living process, so none of ours, uses it."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return not path.exists()


def run_directories(cluster: Cluster) -> list[Path]:
    """Private directories of this serve: sockets, Ray's session. One while it runs."""
    pids = Path(tempfile.gettempdir()).glob(f"tandem-{os.getuid()}-*/pid")
    return [path.parent for path in pids if path.read_text() == str(cluster.process.pid)]


def _collect(cluster: Cluster) -> None:
    assert cluster.process.stdout is not None
    with cluster.process.stdout as output:
        for line in output:
            cluster.lines.append(line.rstrip("\n"))
