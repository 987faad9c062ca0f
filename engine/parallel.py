"""Tensor parallelism: rank 0 lives in the worker's process and drives, ranks 1.. are subprocesses that follow.

    rank 0  ── stdin: one JSON line, then (command, length) ──►  python -m tandem.engine.parallel   (one a rank)
            ◄─ stdout: "ready", or an error ───────────────────
            ◄─ Group: the command's int64 arguments by broadcast, then the collectives the command needs ─►

A follower waits for its next command on a pipe, not in a collective: idling costs nothing and needs no deadline,
and the pipe's end, like its parent's death, ends it. Within a command every collective has a deadline.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from tandem.common import log
from tandem.common.errors import TandemError, WorkerFailed
from tandem.common.kv_layout import KVLayout
from tandem.common.proc import die_with_parent
from tandem.engine.config import EngineConfig
from tandem.engine.group import Group
from tandem.engine.kv_cache import fence
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tandem.engine.runner import integers

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<qq")  # command, number of its int64 arguments
START_TIMEOUT = 120.0  # seconds for importing torch on a busy machine
STOP_TIMEOUT = 5.0


class Command(IntEnum):
    FORWARD = 1  # a packed batch (runner.py)
    READ = 2  # block ids; then each rank's heads are gathered to rank 0
    WRITE = 3  # first layer, number of layers, block ids; then rank 0 scatters the heads
    COPY = 4  # source, target
    ZERO = 5  # block ids


class Followers:
    """Rank 0's end of ranks 1..; with one rank there are none and nothing is sent."""

    def __init__(self, config: EngineConfig) -> None:
        """`config.model` is a directory. Nothing is started before `join`."""
        self._config = config
        self._world = config.tensor_parallel_size
        self._closing = False
        self._group = Group()
        self._directory = tempfile.TemporaryDirectory(prefix="tandem-tp-") if self._world > 1 else None
        self._followers = [_Follower(rank, self._on_exit) for rank in range(1, self._world)]

    def join(self, device: torch.device) -> Group:
        """Start the processes; the group of all ranks, this process being rank 0.

        Raises WorkerFailed when a follower does not come up; `close` is then still to be called.
        """
        if self._directory is None:
            return self._group
        for follower in self._followers:
            follower.start(self._spec(follower.rank))
        deadline = time.monotonic() + START_TIMEOUT
        for follower in self._followers:
            follower.wait_ready(deadline)
        self._group = Group.join(self._store, 0, self._world, device)
        self._directory.cleanup()  # only needed to find each other
        return self._group

    @contextmanager
    def together(self, command: Command, arguments: Tensor) -> Generator[None]:
        """Start `command` on all followers; the body does the same on rank 0. `arguments`: (n,) int64.

        A body that fails leaves the followers in a collective that rank 0 never reaches, and they would take its next
        one for it: so the group is broken then. Raises WorkerFailed.
        """
        if not self._followers:
            yield
            return
        self._group.check()
        for follower in self._followers:
            follower.send(HEADER.pack(command, len(arguments)))
        self._group.broadcast(arguments)
        try:
            yield
        except Exception as exc:
            self._group.abort(f"tensor-parallel rank 0 failed in the midst of a step ({exc}); restart this worker")
            raise exc if isinstance(exc, WorkerFailed) else WorkerFailed(self._group.failure) from exc

    def close(self) -> None:
        """End the followers; those that do not end by themselves are killed. Idempotent."""
        self._closing = True
        for follower in self._followers:
            follower.hang_up()
        deadline = time.monotonic() + STOP_TIMEOUT
        for follower in self._followers:
            follower.stop(deadline)
        self._followers = []
        self._group.close()
        if self._directory is not None:
            self._directory.cleanup()

    @property
    def _store(self) -> Path:
        assert self._directory is not None
        return Path(self._directory.name) / "store"

    def _spec(self, rank: int) -> bytes:
        spec = {"config": asdict(self._config), "rank": rank, "store": str(self._store), "parent": os.getpid()}
        return json.dumps(spec).encode() + b"\n"

    def _on_exit(self, rank: int, code: int) -> None:
        if not self._closing:
            logger.error("tensor-parallel rank %d exited with code %d", rank, code)
            self._group.abort(f"tensor-parallel rank {rank} exited with code {code}; restart this worker")


