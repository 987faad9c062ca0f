"""Attention by the C++ kernels (engine/kernels/cpu/attention.h), on the CPU.

A model on this backend does not call it layer by layer: `PackedTransformer` runs whole halves of layers in C++. As a
backend of its own it is what tests compare with the others.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.kernels import cores, native


class NativeAttention(AttentionBackend):
    name = "native"

    def __init__(self) -> None:
        """The team has a thread for each core this process may use, and owns as many of them as PyTorch was given."""
        own, threads = torch.get_num_threads(), len(os.sched_getaffinity(0))
        self.cores = cores.table(own) if own < threads else None
        self.team = native.Team(max(own, threads), self.cores)

    def attend(self, query: Tensor, kv: Tensor, meta: AttentionMetadata, scale: float, window: int | None) -> Tensor:
        tokens, heads, head_dim = query.shape
        rows, seen = query.float().contiguous(), torch.empty(query.shape)
        tensors = (meta.query_start, meta.context_lens, meta.block_tables, meta.slot_blocks, meta.slot_offsets)
        addresses = [tensor.data_ptr() for tensor in tensors]
        step = native.Step(tokens, len(meta.query_lens), meta.block_tables.shape[1], *addresses, None, None)
        shape = native.Heads(heads, kv.shape[2], head_dim, window or 0, scale)
        self.team.begin()
        try:
            self.team.attention(shape, step, native.Cache.of(kv), rows, seen)
        finally:
            self.team.end()
        return seen.to(query.dtype)
