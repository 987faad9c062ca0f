"""The one interface of all attention backends over the paged KV cache.

    kv of one layer: (blocks, 2, kv_heads, block_size, head_dim), a strided view of the cache (kv_cache.py)

`write` stores the new tokens' keys and values, in FP8 where the cache is; `attend` then lets each new token see its
sequence's tokens up to and including itself, or the last `window` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tandem.engine.quantization.float8 import DTYPE, LARGEST


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """S sequences with T new tokens in all; built once a step, shared by all layers. On the model's device."""

    query_start: Tensor  # (S + 1,) int32
    context_lens: Tensor  # (S,) int32, including the new tokens
    block_tables: Tensor  # (S, max_blocks) int32, padded with 0
    slot_blocks: Tensor  # (T,) int64: block that takes each new token
    slot_offsets: Tensor  # (T,) int64: position inside that block
    query_lens: list[int]  # (S,) on the host, so that nobody synchronises to learn them
    context_lens_host: list[int]  # (S,)


class AttentionBackend(Protocol):
    name: str

    def write(self, kv: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata) -> None:
        """Store `key` and `value`, each (T, kv_heads, head_dim), at the new tokens' slots of `kv`."""
        kv[meta.slot_blocks, 0, :, meta.slot_offsets] = _stored(key, kv.dtype)
        kv[meta.slot_blocks, 1, :, meta.slot_offsets] = _stored(value, kv.dtype)

    def attend(self, query: Tensor, kv: Tensor, meta: AttentionMetadata, scale: float, window: int | None) -> Tensor:
        """Causal attention of `query` (T, heads, head_dim) over the cache. Returns (T, heads, head_dim)."""
        ...


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as a cache of `dtype` holds them: FP8 has no infinity, so what is beyond its range becomes its end."""
    return values.clamp(-LARGEST, LARGEST).to(DTYPE) if dtype == DTYPE else values
