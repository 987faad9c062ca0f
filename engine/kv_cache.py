"""The paged KV cache of one rank: one tensor, all layers of a block together.

    tensor  (blocks, layers, 2, kv_heads_local, block_size, head_dim)       2 = key, value; "HND"

A block is one contiguous run of bytes, so a hand-off reads it in one piece; inside, a head's tokens of a block are
contiguous, which is what attention reads. A layer's view is strided over blocks.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import KVLayout


class PagedKVCache:
    """With one rank this is the worker's BlockStore (kv_transfer/base.py). With more, `read` and `write` speak of
    this rank's heads only, and `parallel.ShardedStore` joins them."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        local = local_layout(layout, world)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        # (blocks, bytes of this rank's part): moving bytes needs neither the dtype nor its alignment
        self._rows = _zeros(num_blocks * local.block_bytes, device).view(num_blocks, local.block_bytes)
        self.tensor = self._rows.view(-1).view(dtype).view(num_blocks, *local.block_shape)
        # one layer each: (blocks, 2, kv_heads_local, block_size, head_dim), strided
        self.layers = [self.tensor[:, index] for index in range(layout.layers)]

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A copy of the blocks: (len(blocks), local block bytes) uint8 on the cache's device."""
        return self._rows.index_select(0, self._ids(blocks))

    def write(self, blocks: Sequence[int], payload: Tensor) -> None:
        """Overwrite the blocks with `payload`, shaped as `read` returns it, from any device."""
        assert payload.shape == (len(blocks), self._rows.shape[1]), f"payload {payload.shape} for {len(blocks)} blocks"
        self._rows[self._ids(blocks)] = payload.to(self._rows.device)

    def copy(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._rows.device)


def local_layout(layout: KVLayout, world: int) -> KVLayout:
    """The part of each block that one of `world` ranks keeps."""
    return replace(layout, kv_heads=layout.kv_heads // world)


def _zeros(size: int, device: torch.device) -> Tensor:
    """`size` zero bytes. On the host from an anonymous mapping: pages nobody wrote yet take no memory, so a worker's
    resident size follows its use, up to the budget."""
    try:
        if device.type != "cpu":
            return torch.zeros(size, dtype=torch.uint8, device=device)
        return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    except (OSError, OverflowError, RuntimeError) as exc:
        raise ConfigError(f"a KV cache of {size} bytes does not fit on {device}: lower kv_cache_memory_bytes") from exc
