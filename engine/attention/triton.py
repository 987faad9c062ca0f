"""Attention by Triton kernels, on CUDA (or, in tests, in Triton's interpreter)."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.kernels import paged_attention
from tandem.engine.kernels.paged_attention import NO_WINDOW, Sequences


class TritonAttention(AttentionBackend):
    """Keeps nothing and never waits for the device: launches depend on the host's lengths only, and on those of
    single tokens through the longest context's alone, which may be overstated: what is beyond is skipped."""

    name = "triton"

    def attend(self, query: Tensor, kv: Tensor, meta: AttentionMetadata, scale: float, window: int | None) -> Tensor:
        output = torch.empty_like(query)
        longest, context = max(meta.query_lens), max(meta.context_lens_host)
        where = Sequences(meta.query_start, meta.context_lens, meta.block_tables, longest, context)
        if longest > 1:
            paged_attention.attend_chunks(query, kv, output, where, scale, window or NO_WINDOW)
        if 1 in meta.query_lens:
            paged_attention.attend_singles(query, kv, output, where, scale, window or NO_WINDOW)
        return output
