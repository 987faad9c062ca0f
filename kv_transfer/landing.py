"""D's account of one transfer: which blocks it granted, which have landed, and whether the whole may be decoded.

    prompt block   0 … first_block-1 | first_block … first_block+num_blocks-1
                   D's prefix cache  | granted: each lands exactly once, in local_blocks[block - first_block]

Invariant: a layer of a block leaves `accept` at most once, and only for a frame of this transfer and generation;
`verify` passes only when every granted block has landed and P and D agree on every token block and every byte (rules
H1, H2, H4).
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame, Grant, Manifest
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.frame import BlockDigests, check_frame


class Landing:
    """State only: no thread, no I/O. `local_blocks[i]` is D's block for prompt block `grant.first_block + i`."""

    def __init__(
        self, grant: Grant, local_blocks: Sequence[int], num_tokens: int, hashes: Sequence[bytes], layout: KVLayout
    ) -> None:
        """`hashes`: the block hashes of all full prompt blocks, computed by D from the tokens the router sent."""
        assert len(local_blocks) == grant.num_blocks
        assert len(hashes) == num_tokens // layout.block_size
        self._grant = grant
        self._local = tuple(local_blocks)
        self._num_tokens = num_tokens
        self._hashes = tuple(hashes)
        self._layout = layout
        self._digests = BlockDigests(layout.layers)  # of what landed

    def accept(self, frame: Frame) -> list[int]:
        """D's blocks to write the frame's payload into, in order. Raises TransferFailed, and then changes nothing.

        The caller has compared the payload with the header's digests (LandLink does).
        """
        self._check_current(frame.transfer_id, frame.generation)
        check_frame(frame, self._layout)
        start = frame.first_block - self._grant.first_block
        stop = start + frame.num_blocks
        if start < 0 or stop > self._grant.num_blocks:
            raise TransferFailed(
                f"frame of blocks [{frame.first_block}, {frame.first_block + frame.num_blocks}) is outside the granted "
                f"[{self._grant.first_block}, {self._grant.first_block + self._grant.num_blocks})"
            )
        self._digests.add(frame)
        return list(self._local[start:stop])

    def verify(self, manifest: Manifest) -> None:
        """Raises TransferFailed unless the manifest, D's own expectation and the landed blocks agree completely."""
        self._check_current(manifest.transfer_id, manifest.generation)
        if manifest.num_tokens != self._num_tokens:
            raise TransferFailed(f"manifest of {manifest.num_tokens} tokens; the prompt has {self._num_tokens}")
        if manifest.hashes != self._hashes:
            raise TransferFailed("the manifest's block hashes are not those of the prompt: P computed other tokens")
        granted = range(self._grant.first_block, self._grant.first_block + self._grant.num_blocks)
        missing = [block for block in granted if not self._digests.complete(block)]
        if missing:
            raise TransferFailed(f"{len(missing)} granted blocks never landed, the first is block {missing[0]}")
        if manifest.digests != tuple(map(self._digests.of, granted)):
            raise TransferFailed("the manifest's digests are not those of the landed blocks")

    def _check_current(self, transfer_id: bytes, generation: int) -> None:
        if (transfer_id, generation) != (self._grant.transfer_id, self._grant.generation):
            raise TransferFailed(
                f"transfer {transfer_id.hex()} generation {generation} is not the current "
                f"{self._grant.transfer_id.hex()} generation {self._grant.generation}"
            )
