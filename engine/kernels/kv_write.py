"""Triton kernel that stores new keys and values in the paged cache."""

# Triton's language has no types, and a launch takes other arguments than the kernel declares:
# pyright: basic, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kernel(
    key, value, kv, blocks, offsets,
    key_token, key_head, value_token, value_head,  # strides, elements
    kv_block, kv_part, kv_head, kv_token,
    kv_heads, head_dim,
    HEADS: tl.constexpr, DIM: tl.constexpr,  # powers of two that cover kv_heads and head_dim
):  # fmt: skip
    """One program for each new token: its key and value of all heads, a tile (HEADS, DIM)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    mask = (head < kv_heads) & (dim < head_dim)
    slot = kv + tl.load(blocks + token) * kv_block + tl.load(offsets + token) * kv_token + head * kv_head + dim
    tl.store(slot, tl.load(key + token * key_token + head * key_head + dim, mask=mask), mask=mask)
    tl.store(slot + kv_part, tl.load(value + token * value_token + head * value_head + dim, mask=mask), mask=mask)


def write(key: Tensor, value: Tensor, kv: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Store `key` and `value` (T, kv_heads, head_dim) at `kv[blocks[t], :, :, offsets[t]]`.

    `kv` is (blocks, 2, kv_heads, block_size, head_dim) with any strides but the last, which is 1; so are the others.
    """
    tokens, kv_heads, head_dim = key.shape
    _write_kernel[(tokens,)](
        key, value, kv, blocks, offsets,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), *kv.stride()[:4],
        kv_heads, head_dim, HEADS=triton.next_power_of_2(kv_heads), DIM=triton.next_power_of_2(head_dim),
    )  # fmt: skip
