"""The `shm` connector: P maps the file behind D's KV cache and writes into the blocks it was granted. Same host only.

    D   its process, the file's number there and its identity, the shape of its blocks ──► P, over the pair's channel
    P   maps /proc/PID/fd/N, if that is the very file

The file has no name (memfd), so nothing is left of it when the processes are gone, however they ended. While P maps it
the memory stays, even if D dies: a write under way then goes nowhere. One copy per byte, from P's blocks to D's.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload

Memory = NDArray[np.uint8]  # (blocks, block bytes)


def domain(context: Context) -> str:
    """Processes of one user that see each other below /proc. Raises ConfigError."""
    memory = context.memory
    if context.fd is None or memory is None or memory.device.type != "cpu":
        raise ConfigError("this worker's KV cache is not a file in memory that another process could map")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace, itself = os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self")
    except OSError as exc:
        raise ConfigError(f"/proc of a Linux system is needed: {exc}") from exc
    if itself != str(os.getpid()):
        raise ConfigError("/proc shows the processes of another namespace; mount this one's")
    return f"{boot} {namespace} {os.getuid()}"


@dataclass(frozen=True, slots=True)
class _File:
    """D's cache, as D knows it. The identity keeps P from writing into whatever else has that number by then."""

    pid: int
    fd: int
    device: int
    inode: int
    blocks: int
    block_bytes: int

    @classmethod
    def of(cls, context: Context) -> _File:
        memory, fd = context.memory, context.fd
        assert memory is not None and fd is not None, "domain() has seen them"
        assert memory.is_contiguous()
        status = os.fstat(fd)
        blocks, block_bytes = memory.shape
        return cls(os.getpid(), fd, status.st_dev, status.st_ino, blocks, block_bytes)

    def pack(self) -> bytes:
        return _FILE.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> _File:
        """Raises TransferFailed."""
        try:
            return cls(*_FILE.unpack(data))
        except struct.error as exc:
            raise TransferFailed("shm: what the peer says of its KV cache cannot be read") from exc

    def map(self) -> Memory:
        """Writable; unmapped with the last reference to it. Raises TransferFailed."""
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                size = self.blocks * self.block_bytes
                if (status.st_dev, status.st_ino) != (self.device, self.inode) or not 0 < size <= status.st_size:
                    raise TransferFailed(f"shm: {path} is not the peer's KV cache; the peer may have ended")
                mapped = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as exc:
            raise TransferFailed(f"shm: cannot map the peer's KV cache at {path}: {exc}") from exc
        return np.frombuffer(cast(Any, mapped), dtype=np.uint8).reshape(self.blocks, self.block_bytes)


_FILE = struct.Struct("!6Q")


class ShmSender:
    one_sided = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._memory: Memory | None = None
        self._closed = False

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        memory = _File.unpack(self._context.mailbox.take("shm/file", deadline)).map()
        if memory.shape[1] % self._context.layout.layers:
            raise TransferFailed(f"shm: the peer's blocks of {memory.shape[1]} bytes are not of this model")
        with self._lock:
            if self._closed:
                raise TransferFailed("shm: the link was closed while its data path was being set up")
            self._memory = memory

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        """Copy. A frame takes milliseconds and waits for nobody. Raises TransferFailed."""
        memory = self._memory  # keeps the mapping until this returns, also when closed meanwhile
        if memory is None:
            raise TransferFailed("shm: the data path is not open")
        start = frame.first_layer * (memory.shape[1] // self._context.layout.layers)
        payload.check_place(targets, start, *memory.shape)
        target = memory[:, start : start + payload.row_bytes]
        source = payload.memory.numpy()[:, payload.start : payload.stop]
        for index, count in _runs(payload.rows, targets):
            if self._closed:
                raise TransferFailed("shm: the data path was closed")
            row, block = payload.rows[index], targets[index]
            target[block : block + count] = source[row : row + count]  # without the GIL

    def close(self) -> None:
        with self._lock:
            self._closed, self._memory = True, None


class ShmReceiver:
    one_sided = True

    def __init__(self, context: Context) -> None:
        self._context = context

    def open(self, timeout: float) -> None:
        self._context.mailbox.publish("shm/file", _File.of(self._context).pack())

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        """What P wrote, where it is: the header came through the kernel, behind P's last write."""
        memory, layer_bytes = self._context.memory, self._context.layout.layer_bytes
        assert memory is not None, "domain() has seen it"
        return Payload.layers(memory, targets, frame.first_layer * layer_bytes, frame.num_layers * layer_bytes)

    def close(self) -> None:
        """Nothing to do: P unmaps what it has mapped."""


def _runs(rows: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, length) of each longest stretch in which rows and targets are both neighbours: one copy each."""
    first = 0
    for index in range(1, len(rows) + 1):
        step = (rows[index] - rows[index - 1], targets[index] - targets[index - 1]) if index < len(rows) else None
        if step != (1, 1):
            yield first, index - first
            first = index
