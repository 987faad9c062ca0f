"""Weights in 4 or 8 bits, a scale and a zero for each group of neighbouring inputs of one output.

    weight[o, i] = (codes[o, i] - zeros[o, g]) · scales[o, g],  g = i // group_size

Codes are unsigned, 0 … 2^bits - 1, whatever the checkpoint has: a signed code c of a symmetric format is stored as
c + 2^(bits - 1), and that constant is its zero. Zeros are real numbers and may lie outside the range of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tandem.common.errors import ConfigError

INT4_GROUPS = (64, 32)  # error on normal weights 0.084 and 0.073 of their size, at 4.5 and 5 bits; 128: 0.094 at 4.25
CLIPPING = (1.0, 0.92, 0.84, 0.76)  # shares of a group's range that are tried
CHUNK = 1 << 18  # elements worked on at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    codes: Tensor  # (out, in) uint8, one code a byte
    scales: Tensor  # (out, groups) float32
    zeros: Tensor  # (out, groups) float32, in units of codes
    group_size: int  # inputs that share a scale; in = groups · group_size
    bits: int  # 4 | 8

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        codes = self.codes.view(*self.scales.shape, self.group_size)
        return (codes - self.zeros[..., None]).mul_(self.scales[..., None]).view(self.shape)

    def rows(self, start: int, stop: int) -> GroupedWeight:
        """Outputs [start, stop), as views."""
        rows = slice(start, stop)
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    def columns(self, start: int, stop: int) -> GroupedWeight:
        """Inputs [start, stop), the codes contiguous. Raises ConfigError where a cut would go through a group.

        A row that is one single group is cut anywhere: its scale holds for every part.
        """
        codes = self.codes[:, start:stop].contiguous()
        if self.scales.shape[1] == 1:
            return replace(self, codes=codes, group_size=stop - start)
        if start % self.group_size or stop % self.group_size:
            raise ConfigError(
                f"inputs {start} to {stop} cut through the quantization groups of {self.group_size}: use a "
                "tensor_parallel_size whose shares are whole groups"
            )
        groups = slice(start // self.group_size, stop // self.group_size)
        return replace(self, codes=codes, scales=self.scales[:, groups], zeros=self.zeros[:, groups])


def quantize(weight: Tensor, bits: int, group_size: int | None = None) -> GroupedWeight:
    """A GroupedWeight near `weight` (out, in) of any float dtype.

    8 bits: symmetric, by default one group a row. 4 bits: asymmetric, by default in groups of 64, or of 32 where 64 do
    not divide the inputs. Raises ConfigError for other bits, and for groups that do not divide the inputs.
    """
    if bits not in (4, 8):
        raise ConfigError(f"weights cannot be quantized to {bits} bits; supported: 4, 8")
    outputs, inputs = weight.shape
    size = group_size or (inputs if bits == 8 else min(INT4_GROUPS, key=lambda size: inputs % size))
    if inputs % size:
        raise ConfigError(f"quantization groups of {size} do not divide a weight's {inputs} inputs")
    codes = torch.empty((outputs, inputs), dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty((outputs, inputs // size), device=weight.device) for _ in range(2))
    fit = _symmetric8 if bits == 8 else _clipped4
    rows = max(1, CHUNK // inputs)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        found = fit(weight[part].float().reshape(-1, size))
        for target, values in zip((codes, scales, zeros), found, strict=True):
            target[part] = values.view(target[part].shape)
    return GroupedWeight(codes, scales, zeros, size, bits)


Fit = tuple[Tensor, Tensor, Tensor]  # of n groups: codes (n, size), scales (n, 1), zeros (n, 1)


def _symmetric8(x: Tensor) -> Fit:
    """Of the groups `x` (n, size)."""
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (x / scale).round_().add_(128), scale, torch.full_like(scale, 128)


def _clipped4(x: Tensor) -> Fit:
    """Of the groups `x` (n, size): the best of several clippings of their range (as in AWQ: Lin et al., 2023), each
    with scale and zero fitted to the rounded codes; then once more rounded and fitted from there.

    A group of equal values keeps code 0, scale 1 and zero = -value: exact.
    """
    mean, low, high = x.mean(1, keepdim=True), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, step = (low + high) / 2, (high - low) / 15
    best = torch.zeros_like(x), torch.ones_like(mean), -mean
    explained = torch.zeros_like(mean)
    for share in (*CLIPPING, None):
        scale, zero = (step * share, 7.5 - middle / (step * share)) if share else best[1:]
        codes = torch.addcmul(zero, x, 1 / scale).round_().clamp_(0, 15)
        fit, gain = _least_squares(x - mean, mean, codes)
        better = gain > explained  # not where a group's values are equal: NaN
        codes, scale, zero = (torch.where(better, new, old) for new, old in zip(fit, best, strict=True))
        best = codes, scale, zero
        explained = torch.where(better, gain, explained)
    return best


def _least_squares(centred: Tensor, mean: Tensor, codes: Tensor) -> tuple[Fit, Tensor]:
    """The best scale and zero for `codes`, and how much of Σcentred² they explain, (n, 1): the rest is the error."""
    middle = codes.mean(1, keepdim=True)
    shared = (codes * centred).sum(1, keepdim=True)
    scale = shared / (codes - middle).square_().sum(1, keepdim=True)
    return (codes, scale, middle - mean / scale), scale * shared
