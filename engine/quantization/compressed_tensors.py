"""compressed-tensors checkpoints, as llm-compressor writes them. config.json says which modules are quantized, and how.

    pack-quantized   weight_packed     (out, in · bits / 32) int32: codes of neighbouring inputs, + 2^(bits - 1)
                     weight_zero_point (out · bits / 32, groups) int32: likewise of outputs; if asymmetric
                     weight_g_idx      (in,) int32: each input's group; if in activation order
    int-quantized    weight (out, in) I8, weight_zero_point (out, groups) I8
    float-quantized  weight (out, in) F8_E4M3
    naive-quantized  one of the latter two

Beside these lies weight_scale: [] or [1], (out, 1), (out, groups), or one for each block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.checkpoint import FLOATS, Checkpoint, Entry
from tandem.engine.models.registry import MAX_WIDTH, Fields
from tandem.engine.quantization.fp8 import FP8, block_shape, blocks, scaled
from tandem.engine.quantization.grouped import GroupedWeight
from tandem.engine.quantization.reader import (
    ACTIVATIONS,
    Shape,
    Weight,
    WeightReader,
    choice,
    group_count,
    outlined,
    unpacked,
    words,
)

KINDS = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
BITS = {"int": (4, 8), "float": (8,)}
STRATEGIES = {"int": ("tensor", "channel", "group"), "float": ("tensor", "channel", "group", "block")}
SHUFFLED = (True, "group", "dynamic")  # values of actorder with which groups are not neighbours
MAX_QUANTIFIERS = 4  # of a target's pattern: more could match for hours


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are stored."""

    targets: list[str]
    packed: bool
    floats: bool  # FP8
    bits: int  # of a stored code
    symmetric: bool
    block: Shape | None  # outputs and inputs that share a scale; None: one scale for all
    shuffled: bool  # weight_g_idx says which inputs

    def scale_shapes(self, shape: Shape) -> list[Shape]:
        return [(1,), ()] if self.block is None else [blocks(shape, self.block)]


