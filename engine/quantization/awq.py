"""AWQ checkpoints in AutoAWQ's GEMM layout (Lin et al., 2023).

    qweight (in, out / 8) int32      codes of eight neighbouring outputs in one word, ordered as in ORDER
    qzeros  (groups, out / 8) int32  likewise
    scales  (groups, out) floats

Biases and what was not quantized lie beside these under their usual names.
"""

from __future__ import annotations

from torch import Tensor

from tandem.engine.checkpoint import FLOATS, Checkpoint, Entry
from tandem.engine.models.registry import Fields
from tandem.engine.quantization.grouped import GroupedWeight
from tandem.engine.quantization.reader import (
    Shape,
    Weight,
    WeightReader,
    choice,
    group_count,
    outlined,
    unpacked,
    words,
)

LAYOUT_FIELDS = ("version", "format", "checkpoint_format")  # of AutoAWQ, transformers and GPTQModel
PARTS = ("qweight", "qzeros", "scales")
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word each of eight outputs is, counted from the lowest bits
BITS = 4


class AwqReader(WeightReader):
    def __init__(self, checkpoint: Checkpoint, fields: Fields) -> None:
        super().__init__(checkpoint, fields)
        self._fields = fields
        choice(fields, "bits", fields.integer("bits" if fields.has("bits") else "w_bit"), (BITS,))
        key = next((key for key in LAYOUT_FIELDS if fields.has(key)), "version")
        choice(fields, key, fields.text(key, "gemm").lower(), ("gemm",))
        choice(fields, "zero_point", fields.flag("zero_point", default=True), (True,))
        self._group_size = fields.integer("group_size" if fields.has("group_size") else "q_group_size", low=-1)

    def parts(self, name: str, shape: Shape) -> list[Entry]:
        module = self.module_of(name, shape, *PARTS)
        if module is None:
            return super().parts(name, shape)
        outputs, inputs = shape
        groups = group_count(self._fields, name, inputs, self._group_size)
        return [
            self.part(f"{module}.qweight", ("I32",), (inputs, words(outputs, BITS))),
            self.part(f"{module}.qzeros", ("I32",), (groups, words(outputs, BITS))),
            self.part(f"{module}.scales", FLOATS, (groups, outputs)),
        ]

    def outline(self, name: str, shape: Shape) -> GroupedWeight | None:
        if self.module_of(name, shape, *PARTS) is None:
            return None
        return outlined(shape[1], group_count(self._fields, name, shape[1], self._group_size), BITS)

    def read(self, name: str, shape: Shape) -> Weight:
        module = self.module_of(name, shape, *PARTS)
        if module is None:
            return super().read(name, shape)
        codes, zeros = (_outputs(self.tensor(f"{module}.{part}"))[: shape[0]] for part in ("qweight", "qzeros"))
        scales = self.tensor(f"{module}.scales").float().t().contiguous()
        return GroupedWeight(codes, scales, zeros.float(), shape[1] // scales.shape[1], BITS)


def _outputs(packed: Tensor) -> Tensor:
    """(n, out / 8) words -> (out, n) codes."""
    codes = unpacked(packed, BITS)
    return codes.view(len(codes), -1, 8)[:, :, ORDER].flatten(1).t().contiguous()
