"""Which worker holds which KV blocks, as told by the workers' Watch streams.

    _holders   block hash → bit mask of workers     one look-up per block, whatever the number of workers
    _blocks    worker → its block hashes            so that a worker is forgotten in O(its blocks)

Invariant: bit b of _holders[h] is set if and only if h is in _blocks of the worker that owns bit b; no mask is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem.common.block_hash import BlockHash


class PrefixIndex:
    """A worker is named by its incarnation: what a dead process held is never taken for its successor's."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._blocks: dict[str, set[BlockHash]] = {}
        self._bits: dict[str, int] = {}  # worker → its bit, a power of two

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._holders)

    def store(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        bit, blocks = self._bit(worker), self._blocks.setdefault(worker, set())
        for block in hashes:
            self._holders[block] = self._holders.get(block, 0) | bit
            blocks.add(block)

    def remove(self, worker: str, hashes: Iterable[BlockHash]) -> None:
        blocks = self._blocks.get(worker, set())
        for block in hashes:
            if block in blocks:
                blocks.discard(block)
                self._clear(block, self._bits[worker])

    def forget(self, worker: str) -> None:
        bit = self._bits.pop(worker, 0)
        for block in self._blocks.pop(worker, set()):
            self._clear(block, bit)

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """worker → how many leading blocks of `hashes` it holds without a gap; workers with none are left out."""
        found: dict[str, int] = {}
        alive = -1  # the workers that hold every block so far
        for depth, block in enumerate(hashes):
            holders = alive & self._holders.get(block, 0)
            if holders != alive and depth:
                found.update(dict.fromkeys(self._workers(alive & ~holders), depth))
            alive = holders
            if not alive:
                return found
        found.update(dict.fromkeys(self._workers(alive), len(hashes)) if hashes else {})
        return found

    def _workers(self, mask: int) -> list[str]:
        return [worker for worker, bit in self._bits.items() if mask & bit]

    def _bit(self, worker: str) -> int:
        if worker not in self._bits:
            used = sum(self._bits.values())
            self._bits[worker] = ~used & (used + 1)  # the lowest bit not in use
        return self._bits[worker]

    def _clear(self, block: BlockHash, bit: int) -> None:
        rest = self._holders[block] & ~bit
        if rest:
            self._holders[block] = rest
        else:
            del self._holders[block]
