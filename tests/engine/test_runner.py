"""Packing a batch into one tensor, and what it becomes on the device; the paged cache's shape and bytes."""

from __future__ import annotations

import pytest
import torch

from tandem.common.kv_layout import KVLayout
from tandem.engine.batch import Batch
from tandem.engine.kv_cache import PagedKVCache, local_layout
from tandem.engine.runner import pack, unpack

CPU = torch.device("cpu")
LAYOUT = KVLayout("revision", "bfloat16", block_size=4, layers=3, kv_heads=2, head_dim=6)
BATCH = Batch(
    token_ids=[10, 11, 12, 13, 14, 20, 30, 31],
    positions=[2, 3, 4, 5, 6, 8, 0, 1],
    query_start=[0, 5, 6, 8],
    context_lens=[7, 9, 2],
    block_tables=[[7, 3, 99], [5, 0, 8], [1]],  # the first has a block more than it needs
    sample_rows=[4, 5],
)


def test_a_batch_survives_packing() -> None:
    inputs = unpack(pack(BATCH, block_size=4), CPU)
    meta = inputs.meta
    assert inputs.token_ids.tolist() == BATCH.token_ids
    assert inputs.positions.tolist() == BATCH.positions
    assert inputs.rows.tolist() == BATCH.sample_rows
    assert meta.query_start.tolist() == BATCH.query_start
    assert meta.context_lens.tolist() == meta.context_lens_host == BATCH.context_lens
    assert meta.query_lens == [5, 1, 2]
    assert meta.block_tables.tolist() == [[7, 3, 0], [5, 0, 8], [1, 0, 0]]
    assert meta.slot_blocks.tolist() == [7, 7, 3, 3, 3, 8, 1, 1]
    assert meta.slot_offsets.tolist() == [2, 3, 0, 1, 2, 0, 0, 1]


def test_dtypes_are_those_of_the_contract() -> None:
    inputs = unpack(pack(BATCH, block_size=4), CPU)
    meta = inputs.meta
    assert {meta.query_start.dtype, meta.context_lens.dtype, meta.block_tables.dtype} == {torch.int32}
    assert {meta.slot_blocks.dtype, meta.slot_offsets.dtype, inputs.token_ids.dtype} == {torch.int64}


def test_a_batch_without_samples() -> None:
    batch = Batch([1, 2], [0, 1], [0, 2], [2], [[4]], [])
    assert unpack(pack(batch, 16), CPU).rows.shape == (0,)


def test_missing_blocks_are_a_bug_that_shows() -> None:
    with pytest.raises(AssertionError, match="1 blocks allocated, 2 needed"):
        pack(Batch([1], [4], [0, 1], [5], [[4]], [0]), 4)


class TestCache:
    def test_shape(self) -> None:
        cache = PagedKVCache(LAYOUT, 5, CPU, rank=1, world=2)
        assert cache.tensor.shape == (5, 3, 2, 1, 4, 6) and cache.tensor.dtype == torch.bfloat16
        assert cache.layers[2].shape == (5, 2, 1, 4, 6)
        assert not cache.tensor.any()
        assert local_layout(LAYOUT, 2).block_bytes * 2 == LAYOUT.block_bytes

    def test_layers_are_views(self) -> None:
        cache = PagedKVCache(LAYOUT, 5, CPU)
        cache.layers[1][3, 1, 0, 2] = 7.0
        assert (cache.tensor[3, 1, 1, 0, 2] == 7.0).all() and cache.tensor.count_nonzero() == 6

    def test_a_block_is_its_bytes(self) -> None:
        cache = PagedKVCache(LAYOUT, 5, CPU)
        values = torch.randn(2, *LAYOUT.block_shape).bfloat16()
        cache.tensor[[4, 1]] = values
        read = cache.read([4, 1])
        assert read.shape == (2, LAYOUT.block_bytes)
        assert torch.equal(read.view(torch.bfloat16).view(values.shape), values)
        other = PagedKVCache(LAYOUT, 5, CPU)
        other.write([0, 2], read)
        assert torch.equal(other.tensor[[0, 2]], values) and not other.tensor[[1, 3, 4]].any()

    def test_a_read_is_a_copy(self) -> None:
        cache = PagedKVCache(LAYOUT, 2, CPU)
        read = cache.read([0])
        cache.tensor.fill_(1.0)
        assert not read.any()

    def test_unaligned_payloads_can_be_written(self) -> None:
        cache = PagedKVCache(LAYOUT, 2, CPU)
        received = torch.arange(LAYOUT.block_bytes + 1).to(torch.uint8)
        cache.write([1], received[1:].view(1, -1))
        assert torch.equal(cache.read([1])[0], received[1:])

    def test_nothing_may_be_moved(self) -> None:
        cache = PagedKVCache(LAYOUT, 2, CPU)
        assert cache.read([]).shape == (0, LAYOUT.block_bytes)
        cache.write([], cache.read([]))

    def test_copy(self) -> None:
        cache = PagedKVCache(LAYOUT, 3, CPU)
        cache.tensor[2] = 3.0
        cache.copy(2, 0)
        assert (cache.tensor[0] == 3.0).all() and not cache.tensor[1].any()
