"""The paged KV cache of one rank: one tensor, all layers of a block together.

    tensor  (blocks, layers, 2, kv_heads_local, block_size, head_dim)       2 = key, value; "HND"

A block is one contiguous run of bytes, so a hand-off reads it in one piece; so is each of its layers. Inside, a head's
tokens of a block are contiguous, which is what attention reads. A layer's view is strided over blocks.

On the host the cache is a file in memory, which another process of the same user can map (/proc/PID/fd/N) to move
blocks without copying them twice. The system finds a page for it when it is first written, which takes 1 to 5 ms per MB
on virtual machines, in the middle of somebody's step; so a worker has the first READY bytes found while it is idle.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import KVLayout

READY = 1 << 30  # bytes; of a larger cache the rest takes memory as it is used
PIECE = 2 << 20  # bytes found at a time: a request that comes meanwhile waits a few milliseconds
MADV_POPULATE_WRITE = 23  # <linux/mman.h>, since Linux 5.14; leaves what the pages hold


class PagedKVCache:
    """With one rank this is the worker's BlockStore (kv_transfer/base.py). With more, `read` and `write` speak of
    this rank's heads only, and `parallel.ShardedStore` joins them."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        local = local_layout(layout, world)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        size = num_blocks * local.block_bytes
        self._file = SharedFile.create() if device.type == "cpu" and world == 1 else None
        self._ready = 0  # bytes, from the beginning of the file
        # (blocks, bytes of this rank's part): moving bytes needs neither the dtype nor its alignment
        self.memory = _zeros(size, device, self._file).view(num_blocks, local.block_bytes)
        self._host = self.memory.numpy() if device.type == "cpu" else None  # moves rows ten times faster than torch
        self._layer_bytes = local.layer_bytes
        self.tensor = self.memory.view(-1).view(dtype).view(num_blocks, *local.block_shape)
        # one layer each: (blocks, 2, kv_heads_local, block_size, head_dim), strided
        self.layers = [self.tensor[:, index] for index in range(layout.layers)]

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A copy of the blocks: (len(blocks), local block bytes) uint8 on the cache's device."""
        if self._host is not None:
            return torch.from_numpy(self._host[list(blocks)])
        return self.memory.index_select(0, self._ids(blocks))

    def write(
        self, blocks: Sequence[int], payload: Tensor, first_layer: int = 0, num_layers: int | None = None
    ) -> None:
        """Overwrite layers of the blocks (all, unless told) with `payload`, (len(blocks), local bytes of the layers)
        uint8 from any device."""
        count = self.layout.layers if num_layers is None else num_layers
        start, size = first_layer * self._layer_bytes, count * self._layer_bytes
        assert payload.shape == (len(blocks), size), f"payload {payload.shape} for {len(blocks)} blocks of {size} bytes"
        if self._host is not None:
            self._host[list(blocks), start : start + size] = payload.numpy(force=True)
        else:
            self.memory[self._ids(blocks), start : start + size] = payload.to(self.memory.device)

    def copy(self, source: int, target: int) -> None:
        self.memory[target] = self.memory[source]

    def zero(self, blocks: Sequence[int]) -> None:
        if self._host is not None:
            self._host[list(blocks)] = 0
        else:
            self.memory[self._ids(blocks)] = 0

    def fence(self) -> Callable[[], None] | None:
        """Waits, in any thread, until the device has done what was asked of it so far; None: it has."""
        return fence(self.memory.device)

    @property
    def fd(self) -> int | None:
        """The file behind `memory` while the cache is open; None: memory of this process alone."""
        return self._file.fd if self._file is not None else None

    def prepare(self) -> bool:
        """Have memory found for one more piece of the cache; whether there is more to do.

        Blocks that were never used are handed out in rising order, so the pieces are what will be needed first.
        """
        left = min(READY, self.memory.nbytes) - self._ready
        if self._file is None or left <= 0:
            return False
        done = self._file.populate(self._ready, min(PIECE, left))
        self._ready += PIECE if done else READY
        return done

    def close(self) -> None:
        """Nobody else can map the cache any more; its tensors stay valid. Idempotent."""
        if self._file is not None:
            self._file.close()

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.memory.device)


def local_layout(layout: KVLayout, world: int) -> KVLayout:
    """The part of each block that one of `world` ranks keeps."""
    return replace(layout, kv_heads=layout.kv_heads // world)


def fence(device: torch.device) -> Callable[[], None] | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


class SharedFile:
    """An unnamed, sparse file in memory, not inherited by child programs; closed with its owner at the latest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapped: mmap.mmap | None = None
        self.close = weakref.finalize(self, os.close, fd)  # callable, once

    @classmethod
    def create(cls) -> SharedFile | None:
        """None where the system has no such files (Linux has)."""
        try:
            return cls(os.memfd_create("tandem-kv", os.MFD_CLOEXEC))
        except (AttributeError, OSError):
            return None

    @property
    def fd(self) -> int | None:
        return self._fd if self.close.alive else None

    def map(self, size: int) -> mmap.mmap:
        """Zero bytes. Raises OSError or OverflowError when there is no room."""
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise OSError("larger than this machine's memory")  # a sparse file may be, and would fail when it is used
        os.ftruncate(self._fd, size)
        self._mapped = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED)
        return self._mapped

    def populate(self, start: int, size: int) -> bool:
        """Back these bytes of the mapping, which begin at a page, with memory. False where the system cannot."""
        assert self._mapped is not None, "mapped first"
        try:
            self._mapped.madvise(MADV_POPULATE_WRITE, start, size)
        except OSError:  # an older kernel, or no memory: then later, page by page
            return False
        return True


def _zeros(size: int, device: torch.device, file: SharedFile | None) -> Tensor:
    """`size` zero bytes, (size,) uint8."""
    try:
        if device.type != "cpu":
            return torch.zeros(size, dtype=torch.uint8, device=device)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return torch.frombuffer(file.map(size) if file else mmap.mmap(-1, size, flags=private), dtype=torch.uint8)
    except (OSError, OverflowError, RuntimeError) as exc:
        raise ConfigError(f"a KV cache of {size} bytes does not fit on {device}: lower kv_cache_memory_bytes") from exc
