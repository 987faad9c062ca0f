"""Attention in plain PyTorch, written to be obviously right: what the other backends are tested against.

One sequence at a time: gather its blocks, write the mask down, softmax in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata


class ReferenceAttention(AttentionBackend):
    name = "reference"

    def attend(self, query: Tensor, kv: Tensor, meta: AttentionMetadata, scale: float, window: int | None) -> Tensor:
        block_size = kv.shape[3]
        output = torch.empty_like(query)
        end = 0
        for row, (length, context) in enumerate(zip(meta.query_lens, meta.context_lens_host, strict=True)):
            start, end = end, end + length
            blocks = meta.block_tables[row, : -(-context // block_size)].long()
            key, value = (_dense(kv[blocks, part], context) for part in (0, 1))  # (kv_heads, context, head_dim)
            mask = causal_mask(length, context, window, query.device)
            output[start:end] = _attend_dense(query[start:end], key, value, mask, scale)
        return output


def causal_mask(length: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """(length, context) bool: which of the `context` tokens each of the last `length` of them sees."""
    query = torch.arange(context - length, context, device=device)[:, None]
    key = torch.arange(context, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _dense(blocks: Tensor, context: int) -> Tensor:
    """(n, kv_heads, block_size, head_dim) -> (kv_heads, context, head_dim), without the last block's free tail."""
    return blocks.transpose(0, 1).flatten(1, 2)[:, :context].float()


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[0]  # query heads that share one kv head
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = torch.einsum("thd,hcd->htc", query.float(), key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("htc,hcd->thd", weights, value).to(query.dtype)
