"""A cluster of real processes without Ray: Redis, `tandem router`, `tandem prefill` and `tandem decode`.

An operator (worker_process.py) starts again what ends. Whatever a test does to the processes, leaving the cluster
proves that no process is left; `assert_at_rest` proves that no block is.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tandem.cluster.local_redis import LocalRedis
from tandem.common import failpoints
from tandem.common.errors import TandemError
from tandem.common.worker_config import KEY_VARIABLE
from tandem.common.worker_info import Load, WorkerEvent
from tandem.router.worker_client import WorkerClient
from tests.faults.clients import PLAIN

ROOT = Path(__file__).parents[2]
POLL = 0.02  # seconds between looks at other processes
TAIL = 4000  # bytes of each log shown with a failure
ROUTER = "router"


class ProcessCluster(AbstractContextManager["ProcessCluster"]):
    """Processes are called router, prefill-0, prefill-1 …, decode-0 …; a role is the part before the dash."""

    def __init__(self, model: Path, prefill: int = 2, decode: int = 2, *, worker_flags: tuple[str, ...] = (),
                 router_flags: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.key = secrets.token_bytes(32)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._prefill = prefill
        self.workers = [*(f"prefill-{i}" for i in range(prefill)), *(f"decode-{i}" for i in range(decode))]
        self._model, self._worker_flags, self._router_flags = model, worker_flags, router_flags
        self._pids: dict[str, int] = {}
        self._killed = set[int]()  # a pid stays in `_pids`, and for the router ready, until its end is noticed
        self._addresses: dict[int, str] = {}  # pid → where the worker listens, as far as the router has told
        self._changed = threading.Condition()
        self._started: list[psutil.Process] = []
        self._stack = ExitStack()

    # ------------------------------------------------------------------ life

    def __enter__(self) -> ProcessCluster:
        with self._stack as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-test-")))
            self._redis = LocalRedis(self._directory / "redis.sock")
            stack.callback(self._redis.stop)
            self._template = self._start_template()
            stack.callback(self._stop_template)
            self._redis.wait()
            for name in (ROUTER, *self.workers):
                self.keep(name)
            with self.explained():
                self.wait_ready(60.0)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        left = [process for process in self._started if process.is_running()]
        assert not left, f"still running: {left}"

    def _start_template(self) -> subprocess.Popen[str]:
        environ = {KEY_VARIABLE: self.key.hex(), "TANDEM_REDIS_URL": self._redis.url, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker_process", str(os.getpid())],
            cwd=ROOT, env=os.environ | environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(process,), name="template")
        self._reader.start()
        return process

    def _stop_template(self) -> None:
        assert self._template.stdin is not None
        self._template.stdin.close()
        try:
            self._template.wait(10.0)
        finally:
            self._template.kill()
            self._reader.join(5.0)

    def _read(self, template: subprocess.Popen[str]) -> None:
        assert template.stdout is not None
        with template.stdout as lines:
            for line in lines:
                name, what, pid, *_ = line.split()
                with self._changed:
                    if what == "started":
                        self._pids[name] = int(pid)
                        self._started.append(psutil.Process(int(pid)))
                    else:
                        del self._pids[name]
                    self._changed.notify_all()

    # ------------------------------------------------------------------ processes

    def keep(self, name: str) -> None:
        """Start it, and again whenever it ends."""
        role = name.partition("-")[0]
        (self._directory / role).mkdir(exist_ok=True)
        self._tell({
            "name": name,
            "argv": self._router_command() if role == ROUTER else self._worker_command(role, name),
            "failpoints": str(self._directory / role),
            "log": str(self._log(name)),
        })  # fmt: skip

    def release(self, name: str) -> None:
        """Let its next end be its last."""
        self._tell({"name": name})

    def pid(self, name: str) -> int | None:
        with self._changed:
            return self._pids.get(name)

    def kill(self, name: str, signum: signal.Signals = signal.SIGKILL) -> int:
        """The pid that got the signal."""
        with self._changed:
            pid = self._pids[name]
            os.kill(pid, signum)
            if signum == signal.SIGKILL:
                self._killed.add(pid)
        return pid

    def wait_ended(self, name: str, pid: int, timeout: float = 10.0) -> None:
        with self._changed:
            ended = self._changed.wait_for(lambda: self._pids.get(name) != pid, timeout)
        assert ended, f"{name} (pid {pid}) did not end within {timeout} s"

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._template.stdin is not None
        self._template.stdin.write(json.dumps(order) + "\n")
        self._template.stdin.flush()

    def _router_command(self) -> list[str]:
        return [
            ROUTER, str(self._model), "--served-model-name", "m", "--port", str(self._port), "--prefill",
            str(self._prefill), "--log-level", "info", *self._router_flags,
        ]  # fmt: skip

    def _worker_command(self, role: str, name: str) -> list[str]:
        return [role, str(self._model), "--name", name, "--device", "cpu", "--log-level", "info", *self._worker_flags]

    # ------------------------------------------------------------------ faults

    def arm(self, role: str, name: str, action: str) -> None:
        """For one process of `role`: whichever comes to the failpoint first."""
        failpoints.arm(self._directory / role, name, action)

    def wait_hit(self, role: str, name: str, timeout: float = 20.0) -> None:
        until((self._directory / role / f"{name}.hit").exists, timeout, f"{name} was not hit")

    def let_go(self, role: str, name: str) -> None:
        """End a hold or delay."""
        (self._directory / role / f"{name}.release").touch()

    # ------------------------------------------------------------------ what is true

    def status(self) -> dict[str, dict[str, Any]]:
        """name → what the router says of the worker; empty while there is no router."""
        try:
            return {
                worker["name"]: worker for worker in httpx.get(self.url + "/status", verify=PLAIN).json()["workers"]
            }
        except httpx.TransportError:
            return {}

    def wait_ready(self, timeout: float = 15.0) -> None:
        """Until the router serves from exactly the processes that live now, and they are all."""
        try:
            until(self._is_ready, timeout, "the cluster was not ready")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; processes {self._pids}, the router sees {self.status()}") from None

    def _is_ready(self) -> bool:
        with self._changed:
            pids = {name: self._pids.get(name) for name in self.workers}
        ready = {name: worker for name, worker in self.status().items() if worker["state"] == "ready"}
        self._addresses |= {worker["pid"]: worker["address"] for worker in ready.values()}
        seen = {name: worker["pid"] for name, worker in ready.items()}
        return None not in pids.values() and seen == pids and self._killed.isdisjoint(seen.values())

    def assert_at_rest(self, timeout: float = 5.0) -> None:
        """free + cached = pool on every worker, and nothing runs or waits."""
        try:
            until(lambda: all(_at_rest(worker) for worker in self.status().values()), timeout, "there was no rest")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; the router sees {self.status()}") from None
        assert sorted(self.status()) == sorted(self.workers)

    def loads(self) -> dict[str, Load]:
        """name → load, from the workers that `wait_ready` has seen, themselves: it needs no router."""
        return asyncio.run(self._loads())

    async def _loads(self) -> dict[str, Load]:
        with self._changed:
            living = {name: self._addresses.get(pid) for name, pid in self._pids.items()}
        return {name: await self._load(name, address) for name, address in living.items() if address}

    async def _load(self, name: str, address: str) -> Load:
        client = WorkerClient(address, self.key)
        loads: list[Load] = []

        def take(event: WorkerEvent) -> None:
            loads.append(event.load)
            raise _Enough("the first event is complete")

        try:
            await client.watch(take)
        except _Enough:
            return loads[0]
        finally:
            await client.close()
        raise AssertionError(f"{name} ended its Watch stream without an event")

    # ------------------------------------------------------------------ logs

    @contextmanager
    def explained(self) -> Generator[None]:
        """Whatever fails inside, fails with the processes' last lines."""
        try:
            yield
        except BaseException:
            print(self.logs(), file=sys.stderr)
            raise

    def logs(self) -> str:
        return "\n".join(f"---- {name}\n{self.log(name)[-TAIL:]}" for name in (ROUTER, *self.workers))

    def log(self, name: str) -> str:
        """Of all its incarnations."""
        path = self._log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


class _Enough(TandemError):
    pass


def _at_rest(worker: dict[str, Any]) -> bool:
    kv = worker["kv"]
    busy = kv["owned"] + kv["reserved"] + kv["quarantined"] + worker["running"] + worker["waiting"]
    return kv["free"] + kv["cached"] == kv["total"] and not busy


def until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {timeout} s"
        time.sleep(POLL)  # a poll of other processes, with a deadline
