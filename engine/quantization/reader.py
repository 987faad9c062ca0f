"""Between a checkpoint's tensors and the loader: one reader for each way in which weights are stored.

A reader names a weight's tensors and proves them from the headers (`parts`), says whether it has codes (`outline`),
then makes the weight of them (`read`).
Weights that a quantized checkpoint leaves as they are, norms and biases say, are read by the base class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor

from tandem.common.errors import ModelError
from tandem.engine.checkpoint import FLOATS, Checkpoint, Entry
from tandem.engine.models.registry import Fields
from tandem.engine.quantization.float8 import Float8Weight
from tandem.engine.quantization.grouped import GroupedWeight

Weight = Tensor | GroupedWeight | Float8Weight
Shape = tuple[int, ...]
Value = TypeVar("Value")
ACTIVATIONS = "quantization of activations: weights are made floats before they are used"
KV_SCALES = ("k_scale", "v_scale", "kv_scale")


class WeightReader:
    """Weights stored as floats. `fields` are those of quantization_config."""

    def __init__(self, checkpoint: Checkpoint, fields: Fields) -> None:
        self._checkpoint = checkpoint
        self._where = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.directory
        self.ignored: list[str] = []  # what the checkpoint has for others, for the log
        if any(name.rpartition(".")[2] in KV_SCALES for name in checkpoint.entries):
            self.ignored.append("scales of a quantized KV cache")

    def parts(self, name: str, shape: Shape) -> list[Entry]:
        """The tensors that make up the weight `name` of `shape`. Raises ModelError unless all are there and fit."""
        return [self.part(name, FLOATS, shape)]

    def outline(self, name: str, shape: Shape) -> GroupedWeight | None:
        """One row of the shape of what `read` gives, if that is codes. Raises ModelError as `read` does."""
        return None

    def read(self, name: str, shape: Shape) -> Weight:
        """The weight, whose parts have been proved: a view where it lies there as floats."""
        return self.tensor(name)

    def part(self, name: str, dtypes: tuple[str, ...], *shapes: Shape) -> Entry:
        """The tensor `name`, which has one of `dtypes` and one of `shapes`. Raises ModelError."""
        entry = self._checkpoint.entries.get(name)
        if entry is None:
            raise ModelError(f"{self._where}: tensor {name!r} is missing")
        if entry.shape not in shapes:
            found, wanted = list(entry.shape), " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{entry.file}: tensor {name!r} has shape {found}, but config.json implies {wanted}")
        if entry.dtype not in dtypes:
            kinds = ", ".join(dtypes)
            raise ModelError(f"{entry.file}: tensor {name!r} has dtype {entry.dtype}; supported: {kinds}")
        return entry

    def has(self, name: str) -> bool:
        return name in self._checkpoint.entries

    def module_of(self, name: str, shape: Shape, *parts: str) -> str | None:
        """The module of the weight `name` if it lies there as some of `parts` instead of floats."""
        module = name.removesuffix(".weight")
        packed = len(shape) == 2 and not self.has(name) and any(self.has(f"{module}.{part}") for part in parts)
        return module if packed else None

    def dtype(self, name: str) -> str | None:
        entry = self._checkpoint.entries.get(name)
        return entry.dtype if entry else None

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def shuffle(self, name: str, weight: GroupedWeight) -> Tensor | None:
        """Each input's group, (in,) int64, as the tensor `name` gives it; None where groups are neighbours, as in
        `weight`. Raises ModelError for groups that there are not."""
        groups = weight.scales.shape[1]
        index = self.tensor(name).long()
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= groups:
            file = self._checkpoint.entries[name].file
            raise ModelError(f"{file}: tensor {name!r} has the groups {low} to {high}, but there are {groups}")
        return None if torch.equal(index, torch.arange(len(index)) // weight.group_size) else index

    def ordered(self, name: str, weight: GroupedWeight) -> Weight:
        """`weight`, whose inputs' groups the tensor `name` gives: as floats if they are shuffled (activation order)."""
        index = self.shuffle(name, weight)
        return weight if index is None else (weight.codes - weight.zeros[:, index]) * weight.scales[:, index]


def choice(fields: Fields, key: str, value: Value, choices: Collection[object]) -> Value:
    """`value`, of the field `key`, if it is one of `choices`. Raises ModelError."""
    if value not in choices:
        kinds = ", ".join(map(str, choices))
        raise fields.fault(f"quantization_config: {key} {value!r:.60} is not supported; supported: {kinds}")
    return value


def group_count(fields: Fields, name: str, inputs: int, group_size: int) -> int:
    """How many groups of `group_size` there are in a row; one if it is -1 or longer than the row. Raises ModelError."""
    size = group_size if 0 < group_size < inputs else inputs
    if inputs % size:
        raise fields.fault(f"quantization_config: groups of {size} do not divide the {inputs} inputs of {name!r}")
    return inputs // size


def outlined(inputs: int, groups: int, bits: int) -> GroupedWeight:
    """One row with nothing in it."""
    codes, of_groups = torch.zeros(1, inputs, dtype=torch.uint8), torch.zeros(1, groups)
    return GroupedWeight(codes, of_groups, of_groups, inputs // groups, bits)


def words(count: int, bits: int) -> int:
    """How many int32 hold `count` codes."""
    return -(-count * bits // 32)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows, words) int32 -> (rows, words · 32 / bits) uint8: codes of 4 or 8 bits, the lowest bits first."""
    codes = packed.flatten().view(torch.uint8).view(len(packed), -1)
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
