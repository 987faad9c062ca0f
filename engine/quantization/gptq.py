"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (Frantar et al., 2022).

    qweight (in · bits / 32, out) int32      codes of neighbouring inputs in one word, the first in the lowest bits
    qzeros  (groups, out · bits / 32) int32  likewise of neighbouring outputs, each less one unless gptq_v2
    scales  (groups, out) floats
    g_idx   (in,) int32                      each input's group; may be absent when a group's inputs are neighbours

Biases and what was not quantized lie beside these under their usual names.
"""

from __future__ import annotations

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

PARTS = ("qweight", "qzeros", "scales")
ONES = {4: 0x11111111, 8: 0x01010101}  # one in each code of a word


class GptqReader(WeightReader):
    def __init__(self, checkpoint: Checkpoint, fields: Fields) -> None:
        super().__init__(checkpoint, fields)
        self._fields = fields
        self._bits = choice(fields, "bits", fields.integer("bits"), ONES)
        layout = fields.text("checkpoint_format", fields.text("format", "gptq"))
        choice(fields, "checkpoint_format", layout, ("gptq", "gptq_v2"))
        choice(fields, "is_marlin_format", fields.flag("is_marlin_format"), (False,))
        choice(fields, "pack_dtype", fields.text("pack_dtype", "int32"), ("int32",))
        # Added to whole words, as GPTQModel has subtracted it: a zero of 0 has borrowed from its neighbour.
        self._addend = ONES[self._bits] if layout == "gptq" else 0
        self._group_size = fields.integer("group_size", low=-1)
        self._shuffled = fields.flag("desc_act")

    def parts(self, name: str, shape: Shape) -> list[Entry]:
        module = self.module_of(name, shape, *PARTS)
        if module is None:
            return super().parts(name, shape)
        outputs, inputs = shape
        groups = group_count(self._fields, name, inputs, self._group_size)
        found = [
            self.part(f"{module}.qweight", ("I32",), (words(inputs, self._bits), outputs)),
            self.part(f"{module}.qzeros", ("I32",), (groups, words(outputs, self._bits))),
            self.part(f"{module}.scales", FLOATS, (groups, outputs)),
        ]
        if self._shuffled or self.has(f"{module}.g_idx"):
            found.append(self.part(f"{module}.g_idx", ("I32",), (inputs,)))
        return found

    def outline(self, name: str, shape: Shape) -> GroupedWeight | None:
        module = self.module_of(name, shape, *PARTS)
        if module is None:
            return None
        index = f"{module}.g_idx"
        outline = outlined(shape[1], group_count(self._fields, name, shape[1], self._group_size), self._bits)
        return None if self.has(index) and self.shuffle(index, outline) is not None else outline

    def read(self, name: str, shape: Shape) -> Weight:
        module = self.module_of(name, shape, *PARTS)
        if module is None:
            return super().read(name, shape)
        outputs, inputs = shape
        scales = self.tensor(f"{module}.scales").float().t().contiguous()
        zeros = unpacked(self.tensor(f"{module}.qzeros") + self._addend, self._bits)[:, :outputs].t()
        codes = unpacked(self.tensor(f"{module}.qweight").t(), self._bits)[:, :inputs].contiguous()
        weight = GroupedWeight(codes, scales, zeros.float().contiguous(), inputs // scales.shape[1], self._bits)
        index = f"{module}.g_idx"
        return self.ordered(index, weight) if self.has(index) else weight
