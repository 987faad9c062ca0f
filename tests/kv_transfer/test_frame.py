"""What a header and its payload must agree on, and the digests of pieces and blocks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import pytest
import torch
import xxhash

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.frame import (
    MAX_FRAME_BYTES,
    BlockDigests,
    check_frame,
    check_payload,
    piece_digests,
    rows_per_frame,
)
from tandem.kv_transfer.payload import Payload

LAYOUT = KVLayout("test", "bfloat16", 16, 32, 8, 128)  # 2 MiB a block
LIMIT = MAX_FRAME_BYTES // LAYOUT.block_bytes
ID = bytes(range(16))


def make_frame(num_blocks: int, **changes) -> Frame:
    size = num_blocks * LAYOUT.block_bytes
    return dataclasses.replace(Frame(ID, 1, 0, num_blocks, 0, 32, size, (bytes(16),) * num_blocks), **changes)


def test_the_digest_is_xxh3_128_of_each_row_seeded_with_the_transfer():
    """Against the published value of the empty input, against SHA-256 on which rows are equal, and another binding."""
    empty = Payload.whole(torch.empty(1, 0, dtype=torch.uint8))
    assert piece_digests(empty, bytes(16)) == (bytes.fromhex("99aa06d3014798d86001c324468d497f"),)
    rows = torch.randint(0, 2, (64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    reference = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
    digests = piece_digests(Payload.whole(rows), ID)
    assert [digests.index(d) for d in digests] == [reference.index(r) for r in reference]
    seeded = xxhash.xxh3_128(seed=0x0001020304050607)
    seeded.update(rows[5].numpy().tobytes())
    assert digests[5] == seeded.digest()
    assert piece_digests(Payload.whole(rows), bytes(16))[5] != digests[5]


def test_the_digest_reads_the_named_bytes_of_the_named_rows_in_place():
    memory = torch.zeros(4, 8, dtype=torch.uint8)
    payload = Payload.layers(memory, [3, 1], 2, 4)
    before = piece_digests(payload, ID)
    memory[1, 1] = memory[1, 6] = memory[2, 3] = 1  # around it
    assert piece_digests(payload, ID) == before
    memory[1, 5] = 1
    after = piece_digests(payload, ID)
    assert after[0] == before[0] and after[1] != before[1]


def test_one_header_makes_a_receiver_allocate_8_mib_at_most():
    assert MAX_FRAME_BYTES == 8 << 20
    check_frame(make_frame(LIMIT), LAYOUT)
    with pytest.raises(TransferFailed, match=f"carries 1 to {LIMIT}"):
        check_frame(make_frame(LIMIT + 1), LAYOUT)
    assert rows_per_frame(3 * MAX_FRAME_BYTES) == 1  # a block larger than the limit goes alone
    layer = make_frame(LIMIT * 32, num_layers=1, num_bytes=LIMIT * LAYOUT.block_bytes, first_layer=31)
    check_frame(layer, LAYOUT)  # as many rows of a single layer as fit


@pytest.mark.parametrize(
    "changes",
    [
        {"first_layer": 1},
        {"first_layer": 32, "num_layers": 1, "num_bytes": 2 * LAYOUT.layer_bytes},
        {"num_layers": 0},
        {"num_layers": 0, "num_bytes": 0},
        {"num_layers": 33},
        {"num_layers": 1},
        {"num_blocks": 0},
        {"num_blocks": 1 << 40},
        {"num_bytes": 1 << 50},
        {"num_bytes": 2 * LAYOUT.block_bytes - 1},
        {"digests": ()},
        {"digests": (bytes(16), bytes(15))},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_layout_is_refused(changes):
    check_frame(make_frame(2), LAYOUT)
    with pytest.raises(TransferFailed, match="frame of blocks"):
        check_frame(dataclasses.replace(make_frame(2), **changes), LAYOUT)


@pytest.mark.parametrize("shape", [(2, 8), (3, 7), (3, 9), (1, 24), (24, 1)])
def test_a_payload_of_another_size_is_refused(shape):
    good = Payload.whole(torch.arange(24, dtype=torch.uint8).reshape(3, 8))
    frame = make_frame(3, num_bytes=24, digests=piece_digests(good, ID))
    check_payload(frame, good)
    with pytest.raises(TransferFailed, match=r"payload of \d+ blocks"):
        check_payload(frame, Payload.whole(torch.zeros(shape, dtype=torch.uint8)))


def piece(block: int, first: int, count: int, digest: bytes) -> Frame:
    return make_frame(1, first_block=block, first_layer=first, num_layers=count, digests=(digest,))


def test_the_digest_of_a_block_is_that_of_its_only_piece_or_of_its_pieces_in_order():
    digests = BlockDigests(32)
    digests.add(make_frame(2, first_block=4, digests=(b"a" * 16, b"b" * 16)))
    assert digests.in_order() == (b"a" * 16, b"b" * 16)
    parts = [piece(7, 0, 4, b"x" * 16), piece(7, 4, 20, b"y" * 16), piece(7, 24, 8, b"z" * 16)]
    expected = xxhash.xxh3_128_digest(b"x" * 16 + b"y" * 16 + b"z" * 16)
    for order in itertools.permutations(parts):
        digests = BlockDigests(32)
        for number, frame in enumerate(order):
            assert digests.complete(7) is False and len(digests.in_order()) == (number > 0)
            digests.add(frame)
        assert digests.complete(7) and digests.of(7) == expected


@pytest.mark.parametrize(("first", "count"), [(10, 10), (0, 11), (19, 13), (12, 2), (0, 32)])
def test_pieces_of_a_block_never_overlap(first, count):
    digests = BlockDigests(32)
    digests.add(piece(7, 10, 10, b"x" * 16))
    with pytest.raises(TransferFailed, match="repeats"):
        digests.add(make_frame(2, first_block=6, first_layer=first, num_layers=count))
    assert digests.in_order() == (b"x" * 16,)  # nothing of block 6 either
    digests.add(make_frame(2, first_block=6, first_layer=20, num_layers=12))
