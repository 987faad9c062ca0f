"""The layers' operations as Triton kernels, one launch each (engine/kernels/fused.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tandem.engine.kernels import fused
from tandem.engine.models.layers import RMSNorm
from tandem.engine.models.ops import StepContext


class FusedOps:
    def add_norm(self, x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        return x, fused.add_norm(x, y, norm.weight, norm.eps)

    def write(self, qkv: Tensor, norms: Sequence[RMSNorm], kv: Tensor, context: StepContext) -> Tensor:
        weights = fused.Norms(norms[0].weight, norms[1].weight, norms[0].eps) if norms else None
        slots = fused.Slots(*context.angles, context.meta.slot_blocks, context.meta.slot_offsets)
        return fused.write(qkv, weights, kv, slots)

    def gate(self, gate_up: Tensor) -> Tensor:
        return fused.gate(gate_up)
