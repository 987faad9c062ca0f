"""BlockPool against a plain model of sets, under every interleaving hypothesis can find."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.common.block_hash import BlockHash, block_hashes, chain_root
from tandem.engine.block_pool import BlockPool

BLOCKS = 8


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


class PoolMachine(RuleBasedStateMachine):
    """The model: who holds references on what, which content is findable, in which order it was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, block_size=4)
        self.held: list[list[int]] = []  # one reference each
        self.reservations: list[list[int]] = []
        self.quarantined: list[int] = []
        self.names: dict[int, BlockHash] = {}  # what the model published where
        self.mirror: set[BlockHash] = set()  # a watcher that only follows events
        self.next_name = 0

    def owned(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    def unavailable(self) -> int:
        return len(self.owned()) + sum(map(len, self.reservations)) + len(self.quarantined)

    @rule(count=st.integers(0, BLOCKS + 1))
    def allocate(self, count: int) -> None:
        before = self.owned()
        blocks = self.pool.allocate(count)
        if count > BLOCKS - self.unavailable():
            assert blocks is None
            return
        assert blocks is not None and len(set(blocks)) == count and not set(blocks) & before
        for block in blocks:
            self.names.pop(block, None)  # evicted
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        for block in blocks:
            if block not in self.names:
                self.names[block] = name(self.next_name)
                self.pool.publish(block, name(self.next_name))
                self.next_name += 1

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def find_and_take(self, data: st.DataObject) -> None:
        block, block_hash = data.draw(st.sampled_from(sorted(self.names.items())))
        assert self.pool.match([block_hash, name(10**6)]) == [block]
        self.pool.take([block])
        self.held.append([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.forget(blocks)
        for block in blocks:
            self.names.pop(block, None)

    @rule(count=st.integers(1, 3))
    def reserve(self, count: int) -> None:
        blocks = self.pool.reserve(count)
        assert (blocks is None) == (count > BLOCKS - self.unavailable())
        if blocks is not None:
            for block in blocks:
                self.names.pop(block, None)
            self.reservations.append(blocks)

    @precondition(lambda self: self.reservations)
    @rule(how=st.sampled_from(["adopt", "unreserve", "quarantine"]))
    def settle(self, how: str) -> None:
        blocks = self.reservations.pop()
        getattr(self.pool, how)(blocks)
        if how == "adopt":
            self.held.append(blocks)
        elif how == "quarantine":
            self.quarantined += blocks

    @precondition(lambda self: self.quarantined)
    @rule()
    def release_quarantine(self) -> None:
        self.pool.unreserve(self.quarantined)
        self.quarantined = []

    @rule()
    def follow_events(self) -> None:
        events = self.pool.drain_events()
        assert not set(events.stored) & set(events.removed)
        self.mirror |= set(events.stored)
        self.mirror -= set(events.removed)
        assert self.mirror == set(self.pool.hashes()) == set(self.names.values())

    @invariant()
    def conserved(self) -> None:
        self.pool.check_integrity()
        counts = self.pool.counts()
        assert counts.owned == len(self.owned())
        assert counts.reserved == sum(map(len, self.reservations))
        assert counts.quarantined == len(self.quarantined)
        assert counts.cached == len(set(self.names) - self.owned())
        assert self.pool.available == BLOCKS - self.unavailable()
        assert len(self.pool.free_among(range(BLOCKS))) == counts.free
        assert not set(self.pool.free_among(range(BLOCKS))) & (self.owned() | set(self.names))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_eviction_takes_the_tail_before_the_shared_prefix() -> None:
    pool = BlockPool(3, block_size=4)
    blocks = pool.allocate(3)
    assert blocks is not None
    for index, block in enumerate(blocks):
        pool.publish(block, name(index))
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([name(0), name(1), name(2)]) == blocks[:2]


def test_equal_content_is_found_once() -> None:
    pool = BlockPool(2, block_size=4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], name(1))
    pool.publish(blocks[1], name(1))
    pool.release(blocks)
    assert pool.match([name(1)]) == [blocks[0]]
    assert pool.counts().free == 1 and pool.counts().cached == 1


def test_double_release_is_our_own_bug() -> None:
    pool = BlockPool(1, block_size=4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_prefix_caching_off_finds_nothing() -> None:
    pool = BlockPool(1, block_size=4, enable_prefix_caching=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], name(1))
    assert pool.match([name(1)]) == []


def test_hash_chain_separates_salt_layout_and_history() -> None:
    tokens = list(range(8))
    chains = [
        tuple(block_hashes(tokens, 4, chain_root(salt, fingerprint)))
        for salt in (b"", b"tenant") for fingerprint in (b"a", b"b")
    ]  # fmt: skip
    assert len(set(chains)) == 4
    assert block_hashes(tokens[:7], 4, chain_root(b"", b"a")) == list(chains[0][:1])
    assert block_hashes([9, *tokens[1:]], 4, chain_root(b"", b"a"))[1] != chains[0][1]
