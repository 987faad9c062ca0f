"""The name of a full KV block: SHA-256 chained over everything its content depends on.

    hash[i] = SHA-256(domain | salt | fingerprint | hash[i-1] | token ids of block i)

Every part is length-prefixed, so distinct inputs have distinct encodings. The router, P and D each compute the
chain from the token ids themselves and trust nobody else's.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence
from typing import NewType

BlockHash = NewType("BlockHash", bytes)  # 32 bytes

DOMAIN = b"tandem.block.v1"


def chain_root(salt: bytes, fingerprint: bytes) -> BlockHash:
    """The parent of a sequence's first block: tenant salt and KV layout fingerprint, never a token."""
    return BlockHash(_digest(DOMAIN, salt, fingerprint))


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of the block that holds `token_ids` behind `parent`."""
    return BlockHash(_digest(DOMAIN, parent, _encode(token_ids)))


def block_hashes(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """The hashes of all *full* blocks of `token_ids`, in order."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def _encode(token_ids: Sequence[int]) -> bytes:
    """Little-endian unsigned 32-bit integers."""
    packed = array.array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _digest(*parts: bytes) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(4, "little"))
        hasher.update(part)
    return hasher.digest()
