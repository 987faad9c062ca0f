"""The layers of a decoder, each knowing its share of the weights under tensor parallelism.

    column-parallel   (out / world, in)   each rank computes some outputs          qkv, gate and up, embedding rows
    row-parallel      (out, in / world)   each rank sums some inputs, then all_reduce   attention output, down

Layers are plain objects around tensors: there is no training, hence no parameters to register. `slots()` tells
the loader which checkpoint tensor goes into which part of which (merged) weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.group import Group
from tandem.engine.models.config import RopeConfig
from tandem.engine.quantization.float8 import Float8Weight, fits
from tandem.engine.quantization.grouped import GroupedWeight


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights live and how they are split."""

    device: torch.device
    dtype: torch.dtype
    group: Group
    in_float8: Callable[[str], bool] = lambda name: False  # whether a linear layer holds the weight of this name so

    def float8(self, names: list[str], outputs: int, inputs: int) -> Float8Weight | None:
        """For the weights `names`, merged; None where they are not to be in FP8 or cannot be multiplied."""
        wanted = all(self.in_float8(f"{name}.weight") for name in names) and fits(outputs, inputs)
        return Float8Weight.empty(outputs, inputs, self.device) if wanted else None

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one checkpoint tensor, of which this rank takes [start : start + size] along `axis`."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    size: int
    holder: Tensor | Linear  # what takes it: a tensor of this rank, or rows of a linear layer's weight, from `row` on
    axis: int = 0
    start: int = 0
    row: int = 0

    @property
    def target(self) -> Tensor:
        """Where it goes as floats: a view."""
        if isinstance(self.holder, Tensor):
            return self.holder
        return self.holder.weight.narrow(0, self.row, self._rows)

    @property
    def _rows(self) -> int:
        return self.size if self.axis == 0 else self.shape[0]

    def put(self, values: Tensor | Float8Weight) -> None:
        """Make `values` this rank's part, in the form in which it is held."""
        held = None if isinstance(self.holder, Tensor) else self.holder.float8
        if held is not None:
            held.rows(self.row, self.row + self._rows).copy_(values)
        else:
            self.target.copy_(values if isinstance(values, Tensor) else values.dequantize())


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight that the checkpoint has as codes, in which it lies until somebody reads it."""

    outline: GroupedWeight  # one row with nothing in it
    read: Callable[[], GroupedWeight]


class Linear:
    """The weight (outputs, inputs) of this rank. It is floats, allocated when first asked for, or `codes`; or `float8`,
    on devices that multiply it."""

    codes: Codes | None = None  # set by the loader before anybody asks for floats

    def __init__(self, names: list[str], outputs: int, inputs: int, place: Placement) -> None:
        """Of the weights `names`, merged."""
        self._name, self._shape, self._place = names[0], (outputs, inputs), place
        self.float8 = place.float8(names, outputs, inputs)
        self.on_host = place.device.type == "cpu"
        if not self.on_host and self.float8 is None:
            _ = self.weight  # at once: whether a model fits on a device shows when it is made

    @cached_property
    def weight(self) -> Tensor:
        """Floats in the model's dtype; those that the codes stand for if there are codes. Raises ConfigError."""
        assert self.float8 is None, "held in FP8: use `product`"
        try:
            weight = self._place.empty(*self._shape)
        except RuntimeError as exc:  # how the host's allocator says that memory is out
            raise ConfigError(f"{self._name}: the weight does not fit into memory: {str(exc).splitlines()[0]}") from exc
        if self.codes is not None:
            weight.copy_(self.codes.read().dequantize())
            self.codes = None  # they refer to this layer: the floats must go when it goes
        return weight

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` (T, inputs) -> (T, outputs)."""
        return F.linear(x, self.weight, bias) if self.float8 is None else self.float8.product(x, bias)


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, name: str, size: int, eps: float, place: Placement) -> None:
        self.name, self.eps = name, eps
        self.weight = place.empty(size)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` is (…, size)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def slots(self) -> Iterator[Slot]:
        yield _whole(f"{self.name}.weight", self.weight)


