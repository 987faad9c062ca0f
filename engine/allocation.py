"""How a sequence gets its blocks; shared by both schedulers.

    blocks   [ cached …… | fresh …………………… ]      cover all of token_ids
    computed ───────────►                          the cached prefix need not be computed

At least the last token is always computed, because its logits are wanted: a fully cached prompt gives up its last
cached block.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def allocate(pool: BlockPool, sequence: Sequence, fingerprint: bytes, spare: int = 0) -> bool:
    """Blocks for all of `token_ids`, leaving `spare` available. False, and no change, when there is no room."""
    size = pool.block_size
    hashes = sequence.block_hashes(size, fingerprint)
    cached = pool.match(hashes[: (len(sequence.token_ids) - 1) // size])
    needed = blocks_for(len(sequence.token_ids), size) - len(cached)
    pool.take(cached)  # before allocating, which could evict them
    fresh = pool.allocate(needed) if needed + spare <= pool.available else None
    if fresh is None:
        pool.release(cached)
        return False
    sequence.blocks = cached + fresh
    sequence.computed = len(cached) * size
    return True


def is_coming(pool: BlockPool, sequence: Sequence, running: Iterable[Sequence], fingerprint: bytes) -> bool:
    """Whether one of `running` is about to compute the very block that `sequence` lacks next.

    Of prompts that arrive together and begin alike, the first one computes the beginning; the others are better off
    waiting for it than computing it beside. (Hashes are chained, so equal ones stand at equal places.)
    """
    size = pool.block_size
    if not pool.caching:
        return False
    wanted = sequence.block_hashes(size, fingerprint)[: (len(sequence.token_ids) - 1) // size]
    at = len(pool.match(wanted))
    return at < len(wanted) and any(
        other.computed < other.prompt_len and wanted[at] in other.block_hashes(size, fingerprint)[at : at + 1]
        for other in running
    )


def publish(pool: BlockPool, sequence: Sequence, fingerprint: bytes, since: int = 0) -> None:
    """Make the blocks that are full and computed findable; those before token `since` already are."""
    hashes = sequence.block_hashes(pool.block_size, fingerprint)
    for index in range(since // pool.block_size, sequence.computed // pool.block_size):
        pool.publish(sequence.blocks[index], hashes[index])
