"""Weights in FP8 (e4m3), multiplied as they are: CUDA devices have matrix products of such numbers.

    weight[o, i] = codes[o, i] · scales[o]      made at load, or read from a checkpoint that has it so
    x[t, i]      ≈ codes[t, i] · scales[t]      each token's activations, quantized as they come
    product      = (Σ codes · codes) · scales[t] · scales[o]

A scale maps the largest of its row to e4m3's largest, so nothing overflows. A row's product depends on no other row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 1e-30  # a row whose largest is below counts as zeros: its scale would not be a normal number
MULTIPLE = 16  # of inputs and outputs, that the product needs
CAPABILITY = "a CUDA device of compute capability 8.9 or newer"


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """Of one rank; the target of a loader's slots (models/layers.py) as a float weight is."""

    codes: Tensor  # (out, in) float8_e4m3fn
    scales: Tensor  # (out, 1) float32

    @classmethod
    def empty(cls, outputs: int, inputs: int, device: torch.device) -> Float8Weight:
        codes = torch.empty(outputs, inputs, dtype=DTYPE, device=device)
        return cls(codes, torch.empty(outputs, 1, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def __getitem__(self, rows: slice) -> Float8Weight:
        """Some outputs, as views."""
        return Float8Weight(self.codes[rows], self.scales[rows])

    def rows(self, start: int, stop: int) -> Float8Weight:
        return self[start:stop]

    def columns(self, start: int, stop: int) -> Float8Weight:
        return replace(self, codes=self.codes[:, start:stop])

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        return self.codes.float().mul_(self.scales)

    def copy_(self, source: Tensor | Float8Weight) -> None:
        """Become `source` (out, in): bit by bit if it is in FP8 with a scale for each output, else quantized anew, of
        which each weight is off by at most 1/16 of itself or, if it is tiny, 1/450,000 of its output's largest."""
        if isinstance(source, Float8Weight):
            codes, scales = source.codes, source.scales
        else:
            codes, scales = quantize(source.to(self.codes.device))
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` (T, in) -> (T, out) in the dtype of `x`, which on CUDA is bfloat16."""
        codes, scales = _quantizer(x.device.type)(x)
        multiply = torch._scaled_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return multiply(codes, self.codes.t(), scales, self.scales.t(), bias, out_dtype=x.dtype, use_fast_accum=True)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (rows, columns) in FP8, and the rows' scales (rows, 1) float32."""
    scales = x.abs().amax(1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return (x / scales).to(DTYPE), scales


@functools.cache
def _quantizer(device_type: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`quantize`, or the kernel that does it in one launch."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return quantize
    from tandem.engine.kernels import fused

    return fused.quantize


def has_float8(device: torch.device) -> bool:
    """Whether a CUDA device computes in FP8."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight of one rank can be multiplied in FP8."""
    return outputs % MULTIPLE == inputs % MULTIPLE == 0
