"""The template of a ProcessCluster: imports everything once, then forks `tandem …` commands in milliseconds.

    stdin   {"name": …, "argv": [tandem's arguments], "failpoints": directory, "log": file}   keep it alive from now on
            {"name": …}                                                                    let its next end be its last
    stdout  NAME started PID          NAME ended PID STATUS

It is the operator, too: what ends is started again at once. It has a single thread and no channel of gRPC, so a fork
of it is as good as a new interpreter. Its children die with it, and it with its parent.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

from tandem.common import failpoints
from tandem.common.proc import die_with_parent

TICK = 0.01  # seconds between looks for ended children
CRASH_PAUSE = 0.5  # seconds, for one that did not live that long


def main() -> None:
    die_with_parent(int(sys.argv[1]), signal.SIGKILL)
    import tandem.cluster.roles
    import tandem.decode_worker.service
    import tandem.prefill_worker.service
    import tandem.router.__main__  # noqa: F401

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"
    Template().run()


class Template:
    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Any]] = {}  # orders by name
        self._running: dict[int, tuple[str, float]] = {}  # pid → name, when it was started
        self._due: dict[str, float] = {}  # name → when to start it
        self._unread = b""

    def run(self) -> None:
        """Until end of file on stdin; then everything is killed."""
        while True:
            if select.select([0], [], [], TICK)[0] and not self._read():
                break
            self._reap()
            for name in [name for name, due in self._due.items() if due <= time.monotonic()]:
                del self._due[name]
                self._start(self._kept[name])
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)

    def _read(self) -> bool:
        """What is there now, unbuffered so that select() and we agree. False at the end."""
        data = os.read(0, 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(data)

    def _take(self, order: dict[str, Any]) -> None:
        name = order["name"]
        if "argv" in order:
            self._kept[name], self._due[name] = order, 0.0
        else:
            del self._kept[name]
            self._due.pop(name, None)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            name, started = self._running.pop(pid)
            print(name, "ended", pid, os.waitstatus_to_exitcode(status), flush=True)
            if name in self._kept:
                now = time.monotonic()
                self._due[name] = now + (CRASH_PAUSE if now - started < CRASH_PAUSE else 0.0)

    def _start(self, order: dict[str, Any]) -> None:
        parent, pid = os.getpid(), os.fork()
        if not pid:
            become(order, parent)
        self._running[pid] = (order["name"], time.monotonic())
        print(order["name"], "started", pid, flush=True)


def become(order: dict[str, Any], parent: int) -> None:
    """In the child: `tandem ARGV`, and then the end of the process, whatever happens."""
    code: int | str | None = 70
    try:
        die_with_parent(parent, signal.SIGKILL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        failpoints.configure({failpoints.DIRECTORY: order["failpoints"]})
        sys.argv = ["tandem", *order["argv"]]
        from tandem.cluster.cli import main as tandem

        tandem()
        code = 0
    except SystemExit as exc:
        code = exc.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
