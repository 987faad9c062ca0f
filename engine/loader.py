"""From a checkpoint to weights in place: prove that it fits the model, then copy shard by shard.

The proof needs headers only and comes before anything is allocated: a broken directory costs no memory and no time.
A rank of a tensor-parallel group copies its slice out of the memory map and never holds a whole tensor.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable

import torch

from tandem.common.errors import ModelError
from tandem.engine.checkpoint import DTYPES, Checkpoint, Entry, mapped, tensor
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.layers import Slot

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def check_weights(checkpoint: Checkpoint, slots: Iterable[Slot]) -> None:
    """Raise ModelError unless the checkpoint has every tensor, in the right shape and a dtype we load."""
    where = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.directory
    for slot in slots:
        entry = checkpoint.entries.get(slot.name)
        if entry is None:
            raise ModelError(f"{where}: tensor {slot.name!r} is missing")
        if entry.shape != slot.shape:
            found, wanted = list(entry.shape), list(slot.shape)
            raise ModelError(f"{entry.file}: tensor {slot.name!r} has shape {found}, but config.json implies {wanted}")
        if entry.dtype not in DTYPES:
            kinds = ", ".join(DTYPES)
            raise ModelError(f"{entry.file}: tensor {slot.name!r} has dtype {entry.dtype}; supported: {kinds}")


def load_weights(checkpoint: Checkpoint, slots: Iterable[Slot], on_progress: Progress | None) -> None:
    """Fill every slot from the checkpoint, which `check_weights` has passed."""
    started = time.monotonic()
    work = sorted(((checkpoint.entries[slot.name], slot) for slot in slots), key=lambda item: item[0].file)
    total = sum(entry.end - entry.begin for entry, _ in work)
    done = 0
    for file in checkpoint.files:
        with mapped(file) as data:
            for entry, slot in (item for item in work if item[0].file == file):
                source = tensor(data, entry)
                slot.target.copy_(source.narrow(slot.axis, slot.start, slot.target.shape[slot.axis]))
                done += entry.end - entry.begin
                if on_progress is not None:
                    on_progress(done, total)
    logger.info("Loading weights took %.2f seconds", time.monotonic() - started)


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
    stored = DTYPES.get(entry.dtype) if entry else None
    return str(stored or torch.float32).removeprefix("torch.")
