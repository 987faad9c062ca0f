"""What a worker tells the router about itself on its Watch stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.common.block_hash import BlockHash
from tandem.common.worker_config import Role

WorkerState = Literal["ready", "draining"]


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker is; constant for one incarnation."""

    name: str
    role: Role
    incarnation: str  # random, new at every start
    model: str  # revision
    fingerprint: bytes  # of the KV layout, 32 bytes; what its block hashes are rooted in
    pairing: bytes  # 32 bytes; P and D pair when it is equal, whatever their block sizes
    block_size: int  # tokens
    max_model_len: int  # tokens
    max_num_seqs: int
    pid: int


@dataclass(frozen=True, slots=True)
class Load:
    """A moment of a worker. A block is in exactly one of free, cached, owned, reserved, quarantined."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0  # prompt tokens not yet computed
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_owned: int = 0
    blocks_reserved: int = 0
    blocks_quarantined: int = 0

    @property
    def kv_usage(self) -> float:
        """The share of blocks that cannot be had now, 0 to 1; cached blocks can be evicted."""
        if not self.blocks_total:
            return 0.0
        return 1.0 - (self.blocks_free + self.blocks_cached) / self.blocks_total


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """Sequence numbers are contiguous from 0; event 0 is complete (described, every findable block), later ones
    carry changes: `description` is None and the hashes are those stored or removed since the previous event."""

    sequence: int
    state: WorkerState
    load: Load
    description: Description | None = None
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
