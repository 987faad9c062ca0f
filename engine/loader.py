"""From a checkpoint to weights in place: prove that it fits the model, then copy tensor by tensor.

The proof needs headers only and comes before anything is allocated: a broken directory costs no memory and no time.
A rank of a tensor-parallel group copies its slice out of the memory map and never holds a whole tensor; of a quantized
one it holds the codes, while it reads it. Codes for the CPU kernels are not read here: their layers are told where they
lie, and packing (models/packed.py) reads one layer at a time. So there is never more than the packed model and a layer.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.checkpoint import DTYPES, FLOATS, Checkpoint, Entry
from tandem.engine.kernels import native
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.layers import Codes, Linear, Slot
from tandem.engine.quantization import create_reader
from tandem.engine.quantization.float8 import Float8Weight
from tandem.engine.quantization.grouped import GroupedWeight
from tandem.engine.quantization.reader import Weight, WeightReader

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def check_weights(checkpoint: Checkpoint, slots: Iterable[Slot]) -> None:
    """Raise ModelError unless the checkpoint has every tensor, in the right shape and a dtype we load; ConfigError
    where a rank's share of the inputs cuts a group of codes in two."""
    reader = create_reader(checkpoint)
    for slot in slots:
        reader.parts(slot.name, slot.shape)
        if slot.axis == 1 and slot.size < slot.shape[1]:
            _outline(reader, slot)


def load_weights(checkpoint: Checkpoint, slots: Iterable[Slot], on_progress: Progress | None) -> None:
    """Fill every slot from the checkpoint, which `check_weights` has passed, or give its layer the codes to read.

    Progress is complete when those have been read, too. Raises ModelError for contents that headers cannot show,
    ConfigError where the ranks' shares cut a group in two or memory is out.
    """
    started = time.monotonic()
    reader = create_reader(checkpoint)
    for what in reader.ignored:
        logger.info("%s: ignoring the checkpoint's %s", checkpoint.directory, what)
    slots = list(slots)
    parts = {slot.name: reader.parts(slot.name, slot.shape) for slot in slots}
    slots.sort(key=lambda slot: (parts[slot.name][0].file, parts[slot.name][0].begin))  # as they lie on the disk
    source = _Source(reader, parts, on_progress)
    coded = set[str]()
    for layer, own in _by_layer(slots).items():
        outline = _outline_of_all(reader, own)
        if outline is not None and native.available():
            layer.codes = Codes(outline, partial(_read_codes, source, own))
            coded |= {slot.name for slot in own}
    if coded:
        logger.info("%d tensors are codes, which are read when they are packed", len(coded))
    for slot in slots:
        if slot.name not in coded:
            share = source.read(slot)
            slot.put(share.dequantize() if isinstance(share, GroupedWeight) else share)
    logger.info("Loading weights took %.2f seconds", time.monotonic() - started)


class _Source:
    """Reads, and counts the bytes that have been read."""

    def __init__(self, reader: WeightReader, parts: dict[str, list[Entry]], on_progress: Progress | None) -> None:
        self._reader, self._on_progress = reader, on_progress
        self._bytes = {name: sum(entry.end - entry.begin for entry in entries) for name, entries in parts.items()}
        self._total, self._done = sum(self._bytes.values()), 0

    def read(self, slot: Slot) -> Weight:
        """What the slot takes."""
        share = _share(self._reader.read(slot.name, slot.shape), slot)
        self._done += self._bytes[slot.name]
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        return share


def _by_layer(slots: Iterable[Slot]) -> dict[Linear, list[Slot]]:
    """Of the layers on the host the tensors that make up the weight, from its first row to its last."""
    layers: dict[Linear, list[Slot]] = {}
    for slot in slots:
        if isinstance(slot.holder, Linear) and slot.holder.on_host:
            layers.setdefault(slot.holder, []).append(slot)
    return {layer: sorted(own, key=lambda slot: slot.row) for layer, own in layers.items()}


def _outline_of_all(reader: WeightReader, slots: list[Slot]) -> GroupedWeight | None:
    """That of the weight of all `slots` if each has codes, of as many bits and in groups of one size."""
    outlines = [_outline(reader, slot) for slot in slots]
    found = [outline for outline in outlines if outline is not None]
    alike = len({(outline.bits, outline.group_size) for outline in found}) == 1
    return found[0] if alike and len(found) == len(slots) else None


def _read_codes(source: _Source, slots: list[Slot]) -> GroupedWeight:
    """The weight of all `slots`."""
    shares = list[GroupedWeight]()
    for slot in slots:
        share = source.read(slot)
        assert isinstance(share, GroupedWeight), f"the outline of {slot.name} says that it has codes"
        shares.append(share)
    return _stacked(shares)


def _stacked(parts: list[GroupedWeight]) -> GroupedWeight:
    """One upon the other."""
    rows = ([part.codes for part in parts], [part.scales for part in parts], [part.zeros for part in parts])
    codes, scales, zeros = (own[0] if len(own) == 1 else torch.cat(own) for own in rows)
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros)


def _outline(reader: WeightReader, slot: Slot) -> GroupedWeight | None:
    """One row of the slot's share, if the checkpoint has codes for it."""
    outline = reader.outline(slot.name, slot.shape)
    return outline if outline is None or slot.axis == 0 else _cut(outline, slot)


def _share(weight: Weight, slot: Slot) -> Weight:
    """What the slot takes of the whole tensor."""
    if isinstance(weight, Tensor):
        return weight.narrow(slot.axis, slot.start, slot.size)
    if isinstance(weight, Float8Weight):
        cut = weight.columns if slot.axis else weight.rows
        return cut(slot.start, slot.start + slot.size)
    return _cut(weight, slot)


def _cut(weight: GroupedWeight, slot: Slot) -> GroupedWeight:
    cut = weight.columns if slot.axis else weight.rows
    try:
        return cut(slot.start, slot.start + slot.size)
    except ConfigError as exc:
        raise ConfigError(f"{slot.name}: {exc.message}") from exc


def fill_random(slots: Iterable[Slot], seed: int) -> None:
    """`--load-format dummy`: weights that keep activations of order 1, the same for every device and rank count.

    Each tensor has its own generator, seeded by (seed, name), and is drawn whole on the host in float32.
    """
    for slot in slots:
        if slot.name.endswith("norm.weight"):
            slot.target.fill_(1.0)
        elif slot.name.endswith(".bias"):
            slot.target.zero_()
        else:
            digest = hashlib.sha256(f"{seed}|{slot.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            limit = (3.0 / slot.shape[-1]) ** 0.5  # uniform with variance 1 / inputs
            whole = torch.empty(slot.shape).uniform_(-limit, limit, generator=generator)
            slot.put(whole.narrow(slot.axis, slot.start, slot.size))


def checkpoint_dtype(model: ModelConfig, entries: dict[str, Entry]) -> str:
    """What `--dtype auto` means: what config.json says, else what the embedding is stored as."""
    if model.dtype is not None:
        return model.dtype
    entry = entries.get("model.embed_tokens.weight")
    stored = DTYPES[entry.dtype] if entry and entry.dtype in FLOATS else torch.float32
    return str(stored).removeprefix("torch.")