class CompressedTensorsReader(WeightReader):
    def __init__(self, checkpoint: Checkpoint, fields: Fields) -> None:
        super().__init__(checkpoint, fields)
        self._fields = fields
        self._ignore = _targets(fields, "ignore")
        if fields.section("transform_config").has("config_groups"):
            raise fields.fault("quantization_config: a transform_config is not supported")
        choice(fields, "sparsity_config", fields.section("sparsity_config").text("format", "dense"), ("dense",))
        groups = fields.section("config_groups")
        sections = [groups.section(name) for name in groups.values]
        self._schemes = [_scheme(fields, group) for group in sections if group.has("weights")]
        if any(group.has("input_activations") for group in sections):
            self.ignored.append(ACTIVATIONS)
        if fields.has("kv_cache_scheme"):
            self.ignored.append("kv_cache_scheme")

    def _scheme(self, name: str, shape: Shape) -> Scheme | None:
        """That of the weight's strongest target; None: the weight is stored as floats."""
        module = name.removesuffix(".weight")
        if len(shape) != 2 or _strength(self._ignore, module):
            return None
        best = max(self._schemes, key=lambda scheme: _strength(scheme.targets, module), default=None)
        return best if best and _strength(best.targets, module) else None

    def parts(self, name: str, shape: Shape) -> list[Entry]:
        scheme = self._scheme(name, shape)
        if scheme is None:
            return super().parts(name, shape)
        outputs, inputs = shape
        if scheme.block and not scheme.floats:
            group_count(self._fields, name, inputs, scheme.block[1])
        scale = self.part(f"{name}_scale", FLOATS, *scheme.scale_shapes(shape))
        if scheme.packed:
            parts = [self.part(f"{name}_packed", ("I32",), (outputs, words(inputs, scheme.bits)))]
            zeros = (words(outputs, scheme.bits), *scale.shape[1:])
        else:
            parts = [self.part(name, (FP8,) if scheme.floats else ("I8",), shape)]
            zeros = scale.shape
        if not scheme.symmetric:
            parts.append(self.part(f"{name}_zero_point", ("I32",) if scheme.packed else ("I8",), zeros))
        if scheme.shuffled:
            parts.append(self.part(f"{name}_g_idx", ("I32",), (inputs,)))
        return [*parts, scale]

    def outline(self, name: str, shape: Shape) -> GroupedWeight | None:
        scheme = self._scheme(name, shape)
        if scheme is None or scheme.floats:
            return None
        outline = outlined(shape[1], scheme.scale_shapes(shape)[0][-1], scheme.bits)
        shuffled = scheme.shuffled and self.shuffle(f"{name}_g_idx", outline) is not None
        return None if shuffled else outline

    def read(self, name: str, shape: Shape) -> Weight:
        scheme = self._scheme(name, shape)
        if scheme is None:
            return super().read(name, shape)
        scale = self.tensor(f"{name}_scale").float()
        if scheme.floats:
            return scaled(self.tensor(name), scale, scheme.block)
        outputs, inputs = shape
        scales = (scale if scale.dim() == 2 else scale.view(1, 1)).expand(outputs, -1).contiguous()
        if scheme.packed:
            codes = unpacked(self.tensor(f"{name}_packed"), scheme.bits)[:, :inputs].contiguous()
        else:
            codes = _unsigned(self.tensor(name))
        zeros = self._zeros(name, scheme, outputs).expand_as(scales).contiguous()
        weight = GroupedWeight(codes, scales, zeros, inputs // scales.shape[1], scheme.bits)
        return self.ordered(f"{name}_g_idx", weight) if scheme.shuffled else weight

    def _zeros(self, name: str, scheme: Scheme, outputs: int) -> Tensor:
        """Floats that broadcast to (out, groups)."""
        if scheme.symmetric:
            return torch.tensor(2.0 ** (scheme.bits - 1))
        stored = self.tensor(f"{name}_zero_point")
        if scheme.packed:
            return unpacked(stored.t(), scheme.bits)[:, :outputs].t().float()
        return _unsigned(stored).float()


def _unsigned(codes: Tensor) -> Tensor:
    """int8 + 128, as uint8."""
    return codes.view(torch.uint8) ^ 128


def _scheme(fields: Fields, group: Fields) -> Scheme:
    """Of one of `config_groups`. Raises ModelError for what is not read here."""
    weights = group.section("weights")
    layout = choice(fields, "format", group.text("format", fields.text("format", "missing")), tuple(KINDS))
    kind = choice(fields, f"{layout} of type", weights.text("type", "int"), KINDS[layout])
    bits = weights.integer("num_bits", default=8)
    choice(fields, f"{kind} num_bits", bits, BITS[kind])
    block = _block(fields, weights, kind)
    symmetric = weights.flag("symmetric", default=True)
    if kind == "float" or block is None:
        choice(fields, "symmetric", symmetric, (True,))
    order = weights.values.get("actorder")
    choice(fields, "actorder", order, (None, False, "weight", "static", *SHUFFLED))
    packed = layout == "pack-quantized"
    return Scheme(
        targets=_targets(group, "targets"),
        packed=packed,
        floats=kind == "float",
        bits=bits if packed else 8,
        symmetric=symmetric,
        block=block,
        shuffled=packed and order in SHUFFLED,
    )


def _block(fields: Fields, weights: Fields, kind: str) -> Shape | None:
    size = weights.integer("group_size", low=-1) if weights.has("group_size") else 0
    strategy = weights.text("strategy", "group" if size > 0 else "channel" if size else "tensor")
    choice(fields, "strategy", strategy, STRATEGIES[kind])
    if strategy == "block":
        return block_shape(weights, "block_structure")
    if strategy == "group":
        return 1, weights.integer("group_size")
    return (1, MAX_WIDTH) if strategy == "channel" else None


def _targets(fields: Fields, key: str) -> list[str]:
    """Names of modules, names of classes, or patterns after "re:", of which none may take long to match."""
    targets = fields.texts(key)
    for pattern in (target[3:] for target in targets if target.startswith("re:")):
        slow = re.search(r"\)[*+{]", pattern) or len(re.findall(r"(?<!\()[*+?{]", pattern)) > MAX_QUANTIFIERS
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as exc:
            raise fields.fault(f"quantization_config: {key}: {pattern!r:.60} is not a pattern: {exc}") from exc
        if slow:
            raise fields.fault(f"quantization_config: {key}: the pattern {pattern!r:.60} repeats too much")
    return targets


def _strength(targets: list[str], module: str) -> int:
    """3: one of `targets` is the module's name; 2: a pattern of it; 1: its class; 0: none meets it."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    if module in targets:
        return 3
    if any(re.match(target[3:], module) for target in targets if target.startswith("re:")):
        return 2
    return int(kind in targets)
