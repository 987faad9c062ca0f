"""A cluster without Ray: a real Redis and a real router process; workers as threads of the test, over real gRPC.

Workers in this process can be looked into, so every test ends with the blocks counted.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tandem.cluster.local_redis import LocalRedis
from tandem.common.worker_config import KEY_VARIABLE, Role, WorkerConfig
from tandem.decode_worker.service import DecodeServer
from tandem.engine.config import EngineConfig
from tandem.prefill_worker.service import PrefillServer
from tests.faults.clients import PLAIN

Server = PrefillServer | DecodeServer
START: dict[str, Callable[[WorkerConfig, EngineConfig], Server]] = {
    "prefill": PrefillServer.start,
    "decode": DecodeServer.start,
}


class LocalCluster:
    def __init__(
        self,
        engine: EngineConfig,
        prefill: int = 1,
        decode: int = 1,
        router_flags: tuple[str, ...] = (),
        kv_connector: str = "auto",
    ) -> None:
        self.engine = engine
        self._connector = kv_connector
        self.key = secrets.token_bytes(32)
        self._directory = tempfile.TemporaryDirectory(prefix="tandem-test-")
        self._redis = LocalRedis(Path(self._directory.name) / "redis.sock")
        self.workers: dict[str, Server] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._router = self._start_router(prefill, router_flags)
        self._redis.wait()
        self._wanted = {"prefill": prefill, "decode": decode}

    def _start_router(self, prefill: int, flags: tuple[str, ...]) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "tandem.router", "--port", self.url.rsplit(":", 1)[1], "--redis-url",
            self._redis.url, "--model-dir", self.engine.model, "--served-model-name", "m",
            "--prefill-expected", str(prefill), "--log-level", "warning", *flags,
        ]  # fmt: skip
        return subprocess.Popen(command, env=os.environ | {KEY_VARIABLE: self.key.hex()})

    def __enter__(self) -> LocalCluster:
        try:
            for role in ("prefill", "decode"):
                for index in range(self._wanted[role]):
                    self.add(role, index)
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exc is None:
                self.assert_at_rest()
        finally:
            self.close()

    def add(self, role: Role, index: int) -> Server:
        name = f"{role}-{index}"
        config = WorkerConfig(
            name=name, role=role, redis_url=self._redis.url, cluster_key=self.key, kv_connector=self._connector
        )
        self.workers[name] = START[role](config, self.engine)
        return self.workers[name]

    def remove(self, name: str) -> None:
        self.workers.pop(name).stop()

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Until the router sees every worker."""
        self._until(lambda: len(self.status()) == len(self.workers), timeout)
        assert httpx.get(self.url + "/readyz", verify=PLAIN).status_code == 200

    def status(self) -> list[dict[str, Any]]:
        try:
            return [w for w in httpx.get(self.url + "/status", verify=PLAIN).json()["workers"] if w["state"] == "ready"]
        except httpx.TransportError:
            assert self._router.poll() is None, "the router ended"
            return []

    def assert_at_rest(self, timeout: float = 5.0) -> None:
        """free + cached = pool on every worker, and every index agrees."""
        servers = list(self.workers.values())
        self._until(lambda: all(_rests(server) for server in servers), timeout)
        for server in servers:
            server.pool.check_integrity()

    def _until(self, condition: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s; the workers are {self.status()}"
            time.sleep(0.05)  # a poll of another process, with a deadline

    def close(self) -> None:
        self._router.terminate()
        for server in self.workers.values():
            server.stop()
        try:
            self._router.wait(40)  # its own limit for streams is 30
        except subprocess.TimeoutExpired:
            self._router.kill()
            self._router.wait(10)
            raise
        finally:
            self._redis.stop()
            self._directory.cleanup()


def _rests(server: Server) -> bool:
    """A dead worker keeps in quarantine, until its process ends, what P may still write to: P's word finds nobody."""
    counts = server.pool.counts()
    return counts.at_rest or (not server.healthy() and counts.free + counts.cached + counts.quarantined == counts.total)
