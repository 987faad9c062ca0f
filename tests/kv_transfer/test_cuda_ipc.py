"""What can be told without a CUDA device: what is exported is read strictly, and copies go to the right place.

With one, the connector is in the shared suite, between two processes (marker gpu).
"""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
import torch

from tandem.common.errors import ConfigError, TransferFailed
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.cuda_ipc import Export, copy, domain
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload
from tests.kv_transfer.pairs import SMALL

EXPORT = Export(b"c" + bytes(64), 4096, 512, b"/torch_1_2_3", 17, bytes(64), True, 96, 4, 1000)


def test_an_export_is_read_as_it_was_written():
    assert Export.unpack(EXPORT.pack()) == EXPORT
    assert Export.unpack(dataclasses.replace(EXPORT, event_needed=False).pack()).event_needed is False


@pytest.mark.parametrize(
    "changes",
    [
        {"handle": "text"},
        {"size": -1},
        {"size": 4095},  # the last block would lie outside
        {"size": True},
        {"offset": -1},
        {"offset": 1.0},
        {"counter": "/torch_1_2_3"},
        {"counter": b"/somebody_else"},
        {"counter_offset": 10_000},
        {"event": bytes(63)},
        {"event_needed": 1},
        {"event_needed": None},
        {"start": 97},
        {"num_blocks": 0},
        {"num_blocks": 1 << 62},
        {"block_bytes": 0},
        {"block_bytes": -1000, "num_blocks": -4},
    ],
    ids=str,
)
def test_an_export_that_torch_would_believe_too_much_of_is_refused(changes):
    with pytest.raises(TransferFailed, match="cannot be read"):
        Export.unpack(dataclasses.replace(EXPORT, **changes).pack())


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_other_bytes_are_refused(cut):
    packed = EXPORT.pack()
    for data in (packed[:cut], packed + b"\x00", msgpack.packb([1] * 9), msgpack.packb([1] * 11), b"\xc1", b"\x01"):
        assert data is not None
        with pytest.raises(TransferFailed, match="cannot be read"):
            Export.unpack(data)


@pytest.mark.parametrize("rows", [[0], [3, 4, 5, 6], [6, 2, 3, 9], [5, 4, 3]])
@pytest.mark.parametrize("targets", [range(8), [4, 5, 9, 10], [9, 1, 2, 3]])
@pytest.mark.parametrize(("first", "size"), [(0, 12), (4, 8)])
def test_rows_are_copied_to_their_targets_and_nowhere_else(rows, targets, first, size):
    source = torch.randint(0, 256, (12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    target, blocks = torch.zeros(12, 20, dtype=torch.uint8), list(targets)[: len(rows)]
    payload = Payload.layers(source, rows, first, size)
    expected = target.clone()
    for row, block in zip(rows, blocks, strict=True):
        expected[block, 6 : 6 + size] = source[row, first : first + size]
    payload.check_place(blocks, 6, *target.shape)
    copy(target[:, 6 : 6 + size], payload, blocks)
    assert torch.equal(target, expected)


@pytest.mark.parametrize(("targets", "start"), [([0], 0), ([0, 12], 0), ([-1, 0], 0), ([0, 1], 9), ([0, 1, 2], 0)])
def test_what_has_no_place_at_the_other_end_is_refused(targets, start):
    memory = torch.zeros(12, 20, dtype=torch.uint8)
    with pytest.raises(TransferFailed, match="do not fit"):
        Payload.whole(torch.zeros(2, 12, dtype=torch.uint8)).check_place(targets, start, *memory.shape)


def test_it_says_what_it_needs():
    channel = channel_pair()[0]
    with pytest.raises(ConfigError, match="on cpu"):
        domain(Context(channel, SMALL, torch.device("cpu"), memory=torch.zeros(1)))
    with pytest.raises(ConfigError, match="in one piece"):
        domain(Context(channel, SMALL, torch.device("cuda:0")))
    assert domain(Context(channel, SMALL, torch.device("cuda:0"), memory=torch.zeros(1))).endswith("cuda")
    with pytest.raises(TransferFailed, match="exporting the KV cache by CUDA IPC failed"):
        Export.of(torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(TransferFailed, match="mapping D's KV cache by CUDA IPC failed"):
        EXPORT.map(torch.device("cpu"))
