"""From a checkpoint to weights in place: prove that it fits the model, then copy tensor by tensor.

The proof needs headers only and comes before anything is allocated: a broken directory costs no memory and no time.
A rank of a tensor-parallel group copies its slice out of the memory map and never holds a whole tensor; of a quantized
one it holds the codes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.checkpoint import DTYPES, FLOATS, Checkpoint, Entry
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.layers import Slot
from tandem.engine.quantization import create_reader
from tandem.engine.quantization.grouped import GroupedWeight
from tandem.engine.quantization.reader import Weight

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def check_weights(checkpoint: Checkpoint, slots: Iterable[Slot]) -> None:
    """Raise ModelError unless the checkpoint has every tensor, in the right shape and a dtype we load."""
    reader = create_reader(checkpoint)
    for slot in slots:
        reader.parts(slot.name, slot.shape)


def load_weights(checkpoint: Checkpoint, slots: Iterable[Slot], on_progress: Progress | None) -> None:
    """Fill every slot from the checkpoint, which `check_weights` has passed.

    Raises ModelError for contents that headers cannot show, ConfigError where the ranks' shares cut a group in two.
    """
    started = time.monotonic()
    reader = create_reader(checkpoint)
    for what in reader.ignored:
        logger.info("%s: ignoring the checkpoint's %s", checkpoint.directory, what)
    work = [(reader.parts(slot.name, slot.shape), slot) for slot in slots]
    work.sort(key=lambda item: (item[0][0].file, item[0][0].begin))  # as they lie on the disk
    total = sum(part.end - part.begin for parts, _ in work for part in parts)
    done = 0
    for parts, slot in work:
        share = _share(reader.read(slot.name, slot.shape), slot)
        slot.target.copy_(share.dequantize() if isinstance(share, GroupedWeight) else share)
        done += sum(part.end - part.begin for part in parts)
        if on_progress is not None:
            on_progress(done, total)
    logger.info("Loading weights took %.2f seconds", time.monotonic() - started)


def _share(weight: Weight, slot: Slot) -> Weight:
    """What the slot takes of the whole tensor."""
    size = slot.target.shape[slot.axis]
    if isinstance(weight, Tensor):
        return weight.narrow(slot.axis, slot.start, size)
    cut = weight.columns if slot.axis else weight.rows
    try:
        return cut(slot.start, slot.start + size)
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
            slot.target.copy_(whole.narrow(slot.axis, slot.start, slot.target.shape[slot.axis]))


def checkpoint_dtype(model: ModelConfig, entries: dict[str, Entry]) -> str:
    """What `--dtype auto` means: what config.json says, else what the embedding is stored as."""
    if model.dtype is not None:
        return model.dtype
    entry = entries.get("model.embed_tokens.weight")
    stored = DTYPES[entry.dtype] if entry and entry.dtype in FLOATS else torch.float32
    return str(stored).removeprefix("torch.")
