"""The private directory of one `tandem serve`: Redis' socket, Ray's session, and where `tandem scale` finds them.

    <tmp>/tandem-<uid>-<random>/     mode 0700
        serve.json                   the Record, once the cluster is up
        redis.sock
        ray/                         Ray's sockets and logs

A serve that was killed leaves its directory; the next one that starts sweeps it away.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tandem.common.errors import ConfigError

# A unix socket's path may have 107 bytes, and Ray appends up to 75 to its directory.
_LONGEST_PARENT = 12


@dataclass(frozen=True, slots=True)
class Record:
    """What another command of the same user must know to reach a running serve."""

    pid: int
    url: str
    ray_address: str
    namespace: str


class RunDir:
    def __init__(self) -> None:
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=_parent()))
        (self.path / "pid").write_text(str(os.getpid()))

    @property
    def redis_socket(self) -> Path:
        return self.path / "redis.sock"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    def write(self, record: Record) -> None:
        partial = self.path / "serve.json.new"
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(self.path / "serve.json")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def find(url: str) -> Record:
    """The running serve of this user and machine that answers at `url`. Raises ConfigError."""
    try:
        asked, port = urlsplit(url).hostname, urlsplit(url).port
    except ValueError as exc:
        raise ConfigError(f"{url} is not the URL of a server: {exc}") from exc
    here = {"127.0.0.1", "localhost", "::1", socket.gethostname()}
    served = [(urlsplit(record.url), record) for record in _records()]
    records = [record for at, record in served if at.port == port and asked in {at.hostname, *here}]
    if not records:
        raise ConfigError(f"no `tandem serve` of yours answers at {url} on this machine; give --url or --ray-address")
    return records[0]


def _records() -> Iterator[Record]:
    for directory in _directories():
        try:
            fields = json.loads((directory / "serve.json").read_text())
            record = Record(
                int(fields["pid"]), str(fields["url"]), str(fields["ray_address"]), str(fields["namespace"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not up yet, or gone while we looked
        if psutil.pid_exists(record.pid):
            yield record


def _sweep() -> None:
    for directory in _directories():
        try:
            pid = int((directory / "pid").read_text())
        except (OSError, ValueError):
            continue  # being made or removed right now
        if not psutil.pid_exists(pid):
            shutil.rmtree(directory, ignore_errors=True)


def _directories() -> list[Path]:
    found = sorted(Path(_parent()).glob(_prefix() + "*"))
    return [path for path in found if path.is_dir() and path.stat().st_uid == os.getuid()]


def _parent() -> str:
    parent = tempfile.gettempdir()
    return parent if len(parent) <= _LONGEST_PARENT else "/tmp"


def _prefix() -> str:
    return f"tandem-{os.getuid()}-"
