"""A real router process over fake workers, which live on the test's event loop and are as fast as they are told."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from tandem.cluster.local_redis import LocalRedis
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.registry import Registry
from tandem.common.request import Leg
from tandem.common.worker_config import KEY_VARIABLE
from tests.faults.clients import PLAIN
from tests.router.fake_cluster import KEY, FakeWorker, Script

ROOT = Path(__file__).parents[2]


class RoutedWorkers:
    """Use as an async context manager. P serves `prefill_seconds` per prompt, one after the other."""

    def __init__(self, model_dir: Path, flags: tuple[str, ...] = (), prefill_seconds: float = 0.0, files: int = 0):
        self._directory = tempfile.TemporaryDirectory(prefix="tandem-test-")
        self._redis = LocalRedis(Path(self._directory.name) / "redis.sock")
        self._prefill_seconds = prefill_seconds
        self._one_by_one = asyncio.Lock()
        script = Script([[60] * 3])
        self.prefill, self.decode = FakeWorker("prefill-0", "prefill", script), FakeWorker("decode-0", "decode", script)
        self.prefill.on_leg = self._on_leg
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._files = files
        self._command = [
            sys.executable, "-m", "tandem.router", "--port", str(self.port), "--redis-url", self._redis.url,
            "--model-dir", str(model_dir), "--served-model-name", "tiny", "--log-level", "error", *flags,
        ]  # fmt: skip
        self.router = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        files, limit = self._files, None
        if files:
            limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # noqa: E731
        return subprocess.Popen(self._command, env=os.environ | {KEY_VARIABLE: KEY.hex()}, preexec_fn=limit)

    def restart(self) -> None:
        """kill -9, and another router on the same port."""
        self.router.kill()
        self.router.wait()
        self.router = self._start()

    async def _on_leg(self, worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        async with self._one_by_one:
            await asyncio.sleep(self._prefill_seconds)  # stands for a computation
        async for message in worker._prefill(leg):
            yield message

    async def __aenter__(self) -> RoutedWorkers:
        self._redis.wait()
        registry = Registry(self._redis.url, KEY)
        for worker in (self.prefill, self.decode):
            await worker.start()
        self._heartbeat = asyncio.create_task(self._register(registry))
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=30.0, verify=PLAIN)
        await self.until(self.ready, 30.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        self.router.kill()
        self.router.wait()
        self._heartbeat.cancel()
        await asyncio.gather(self._heartbeat, return_exceptions=True)
        for worker in (self.prefill, self.decode):
            await worker.die()
        self._redis.stop()
        self._directory.cleanup()

    async def _register(self, registry: Registry) -> None:
        try:
            while True:
                for worker in (self.prefill, self.decode):
                    await registry.publish(worker.registration)
                await asyncio.sleep(0.5)
        finally:
            await registry.close()

    async def ready(self) -> bool:
        try:
            return len((await self.http.get("/status")).json()["workers"]) == 2
        except httpx.TransportError:
            return False

    async def until(self, condition: Callable[[], Any], timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while not await condition():
                await asyncio.sleep(0.02)

    async def ask(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def metric(self, name: str) -> float:
        lines = (await self.http.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and "_created" not in line)

    async def nothing_left(self) -> bool:
        """No request in flight, none queued, no leg at a worker."""
        names = ("tandem_router_requests_in_flight", "tandem_router_queued_")
        left = [await self.metric(name) for name in names]
        return not any(left) and not self.prefill.active and not self.decode.active

    async def load(self, mode: str, amount: float, seconds: float) -> dict[str, Any]:
        """What tests/faults/load.py measured."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.load", str(self.port), mode, str(amount), str(seconds),
            cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(output)
