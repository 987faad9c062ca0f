"""The router as a child of `tandem serve`: started, watched, restarted, and its lines passed on."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.cluster import process
from tandem.cluster.options import ClusterFlags, RouterFlags
from tandem.common.worker_config import KEY_VARIABLE

_LONGEST_WAIT = 30.0  # seconds between restarts


@dataclass(frozen=True, slots=True)
class RouterCommand:
    """Secrets travel in the environment; a command line is visible to every user of the machine."""

    arguments: tuple[str, ...]
    secrets: dict[str, str] = field(repr=False)


def router_command(
    flags: RouterFlags, cluster: ClusterFlags, redis_url: str, key: bytes, prefill: int
) -> RouterCommand:
    """For a model whose directory is `flags.model`."""
    names = flags.served_model_name or []
    pairs = [
        *flags.router_arguments(),
        *cluster.arguments(),
        ("--prefill-expected", str(prefill)),
        ("--model-dir", flags.model or ""),
    ]
    arguments = [part for pair in pairs for part in pair]
    if names:
        arguments += ["--served-model-name", *names]
    secrets = {KEY_VARIABLE: key.hex(), "TANDEM_REDIS_URL": redis_url}
    if flags.api_key:
        secrets["TANDEM_API_KEY"] = flags.api_key
    return RouterCommand(tuple(arguments), secrets)


class RouterProcess:
    """`on_line` gets each line it writes, on a thread of its own; lines before `show` are held back."""

    def __init__(self, command: RouterCommand, on_line: Callable[[str], None]) -> None:
        self._command = command
        self._on_line = on_line
        self._held: deque[str] | None = deque(maxlen=100)
        self._failures = 0
        self._retry_at = 0.0
        self._process = self._start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def shown(self) -> bool:
        return self._held is None

    @property
    def last_line(self) -> str:
        """Of those held back: why it ended, if it did."""
        self._reader.join(1.0)
        return self._held[-1] if self._held else ""

    def show(self) -> None:
        """Pass on what was held back, and every line from now on."""
        held, self._held = self._held, None
        for line in held or ():
            self._on_line(line)

    def revive(self, now: float) -> str:
        """Start it again if it died, not too often. A line to print, or ''. Main thread only."""
        code = self._process.poll()
        if code is None or now < self._retry_at:
            return ""
        self._failures += 1
        self._retry_at = now + min(_LONGEST_WAIT, 0.5 * 2.0 ** min(self._failures, 10))
        self._process = self._start()
        return f"the router ended with status {code} and was started again"

    def stop(self, grace: float) -> None:
        process.stop(self._process, grace)

    def _start(self) -> subprocess.Popen[bytes]:
        child = process.spawn(
            [sys.executable, "-m", "tandem.router", *self._command.arguments],
            env=os.environ | self._command.secrets,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, args=(child,), name="router-output", daemon=True)
        self._reader.start()
        return child

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as output:
            for raw in output:
                line = raw.decode("utf-8", "replace").rstrip()
                if self._held is not None:
                    self._held.append(line)
                else:
                    self._on_line(line)


def is_ready(host: str, port: int) -> bool:
    """Whether GET /readyz answers 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