class ColumnLinear(Linear):
    """Several projections of one input, merged into one weight; `parts` are (checkpoint name, outputs)."""

    def __init__(self, parts: list[tuple[str, int]], inputs: int, bias: bool, place: Placement) -> None:
        self.inputs = inputs
        self.parts = parts
        self.rank, self.world = place.group.rank, place.group.world
        outputs = sum(size for _, size in parts) // self.world
        super().__init__([name for name, _ in parts], outputs, inputs, place)
        self.bias = place.empty(outputs) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """(T, inputs) -> (T, outputs of this rank), the parts one behind the other."""
        return self.product(x, self.bias)

    def slots(self) -> Iterator[Slot]:
        row = 0
        for name, size in self.parts:
            share = size // self.world
            start = self.rank * share
            yield Slot(f"{name}.weight", (size, self.inputs), share, self, start=start, row=row)
            if self.bias is not None:
                yield Slot(f"{name}.bias", (size,), share, self.bias[row : row + share], start=start)
            row += share


class RowLinear(Linear):
    def __init__(self, name: str, inputs: int, outputs: int, bias: bool, place: Placement) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.group = place.group
        super().__init__([name], outputs, inputs // place.group.world, place)
        self.bias = place.empty(outputs) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """(T, inputs of this rank) -> (T, outputs), the same on all ranks."""
        bias = self.bias if self.group.rank == 0 else None  # added once, not once for each rank
        return self.group.all_reduce(self.product(x, bias))

    def slots(self) -> Iterator[Slot]:
        share = self.inputs // self.group.world
        yield Slot(f"{self.name}.weight", (self.outputs, self.inputs), share, self, 1, self.group.rank * share)
        if self.bias is not None:
            yield _whole(f"{self.name}.bias", self.bias)


class VocabMatrix:
    """One vector for each token, split by rows: an embedding, an output projection, or both (tied).

    The last rank's rows may reach beyond the vocabulary; those are zero and cut off after gathering.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, place: Placement) -> None:
        self.name, self.group = name, place.group
        self.shape = (vocab_size, hidden_size)
        rows = -(-vocab_size // self.group.world)
        self.weight = place.zeros(rows, hidden_size)
        self.start = min(self.group.rank * rows, vocab_size)
        self.used = min(rows, vocab_size - self.start)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) -> (T, hidden)."""
        if self.group.world == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        ours = (local >= 0) & (local < self.used)
        return self.group.all_reduce(F.embedding(local * ours, self.weight) * ours[:, None])

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, hidden) -> (R, vocab) on rank 0; elsewhere only this rank's columns, for nobody's use."""
        parts = self.group.gather(F.linear(hidden, self.weight))
        return torch.cat(parts, dim=-1)[:, : self.shape[0]] if len(parts) > 1 else parts[0]

    def slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.shape, self.used, self.weight[: self.used], start=self.start)


def _whole(name: str, tensor: Tensor) -> Slot:
    """Of what every rank has whole."""
    return Slot(name, tuple(tensor.shape), len(tensor), tensor)


class Rotary:
    """Rotary position embedding (Su et al., 2021), halves paired as in Hugging Face checkpoints."""

    def __init__(self, rope: RopeConfig, head_dim: int, place: Placement) -> None:
        self.frequencies = inverse_frequencies(rope, head_dim).to(place.device)
        self.factor = rope.attention_factor
        self.dtype = place.dtype

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for `positions` (T,): (T, 1, head_dim / 2) each. Once a step, for all layers."""
        angles = positions.float()[:, None, None] * self.frequencies
        return (angles.cos() * self.factor).to(self.dtype), (angles.sin() * self.factor).to(self.dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of `x` (T, heads, head_dim)."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair, (head_dim / 2,) float32 on the host."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope, head_dim)
    return base


def _llama3(base: Tensor, rope: RopeConfig) -> Tensor:
    """Slow pairs are slowed by `factor`, fast ones kept, those between interpolated (Llama 3.1 reference code)."""
    turns = rope.original_max_position * base / (2 * math.pi)  # within the trained length
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * base / rope.factor + kept * base


def _yarn(base: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Between the pairs that turn `beta_fast` and `beta_slow` times within the trained length, a linear ramp from
    kept to slowed by `factor` (Peng et al., 2023)."""
    low, high = (
        head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return slowed * base / rope.factor + (1.0 - slowed) * base
