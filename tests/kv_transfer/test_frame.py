from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.frame import MAX_FRAME_BYTES, block_digests, blocks_per_frame, check_frame, check_payload

LAYOUT = KVLayout("test", "bfloat16", 16, 32, 8, 128)  # 2 MiB a block
LIMIT = MAX_FRAME_BYTES // LAYOUT.block_bytes


def make_frame(num_blocks: int) -> Frame:
    return Frame(bytes(16), 1, 0, num_blocks, 0, 32, num_blocks * LAYOUT.block_bytes, (bytes(16),) * num_blocks)


def test_the_digest_is_xxh3_128_of_each_row():
    """Against the published value of the empty input, and against SHA-256 on which rows are equal."""
    assert block_digests(torch.empty(1, 0, dtype=torch.uint8)) == (bytes.fromhex("99aa06d3014798d86001c324468d497f"),)
    rows = torch.randint(0, 2, (64, 3), dtype=torch.uint8)
    reference = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
    digests = block_digests(rows)
    assert [digests.index(d) for d in digests] == [reference.index(r) for r in reference]
    assert all(len(digest) == 16 for digest in digests)


def test_the_digest_reads_memory_in_place():
    rows = torch.zeros(2, 8, dtype=torch.uint8)
    before = block_digests(rows)
    rows[1, 3] = 1
    after = block_digests(rows)
    assert after[0] == before[0] and after[1] != before[1]


def test_one_header_makes_a_receiver_allocate_64_mib_at_most():
    check_frame(make_frame(LIMIT), LAYOUT)
    with pytest.raises(TransferFailed, match="1 to 32 blocks"):
        check_frame(make_frame(LIMIT + 1), LAYOUT)
    huge = dataclasses.replace(LAYOUT, layers=32 * 2 * LIMIT)
    assert blocks_per_frame(huge) == 1  # a block larger than the limit goes alone


@pytest.mark.parametrize("shape", [(2, 8), (3, 7), (3, 9), (24,), (3, 8, 1)])
def test_a_payload_of_another_size_is_refused(shape):
    good = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    frame = dataclasses.replace(make_frame(3), num_bytes=24, digests=block_digests(good))
    check_payload(frame, good)
    with pytest.raises(TransferFailed, match="payload of shape"):
        check_payload(frame, torch.zeros(shape, dtype=torch.uint8))