class _Follower:
    """One subprocess, started and reaped by a thread of its own: the kernel's death signal is tied to the thread
    that started a child, and the engine's thread may end before the engine does."""

    def __init__(self, rank: int, on_exit: Any) -> None:
        self.rank = rank
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tensor-parallel-{rank}", daemon=True)

    def start(self, spec: bytes) -> None:
        self._thread.start()
        if not self._started.wait(START_TIMEOUT) or self._process is None:
            raise WorkerFailed(f"tensor-parallel rank {self.rank} could not be started")
        os.set_blocking(self._pipe("stdin").fileno(), False)
        self.send(spec)

    def _run(self) -> None:
        command = [sys.executable, "-m", "tandem.engine.parallel"]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, bufsize=0)
        finally:
            self._started.set()
        self._on_exit(self.rank, self._process.wait())

    def wait_ready(self, deadline: float) -> None:
        """Raises WorkerFailed with the follower's own words if it has any."""
        stdout = self._pipe("stdout")
        readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
        line = stdout.readline().decode(errors="replace").strip() if readable else "did not come up in time"
        if line != "ready":
            raise WorkerFailed(f"tensor-parallel rank {self.rank}: {line or 'exited at start, see its log'}")

    def send(self, data: bytes) -> None:
        """Never blocks: a pipe that is full belongs to a follower that has stopped reading."""
        try:
            written = self._pipe("stdin").write(data)
        except OSError as exc:
            raise WorkerFailed(f"tensor-parallel rank {self.rank} is gone: {exc}") from exc
        if written != len(data):
            raise WorkerFailed(f"tensor-parallel rank {self.rank} does not take commands any more")

    def hang_up(self) -> None:
        if self._process is not None:
            self._pipe("stdin").close()

    def stop(self, deadline: float) -> None:
        if self._process is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._process.kill()
                self._thread.join(STOP_TIMEOUT)
            self._pipe("stdout").close()

    def _pipe(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], getattr(self._process, name))


class ShardedStore:
    """The BlockStore of a tensor-parallel group (kv_transfer/base.py); blocks are whole, ranks keep their heads.

    block (layers · 2, heads, bytes of a head)   =   rank 0's heads | rank 1's heads | …
    """

    memory: Tensor | None = None  # in one piece nowhere
    fd: int | None = None

    def __init__(self, layout: KVLayout, rank: Rank, followers: Followers) -> None:
        self.layout = layout
        self._cache, self._group, self._followers = rank.cache, rank.group, followers

    @torch.inference_mode()
    def read(self, blocks: Sequence[int]) -> Tensor:
        with self._followers.together(Command.READ, torch.tensor(blocks, dtype=torch.int64)):
            parts = self._group.gather(self._cache.read(blocks))
        heads = self.layout.kv_heads // self._group.world
        shape = (len(blocks), self.layout.layers * 2, heads, self._head_bytes)
        return torch.cat([part.view(shape) for part in parts], dim=2).view(len(blocks), -1)

    @torch.inference_mode()
    def write(
        self, blocks: Sequence[int], payload: Tensor, first_layer: int = 0, num_layers: int | None = None
    ) -> None:
        count = self.layout.layers if num_layers is None else num_layers
        size = count * self.layout.layer_bytes
        assert payload.shape == (len(blocks), size), f"payload {payload.shape} for {len(blocks)} blocks of {size} bytes"
        shape = (len(blocks), count * 2, self.layout.kv_heads, self._head_bytes)
        parts = payload.to(self._group.device).view(shape).chunk(self._group.world, dim=2)
        with self._followers.together(Command.WRITE, torch.tensor([first_layer, count, *blocks])):
            mine = self._group.scatter(list(parts), torch.empty_like(parts[0]))
            self._cache.write(blocks, mine.view(len(blocks), -1), first_layer, count)

    def copy(self, source: int, target: int) -> None:
        with self._followers.together(Command.COPY, torch.tensor([source, target])):
            self._cache.copy(source, target)

    def zero(self, blocks: Sequence[int]) -> None:
        with self._followers.together(Command.ZERO, torch.tensor(blocks, dtype=torch.int64)):
            self._cache.zero(blocks)

    def fence(self) -> Callable[[], None] | None:
        return fence(self._group.device)

    @property
    def _head_bytes(self) -> int:
        return self.layout.block_bytes // (self.layout.layers * 2 * self.layout.kv_heads)


@torch.inference_mode()
def follow(rank: Rank, commands: IO[bytes]) -> None:
    """Obey rank 0 until its pipe ends."""
    group, cache = rank.group, rank.cache
    while header := commands.read(HEADER.size):
        command, count = HEADER.unpack(header)
        arguments = group.broadcast(torch.empty(count, dtype=torch.int64))
        match Command(command):
            case Command.FORWARD:
                rank.runner.forward(arguments)
            case Command.READ:
                group.gather(cache.read(integers(arguments)))
            case Command.WRITE:
                first_layer, layers, *blocks = integers(arguments)
                shape = (len(blocks), layers * cache.memory.shape[1] // cache.layout.layers)
                payload = torch.empty(shape, dtype=torch.uint8, device=cache.memory.device)
                cache.write(blocks, group.scatter([], payload), first_layer, layers)
            case Command.COPY:
                source, target = integers(arguments)
                cache.copy(source, target)
            case Command.ZERO:
                cache.zero(integers(arguments))


def main() -> None:
    """A follower's life. Signals of the terminal are for rank 0; the pipe tells when it is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.configure("warning")
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nobody reads what else is printed
    spec: dict[str, Any] = json.loads(commands.readline() or "{}")
    if not spec:
        sys.exit(1)
    die_with_parent(spec["parent"], signal.SIGKILL)
    try:
        plan = Plan.make(EngineConfig(**spec["config"]))
    except TandemError as exc:
        print(exc.message, file=answers)
        sys.exit(1)
    print("ready", file=answers)
    number: int = spec["rank"]
    group = Group.join(Path(spec["store"]), number, plan.config.tensor_parallel_size, plan.device(number))
    follow(Rank.load(plan, group), commands)


if __name__ == "__main__":
    main()
