"""What a frame's header and its payload must agree on, and the digest of a block's bytes.

payload: (num_blocks, layout.block_bytes) uint8      one row per block, one digest per row
"""

from __future__ import annotations

import xxhash
from torch import Tensor

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout

MAX_FRAME_BYTES = 64 << 20  # bounds what one header can make a receiver allocate
DIGEST_BYTES = 16


def blocks_per_frame(layout: KVLayout) -> int:
    """The most blocks one frame carries: MAX_FRAME_BYTES of them, but at least one."""
    return max(1, MAX_FRAME_BYTES // layout.block_bytes)


def block_digests(payload: Tensor) -> tuple[bytes, ...]:
    """XXH3-128 (16 bytes, canonical big-endian) of each row of `payload`, (num_blocks, bytes) uint8, contiguous.

    CPU memory is hashed in place. The digest guards against bugs and broken transports, not against forgery; a
    tensor on a device is copied to the host first, so the copy is what it describes.
    """
    rows = payload.cpu().numpy()
    return tuple(xxhash.xxh3_128_digest(memoryview(row)) for row in rows)


def check_frame(frame: Frame, layout: KVLayout) -> None:
    """Raises TransferFailed unless the header alone is consistent with the layout (rule H1); nothing is allocated."""
    name = f"frame of blocks [{frame.first_block}, {frame.first_block + frame.num_blocks})"
    if not 1 <= frame.num_blocks <= blocks_per_frame(layout):
        raise TransferFailed(f"{name}: a frame carries 1 to {blocks_per_frame(layout)} blocks")
    if (frame.first_layer, frame.num_layers) != (0, layout.layers):
        stop = frame.first_layer + frame.num_layers
        raise TransferFailed(f"{name}: layers [{frame.first_layer}, {stop}) are not the block's [0, {layout.layers})")
    if frame.num_bytes != frame.num_blocks * layout.block_bytes:
        raise TransferFailed(f"{name}: {frame.num_bytes} bytes; a block has {layout.block_bytes}")
    if len(frame.digests) != frame.num_blocks or any(len(digest) != DIGEST_BYTES for digest in frame.digests):
        raise TransferFailed(f"{name}: needs one digest of {DIGEST_BYTES} bytes per block")


def check_payload(frame: Frame, payload: Tensor) -> None:
    """Raises TransferFailed unless the payload's size and digests are the header's (rule H4)."""
    if payload.dim() != 2 or payload.shape[0] != frame.num_blocks or payload.nbytes != frame.num_bytes:
        raise TransferFailed(
            f"payload of shape {tuple(payload.shape)} for a frame of {frame.num_blocks} blocks, {frame.num_bytes} bytes"
        )
    digests = block_digests(payload)
    wrong = [index for index in range(frame.num_blocks) if digests[index] != frame.digests[index]]
    if wrong:
        raise TransferFailed(
            f"digest mismatch in {len(wrong)} of {frame.num_blocks} blocks, first block {frame.first_block + wrong[0]}"
        )
