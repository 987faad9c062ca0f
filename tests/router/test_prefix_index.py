"""The prefix index against a model so simple that it is obviously right: one set of blocks per worker."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tandem.common.block_hash import BlockHash
from tandem.router.prefix_index import PrefixIndex

WORKERS = st.sampled_from(["p0", "p1", "d0", "d1", "d2"])


def block(number: int) -> BlockHash:
    return BlockHash(hashlib.sha256(bytes([number])).digest())


BLOCKS = st.lists(st.integers(0, 7), max_size=6)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), WORKERS, BLOCKS),
        st.tuples(st.just("remove"), WORKERS, BLOCKS),
        st.tuples(st.just("forget"), WORKERS, st.just([])),
    ),
    max_size=40,
)


def matches(held: dict[str, set[int]], chain: list[int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for worker, blocks in held.items():
        count = next((depth for depth, number in enumerate(chain) if number not in blocks), len(chain))
        if count:
            found[worker] = count
    return found


@given(OPERATIONS, BLOCKS)
def test_agrees_with_the_model(operations: list[tuple[str, str, list[int]]], chain: list[int]) -> None:
    index, held = PrefixIndex(), dict[str, set[int]]()
    for kind, worker, numbers in operations:
        hashes = [block(number) for number in numbers]
        if kind == "store":
            index.store(worker, hashes)
            held.setdefault(worker, set()).update(numbers)
        elif kind == "remove":
            index.remove(worker, hashes)
            held.setdefault(worker, set()).difference_update(numbers)
        else:
            index.forget(worker)
            held.pop(worker, None)
        assert index.match([block(number) for number in chain]) == matches(held, chain)
        assert len(index) == len(set().union(*held.values()))


def test_a_gap_ends_the_match() -> None:
    index = PrefixIndex()
    index.store("a", [block(0), block(2)])
    assert index.match([block(0), block(1), block(2)]) == {"a": 1}
    assert index.match([block(1), block(2)]) == {}


def test_nothing_of_a_forgotten_worker_is_left() -> None:
    index = PrefixIndex()
    for generation in range(100):
        index.store(f"worker-{generation}", [block(number) for number in range(8)])
        index.forget(f"worker-{generation}")
    assert len(index) == 0
    index.store("next", [block(1)])
    assert index.match([block(1)]) == {"next": 1}
