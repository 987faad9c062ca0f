"""A server of a benchmark's own, and what its processes cost."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil

from tandem.cluster.router_process import is_ready

START_WITHIN = 120.0  # seconds
STOP_WITHIN = 60.0
TICK = 0.2


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """`tandem serve FLAGS` on a free port: its URL, once it is ready. Raises SystemExit if it never is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tandem", "serve", "--port", str(port), "--no-dashboard", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_WITHIN
        while not is_ready("127.0.0.1", port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"`tandem serve` was not ready within {START_WITHIN:.0f} s")
            time.sleep(TICK)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_WITHIN)


def router_listening_on(url: str) -> int | None:
    """The process behind the port; None where the system does not tell."""
    port = httpx.URL(url).port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,):
            return connection.pid
    return None


def processor_time(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it, which Python lacks


def wakes(pid: int) -> int:
    """How often a process's first thread, which runs its event loop, has waited for something."""
    return psutil.Process(pid).num_ctx_switches().voluntary
