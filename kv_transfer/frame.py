"""What a frame's header and its payload must agree on, and the digests of blocks.

piece    a layer group of a block: one digest over its bytes
block    the digest of its only piece, or the digest of its pieces' digests in the order of layers
"""

from __future__ import annotations

from typing import Any, cast

import xxhash

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.payload import Payload

MAX_FRAME_BYTES = 8 << 20  # bounds what one header makes a receiver allocate, and how long a write is under way
DIGEST_BYTES = 16


def rows_per_frame(row_bytes: int) -> int:
    """The most blocks one frame carries: MAX_FRAME_BYTES of them, but at least one."""
    return max(1, MAX_FRAME_BYTES // row_bytes)


def piece_digests(payload: Payload, transfer_id: bytes) -> tuple[bytes, ...]:
    """XXH3-128 (16 bytes, canonical big-endian) of each row, seeded with the transfer id.

    CPU memory is hashed in place. The digest guards against bugs, torn writes and broken transports. The seed makes
    one transfer's bytes useless for another; it travels encrypted, so what lies on the data path does not tell it.
    A payload on a device is copied to the host first, so the copy is what it describes.
    """
    seed = int.from_bytes(transfer_id[:8], "big")
    if payload.memory.device.type != "cpu":
        payload = Payload.whole(payload.tensor().cpu())
    memory = payload.memory.numpy()  # its views cost a tenth of a tensor's, which shows when blocks are small
    rows = (cast(Any, memory[row, payload.start : payload.stop]) for row in payload.rows)  # the stub hides the buffer
    return tuple(xxhash.xxh3_128_digest(row, seed=seed) for row in rows)


class BlockDigests:
    """The digests of one transfer's pieces, by block. Invariant: the pieces of a block never overlap."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._pieces: dict[int, list[tuple[int, int, bytes]]] = {}  # block → (first layer, layers, digest)
        self._landed: dict[int, int] = {}  # block → layers

    def add(self, frame: Frame) -> None:
        """Raises TransferFailed, and then changes nothing, when a piece was there before."""
        blocks = range(frame.first_block, frame.first_block + frame.num_blocks)
        for block in blocks:
            for first, count, _ in self._pieces.get(block, ()):
                if first < frame.first_layer + frame.num_layers and frame.first_layer < first + count:
                    raise TransferFailed(f"frame at block {frame.first_block} repeats layers of block {block}")
        for block, digest in zip(blocks, frame.digests, strict=True):
            self._pieces.setdefault(block, []).append((frame.first_layer, frame.num_layers, digest))
            self._landed[block] = self._landed.get(block, 0) + frame.num_layers

    def complete(self, block: int) -> bool:
        return self._landed.get(block, 0) == self._layers

    def in_order(self) -> tuple[bytes, ...]:
        return tuple(map(self.of, sorted(self._pieces)))

    def of(self, block: int) -> bytes:
        """The digest of a block, as far as its pieces are there."""
        digests = [digest for _, _, digest in sorted(self._pieces.get(block, ()))]
        return digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))


def check_frame(frame: Frame, layout: KVLayout) -> None:
    """Raises TransferFailed unless the header alone is consistent with the layout (rule H1); nothing is allocated."""
    name = f"frame of blocks [{frame.first_block}, {frame.first_block + frame.num_blocks})"
    stop = frame.first_layer + frame.num_layers
    if not (1 <= frame.num_layers <= layout.layers and stop <= layout.layers):
        raise TransferFailed(f"{name}: layers [{frame.first_layer}, {stop}) are not of a block's [0, {layout.layers})")
    row_bytes = frame.num_layers * layout.layer_bytes
    if not 1 <= frame.num_blocks <= rows_per_frame(row_bytes):
        raise TransferFailed(f"{name}: a frame of such blocks carries 1 to {rows_per_frame(row_bytes)}")
    if frame.num_bytes != frame.num_blocks * row_bytes:
        raise TransferFailed(f"{name}: {frame.num_bytes} bytes; a block has {row_bytes} in these layers")
    if len(frame.digests) != frame.num_blocks or any(len(digest) != DIGEST_BYTES for digest in frame.digests):
        raise TransferFailed(f"{name}: needs one digest of {DIGEST_BYTES} bytes per block")


def check_payload(frame: Frame, payload: Payload) -> None:
    """Raises TransferFailed unless the payload's size and digests are the header's (rule H4)."""
    if len(payload) != frame.num_blocks or payload.nbytes != frame.num_bytes:
        raise TransferFailed(
            f"payload of {len(payload)} blocks, {payload.nbytes} bytes for a frame of {frame.num_blocks} blocks, "
            f"{frame.num_bytes} bytes"
        )
    digests = piece_digests(payload, frame.transfer_id)
    wrong = [index for index in range(frame.num_blocks) if digests[index] != frame.digests[index]]
    if wrong:
        raise TransferFailed(
            f"digest mismatch in {len(wrong)} of {frame.num_blocks} blocks, first block {frame.first_block + wrong[0]}"
        )
