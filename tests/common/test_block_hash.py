"""The chained block hash against the formula of its docstring, computed another way, and against fixed values."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from tandem.common.block_hash import block_hashes, chain_root, next_hash

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def formula(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(struct.pack("<I", len(part)) + part for part in parts)).digest()


@given(IDS, st.integers(1, 17), st.binary(max_size=20), st.binary(max_size=40))
def test_by_formula(ids: list[int], size: int, salt: bytes, fingerprint: bytes) -> None:
    parent = formula(b"tandem.block.v1", salt, fingerprint)
    expected: list[bytes] = []
    for block in range(len(ids) // size):
        tokens = struct.pack(f"<{size}I", *ids[block * size : (block + 1) * size])
        parent = formula(b"tandem.block.v1", parent, tokens)
        expected.append(parent)
    assert block_hashes(ids, size, chain_root(salt, fingerprint)) == expected


def test_golden_values() -> None:
    """Computed once with struct and hashlib alone: another release must not name the same blocks differently."""
    root = chain_root(b"tenant-a", bytes(range(32)))
    assert root.hex() == "584c153320641b7393e820c1652d238de15471f0b27e5b2fd988fbb95491ce9e"
    assert [value.hex() for value in block_hashes(list(range(100, 133)), 16, root)] == [
        "852b674aa3884b00e4e55724bca9dfa155cb03bb36b12d108121d33997943afc",
        "42f5d3d66cf7cec9794ded7cad9c3d032872a43b7c5e02096a496b50cc6c63a5",
    ]


@given(IDS, IDS, st.integers(1, 8))
def test_a_shared_prefix_and_nothing_else_shares_hashes(a: list[int], b: list[int], size: int) -> None:
    root = chain_root(b"", b"")
    pairs = list(zip(block_hashes(a, size, root), block_hashes(b, size, root), strict=False))
    for index, (left, right) in enumerate(pairs):
        assert (left == right) == (a[: (index + 1) * size] == b[: (index + 1) * size])


def test_tenants_layouts_and_field_borders_are_told_apart() -> None:
    roots = [chain_root(b"a", b"bc"), chain_root(b"ab", b"c"), chain_root(b"", b"abc"), chain_root(b"abc", b"")]
    assert len(set(roots)) == 4
    assert len({next_hash(root, [1, 2]) for root in roots}) == 4
