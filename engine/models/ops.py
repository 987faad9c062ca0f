"""What a layer computes between its matrix products, in plain PyTorch here and fused (fused.py) on CUDA."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.models.layers import RMSNorm, rotate


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one step share."""

    ops: Ops
    attention: AttentionBackend
    meta: AttentionMetadata
    angles: tuple[Tensor, Tensor]  # cosine and sine, (T, 1, head_dim / 2) each


class Ops(Protocol):
    def add_norm(self, x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The sum of `x` and `y` (T, hidden), and its norm. The sum may be in the memory of `x`."""
        ...

    def write(self, qkv: Tensor, norms: Sequence[RMSNorm], kv: Tensor, context: StepContext) -> Tensor:
        """Store the new tokens' keys and values; return their queries (T, heads, head_dim).

        `qkv` (T, query heads | key heads | value heads), of which queries and keys are normed (by `norms`, of both or
        none) and rotated; `kv` (blocks, 2, kv_heads, block_size, head_dim).
        """
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up of (T, gate | up)."""
        ...


class TorchOps:
    def add_norm(self, x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        x = x if y is None else x + y
        return x, norm(x)

    def write(self, qkv: Tensor, norms: Sequence[RMSNorm], kv: Tensor, context: StepContext) -> Tensor:
        kv_heads, head_dim = kv.shape[2], kv.shape[4]
        heads = qkv.view(len(qkv), -1, head_dim)
        query, key, value = heads.tensor_split([heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads], dim=1)
        if norms:
            query, key = norms[0](query), norms[1](key)
        query, key = rotate(query, context.angles), rotate(key, context.angles)
        context.attention.write(kv, key, value, context.meta)
        return query

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def create_ops(device: torch.device) -> Ops:
    """The fastest that run on `device`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from tandem.engine.models.fused import FusedOps

        return FusedOps()
    return TorchOps()
