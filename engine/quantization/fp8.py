"""FP8 checkpoints of method `fp8`: as DeepSeek, Qwen and AutoFP8 publish them.

    weight           (out, in) F8_E4M3
    weight_scale_inv (⌈out / rows⌉, ⌈in / columns⌉), with weight_block_size [rows, columns]
    weight_scale     [] or [1], without; transformers calls this one weight_scale_inv, too

Despite its name the former is a factor like the latter.
"""

from __future__ import annotations

import re
from typing import cast

from torch import Tensor

from tandem.engine.checkpoint import FLOATS, Checkpoint, Entry
from tandem.engine.models.registry import Fields
from tandem.engine.quantization.float8 import Float8Weight
from tandem.engine.quantization.reader import ACTIVATIONS, Shape, Weight, WeightReader, choice

FP8 = "F8_E4M3"


class Fp8Reader(WeightReader):
    def __init__(self, checkpoint: Checkpoint, fields: Fields) -> None:
        super().__init__(checkpoint, fields)
        choice(fields, "fmt", fields.text("fmt", "e4m3"), ("e4m3",))
        self._block = block_shape(fields, "weight_block_size") if fields.has("weight_block_size") else None
        self.ignored.append(ACTIVATIONS)

    def _scale(self, name: str) -> str:
        usual, other = f"{name}_scale", f"{name}_scale_inv"
        return other if self._block or self.has(other) else usual

    def parts(self, name: str, shape: Shape) -> list[Entry]:
        if len(shape) != 2 or self.dtype(name) != FP8:
            return super().parts(name, shape)
        shapes = [blocks(shape, self._block)] if self._block else [(), (1,)]
        return [self.part(name, (FP8,), shape), self.part(self._scale(name), FLOATS, *shapes)]

    def read(self, name: str, shape: Shape) -> Weight:
        if self.dtype(name) != FP8:
            return super().read(name, shape)
        return scaled(self.tensor(name), self.tensor(self._scale(name)), self._block)


def block_shape(fields: Fields, key: str) -> Shape:
    """Two lengths, as a list or with an x between. Raises ModelError."""
    value = fields.values.get(key)
    sides = value.split("x") if isinstance(value, str) else value
    texts = [str(side) for side in cast(list[object], sides)] if isinstance(sides, list) else []
    lengths = tuple(int(text) for text in texts if re.fullmatch("[1-9][0-9]{0,8}", text))
    if not len(texts) == len(lengths) == 2:
        raise fields.fault(f"quantization_config: {key!r} must be two lengths, not {value!r:.60}")
    return lengths


def blocks(shape: Shape, block: Shape) -> Shape:
    """How many blocks `shape` has along each side, the last ones perhaps cut."""
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True))


def scaled(weight: Tensor, scale: Tensor, block: Shape | None) -> Weight:
    """`weight` (out, in) with its scale, one or of blocks: as it is where an output has one scale, else their product,
    float32."""
    rows, columns = block or weight.shape
    outputs, inputs = weight.shape
    scale = scale.float().reshape(-(-outputs // rows), -1).repeat_interleave(min(rows, outputs), dim=0)[:outputs]
    if scale.shape[1] == 1:
        return Float8Weight(weight, scale)
    return weight.float().mul_(scale.repeat_interleave(columns, dim=1)[:, :inputs])
