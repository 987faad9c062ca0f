"""Who holds which KV block. Ids only: the tensors are in kv_cache.py.

Invariant: every block is in exactly one state, and every operation is O(1) per block.

             allocate                        release (unpublished)
    free ───────────────► owned ─────────────────────────────────► free
     │ ▲                  ▲ │ ▲ take                                 ▲
     │ │ unreserve   adopt│ │ └───────────── cached ◄── release ─────┤ (published)
     │ └──────────────────┤ └─ refs > 0        │ evicted, least recently used first
     └── reserve ──► reserved ──► quarantined ─┴─────────────────────┘

A published block is findable by the hash of everything up to its last token (common/block_hash.py); a block is
cached when nobody owns it any more but its content may still serve a later prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from tandem.common.block_hash import BlockHash
from tandem.common.worker_info import Load


class State(Enum):
    FREE = "free"
    CACHED = "cached"
    OWNED = "owned"
    RESERVED = "reserved"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class PoolCounts:
    total: int
    free: int
    cached: int
    owned: int
    reserved: int
    quarantined: int

    @property
    def at_rest(self) -> bool:
        return self.free + self.cached == self.total

    def load(self, running: int, waiting: int, waiting_tokens: int) -> Load:
        blocks = (self.total, self.free, self.cached, self.owned, self.reserved, self.quarantined)
        return Load(running, waiting, waiting_tokens, *blocks)


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """What became findable, or stopped being so, since the events were last drained; each hash once."""

    stored: list[BlockHash]
    removed: list[BlockHash]


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._state = [State.FREE] * num_blocks
        self._refs = [0] * num_blocks
        self._hash: list[BlockHash | None] = [None] * num_blocks
        # dicts keep insertion order and remove from the middle in O(1): a deque could not
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks))
        self._cached: dict[int, None] = {}  # least recently used first
        self._by_hash: dict[BlockHash, int] = {}
        self._count = dict.fromkeys(State, 0) | {State.FREE: num_blocks}
        self._changed: dict[BlockHash, None] = {}  # since the last drain

    # ------------------------------------------------------------------ looking

    @property
    def available(self) -> int:
        """Blocks that `allocate` or `reserve` could hand out now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> PoolCounts:
        count = self._count
        return PoolCounts(
            self.num_blocks,
            count[State.FREE],
            count[State.CACHED],
            count[State.OWNED],
            count[State.RESERVED],
            count[State.QUARANTINED],
        )

    def free_among(self, blocks: Iterable[int]) -> list[int]:
        return [block for block in blocks if self._state[block] is State.FREE]

    @property
    def caching(self) -> bool:
        """Whether published blocks can be found."""
        return self._caching

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest contiguous prefix of `hashes` that is here. Takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def hashes(self) -> list[BlockHash]:
        """Everything findable now."""
        return list(self._by_hash)

    def drain_events(self) -> CacheEvents:
        changed, self._changed = self._changed, {}
        stored = [block_hash for block_hash in changed if block_hash in self._by_hash]
        return CacheEvents(stored, [block_hash for block_hash in changed if block_hash not in self._by_hash])

    # ------------------------------------------------------------------ owning

    def allocate(self, count: int) -> list[int] | None:
        """`count` owned blocks with one reference each, or None (and no change) when there are not enough."""
        return self._hand_out(count, State.OWNED, refs=1)

    def take(self, blocks: Sequence[int]) -> None:
        """One more reference on each block found by `match` or owned by another sequence."""
        for block in blocks:
            if self._state[block] is State.CACHED:
                del self._cached[block]
                self._move(block, State.OWNED)
            assert self._state[block] is State.OWNED, f"block {block} is {self._state[block].value}, cannot be shared"
            self._refs[block] += 1

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """The owned block is full and its content final: let later prompts find it."""
        assert self._state[block] is State.OWNED, f"block {block} is {self._state[block].value}, cannot be published"
        if not self._caching or self._hash[block] is not None or block_hash in self._by_hash:
            return  # the same content is already findable in another block
        self._hash[block] = block_hash
        self._by_hash[block_hash] = block
        self._changed[block_hash] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference on each back. The tail goes first, so that it is evicted before the shared prefix."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released more often than taken"
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if self._hash[block] is None:
                self._free_block(block)
            else:
                self._cached[block] = None
                self._move(block, State.CACHED)

    def forget(self, blocks: Iterable[int]) -> None:
        """The owned blocks' content is not to be trusted: no later prompt finds it."""
        for block in blocks:
            assert self._state[block] is State.OWNED, (
                f"block {block} is {self._state[block].value}, nobody vouches for it"
            )
            self._unpublish(block)

    # ------------------------------------------------------------------ reserving, for blocks a peer will fill

    def reserve(self, count: int) -> list[int] | None:
        return self._hand_out(count, State.RESERVED, refs=0)

    def adopt(self, blocks: Sequence[int]) -> None:
        """What landed is verified: reserved blocks become owned."""
        for block in blocks:
            assert self._state[block] is State.RESERVED, f"block {block} is not reserved"
            self._refs[block] = 1
            self._move(block, State.OWNED)

    def unreserve(self, blocks: Sequence[int]) -> None:
        """An aborted reservation that no peer can write to any more."""
        for block in blocks:
            assert self._state[block] in (State.RESERVED, State.QUARANTINED), f"block {block} is not reserved"
            self._free_block(block)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """An aborted reservation that a one-sided write may still reach; `unreserve` ends it (rule H3)."""
        for block in blocks:
            assert self._state[block] is State.RESERVED, f"block {block} is not reserved"
            self._move(block, State.QUARANTINED)

    # ------------------------------------------------------------------ inside

    def _hand_out(self, count: int, state: State, refs: int) -> list[int] | None:
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        blocks = [self._free.popitem()[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = refs
            self._move(block, state)
        return blocks

    def _evict(self) -> None:
        block = next(iter(self._cached))
        del self._cached[block]
        self._unpublish(block)
        self._free_block(block)

    def _unpublish(self, block: int) -> None:
        block_hash, self._hash[block] = self._hash[block], None
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._changed[block_hash] = None

    def _free_block(self, block: int) -> None:
        self._free[block] = None
        self._move(block, State.FREE)

    def _move(self, block: int, state: State) -> None:
        self._count[self._state[block]] -= 1
        self._count[state] += 1
        self._state[block] = state

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and all indexes agree. O(blocks)."""
        for state in State:
            actual = sum(1 for s in self._state if s is state)
            assert actual == self._count[state], f"{state.value}: counted {self._count[state]}, found {actual}"
        assert sum(self._count.values()) == self.num_blocks
        assert all(self._state[block] is State.FREE for block in self._free)
        assert len(self._free) == self._count[State.FREE] and len(self._cached) == self._count[State.CACHED]
        for block, state in enumerate(self._state):
            assert (self._refs[block] > 0) == (state is State.OWNED), (
                f"block {block}: {state}, refs {self._refs[block]}"
            )
            assert state is not State.CACHED or self._hash[block] is not None
        assert all(self._hash[block] == block_hash for block_hash, block in self._by_hash.items())
        assert len(self._by_hash) == sum(1 for h in self._hash if h is not None)
