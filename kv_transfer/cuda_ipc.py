"""The `cuda_ipc` connector: P writes into D's KV cache on the same GPU, or on one its own GPU reaches (NVLink, PCIe).

    D   exports its cache ── CUDA's handles and the shape, as plain bytes and integers ──► P, over the pair's channel
    P   maps it, and copies on a stream of its own; D's header follows when the copy is done

**What is guaranteed.** A copy cannot be taken back, but it ends: at its deadline `send` waits for it before it fails.
So nothing is under way when `send` returns or raises. D cannot revoke the mapping: after a lost link its blocks are
safe once P answers, or its process is gone, as CUDA then stops and unmaps. **Whom it trusts.** P, with D's cache.

The handles are what torch itself sends between processes (torch/multiprocessing/reductions.py), but for its pickle.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload, runs_of

_LOOK = 0.0001  # seconds between looks at a copy
_EVENT_BYTES = 64  # cudaIpcEventHandle_t
_COUNTERS = 10_000  # in a file of torch's
_Storage: Any = torch.UntypedStorage  # torch's stubs lack its CUDA methods


def domain(context: Context) -> str:
    """Processes of one user on one machine. Raises ConfigError."""
    if context.device.type != "cuda":
        raise ConfigError(f"cuda_ipc moves blocks of CUDA devices, and this worker's are on {context.device}")
    if context.memory is None:
        raise ConfigError("the KV cache is spread over several devices, and cuda_ipc needs it in one piece")
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.getuid()} cuda"
    except OSError as exc:
        raise ConfigError(f"cuda_ipc needs /proc of a Linux system: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Export:
    """D's cache, as D's process exports it: block i has the `block_bytes` from `start + i * block_bytes` on."""

    handle: bytes  # of the allocation the storage lies in
    size: int  # bytes of the storage
    offset: int  # of the storage in the allocation
    counter: bytes  # the name of a file with torch's reference counters
    counter_offset: int
    event: bytes  # handle; what was asked of the device before the export is done when it has happened
    event_needed: bool
    start: int  # of the first block in the storage
    num_blocks: int
    block_bytes: int

    @classmethod
    def of(cls, memory: Tensor) -> Export:
        """Raises TransferFailed."""
        assert memory.is_contiguous()
        storage: Any = memory.untyped_storage()
        with _translated("exporting the KV cache"):
            _device, *handles = storage._share_cuda_()
        num_blocks, block_bytes = memory.shape
        return cls(*handles, start=int(memory.storage_offset()), num_blocks=num_blocks, block_bytes=block_bytes)

    def pack(self) -> bytes:
        packed = msgpack.packb(astuple(self))
        assert packed is not None, "packb returns None only for streams"
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Export:
        """Raises TransferFailed."""
        with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
            values = msgpack.unpackb(data, max_array_len=len(fields(cls)), max_map_len=0, max_ext_len=0)
            export = cls(*values)
            if all(_fits(getattr(export, field.name), field.type) for field in fields(cls)) and export._is_sound:
                return export
        raise TransferFailed("D's description of its KV cache cannot be read: it runs another version")

    @property
    def _is_sound(self) -> bool:
        """torch believes the sizes it is given, and counts down at any place of any file."""
        return (
            len(self.event) == _EVENT_BYTES
            and self.counter.startswith(b"/torch_")
            and self.counter_offset < _COUNTERS
            and 0 < self.num_blocks * self.block_bytes <= self.size - self.start
        )

    def map(self, device: torch.device) -> Tensor:
        """(num_blocks, block_bytes) uint8, D's memory; unmapped with the last reference. Raises TransferFailed.

        Mapped on P's own device, whatever D calls its: CUDA sees to it that the one reaches the other, or refuses.
        """
        handles = (self.handle, self.size, self.offset, self.counter, self.counter_offset, self.event)
        with _translated("mapping D's KV cache"):
            storage = _Storage._new_shared_cuda(device.index or 0, *handles, self.event_needed)
            shape, strides = (self.num_blocks, self.block_bytes), (self.block_bytes, 1)
            return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, self.start, shape, strides)


def _fits(value: object, kind: object) -> bool:
    """`kind`: the annotation, as text."""
    return type(value).__name__ == kind and not (isinstance(value, int) and value < 0)


class CudaIpcSender:
    one_sided = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stream: Any = None
        self._memory: Tensor | None = None  # D's
        self._closed = False

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        export = Export.unpack(self._context.mailbox.take("cuda_ipc/export", time.monotonic() + timeout))
        if export.block_bytes % self._context.layout.layers:
            raise TransferFailed(f"D's blocks of {export.block_bytes} bytes are not of this model")
        device = self._context.device
        with _translated("mapping D's KV cache"), torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._memory = export.map(device)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        memory = self._memory  # keeps the mapping until this returns, also when closed meanwhile
        if memory is None or self._closed:
            raise TransferFailed("the data path is not open")
        start = frame.first_layer * (memory.shape[1] // self._context.layout.layers)
        payload.check_place(targets, start, *memory.shape)
        with _translated(f"copying {payload.nbytes} bytes"), torch.cuda.device(memory.device):
            with torch.cuda.stream(self._stream):
                copy(memory[:, start : start + payload.row_bytes], payload, targets)
            self._wait(deadline)

    def close(self) -> None:
        self._closed, self._memory = True, None

    def _wait(self, deadline: float) -> None:
        done = self._stream.record_event()
        while not done.query():
            if time.monotonic() > deadline:
                done.synchronize()
                raise TransferFailed("a copy between CUDA devices did not end before its deadline")
            time.sleep(_LOOK)


class CudaIpcReceiver:
    one_sided = True

    def __init__(self, context: Context) -> None:
        self._context = context

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        with torch.cuda.device(self._context.device):
            self._context.mailbox.publish("cuda_ipc/export", Export.of(self._cache).pack())

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        """What P wrote, where it is: P sent the header when its copy was done."""
        layer_bytes = self._context.layout.layer_bytes
        return Payload.layers(self._cache, targets, frame.first_layer * layer_bytes, frame.num_layers * layer_bytes)

    def close(self) -> None:
        """Nothing to do: P unmaps what it has mapped."""

    @property
    def _cache(self) -> Tensor:
        memory = self._context.memory
        assert memory is not None, "`domain` has looked"
        return memory


def copy(target: Tensor, payload: Payload, targets: Sequence[int]) -> None:
    """Row i of `payload` into row targets[i] of `target`, (n, row_bytes); asynchronously, in few contiguous copies."""
    for first, count in _stretches(payload, targets):
        source = payload[first : first + count].tensor()
        target[targets[first] : targets[first] + count].copy_(source, non_blocking=True)


def _stretches(payload: Payload, targets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, length) of each run of bytes at P that is also one at D."""
    for first, count, _ in payload.runs():
        for index, length in runs_of(targets[first : first + count]):
            yield first + index, length


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:
        raise TransferFailed(f"{action} by CUDA IPC failed: {str(exc).splitlines()[0]}") from exc
