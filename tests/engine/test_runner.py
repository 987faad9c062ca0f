"""Packing a batch into one tensor, and what it becomes on the device; the paged cache's shape and bytes."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import KVLayout
from tandem.engine import kv_cache
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

    def test_layers_of_blocks(self) -> None:
        cache = PagedKVCache(LAYOUT, 4, CPU)
        payload = torch.arange(2 * 2 * LAYOUT.layer_bytes).to(torch.uint8).view(2, -1)
        cache.write([3, 1], payload, first_layer=1, num_layers=2)
        assert torch.equal(cache.read([3, 1])[:, LAYOUT.layer_bytes :], payload)
        assert not cache.tensor[:, 0].any() and not cache.tensor[[0, 2]].any()
        with pytest.raises(AssertionError):
            cache.write([0], payload[:1], first_layer=1, num_layers=1)

    def test_zero(self) -> None:
        cache = PagedKVCache(LAYOUT, 3, CPU)
        cache.tensor.fill_(float("nan"))
        cache.zero([2, 0])
        cache.zero([])
        assert not cache.tensor[[0, 2]].any() and cache.tensor[1].isnan().all()

    def test_an_idle_worker_has_its_cache_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """First the beginning, at most READY bytes, and what is written already stays."""
        monkeypatch.setattr(kv_cache, "READY", 3 * kv_cache.PIECE)
        cache = PagedKVCache(LAYOUT, 5 * kv_cache.PIECE // LAYOUT.block_bytes, CPU)
        assert cache.fd is not None
        cache.tensor[7] = 7.0
        found = [os.fstat(cache.fd).st_blocks * 512]
        while cache.prepare():
            found.append(os.fstat(cache.fd).st_blocks * 512)
        assert found[0] <= 2 * mmap.PAGESIZE
        assert found[1:] == [kv_cache.PIECE, 2 * kv_cache.PIECE, 3 * kv_cache.PIECE]
        assert (cache.tensor[7] == 7.0).all() and cache.tensor.count_nonzero() == cache.tensor[7].numel()

    def test_a_cache_that_cannot_be_prepared_is_used_page_by_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_cache, "MADV_POPULATE_WRITE", 12345)
        cache = PagedKVCache(LAYOUT, 2, CPU)
        assert not cache.prepare() and not cache.prepare()
        assert not PagedKVCache(LAYOUT, 2, CPU, rank=1, world=2).prepare(), "memory of its own"

    def test_memory_is_the_cache_itself(self) -> None:
        cache = PagedKVCache(LAYOUT, 3, CPU)
        cache.memory[1] = 1
        assert cache.memory.shape == (3, LAYOUT.block_bytes) and cache.read([1]).eq(1).all()
        assert cache.fence() is None


READER = """
import mmap, os, sys
with open(f"/proc/{sys.argv[1]}/fd/{sys.argv[2]}", "r+b") as file:
    size = os.fstat(file.fileno()).st_size
    shared = mmap.mmap(file.fileno(), size)
    print(size, shared[7])
    shared[8] = 99
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory files and /proc are Linux's")
class TestSharedMemory:
    def test_another_process_of_this_user_sees_and_changes_it(self) -> None:
        cache = PagedKVCache(LAYOUT, 5, CPU)
        cache.memory[0, 7] = 42
        command = [sys.executable, "-c", READER, str(os.getpid()), str(cache.fd)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == [str(5 * LAYOUT.block_bytes), "42"]
        assert cache.memory[0, 8] == 99

    def test_child_programs_do_not_inherit_it(self) -> None:
        cache = PagedKVCache(LAYOUT, 1, CPU)
        assert cache.fd is not None and not os.get_inheritable(cache.fd)
        command = ["ls", "-l", "/proc/self/fd"]
        done = subprocess.run(command, close_fds=False, capture_output=True, text=True, timeout=60, check=True)
        assert "->" in done.stdout and "tandem-kv" not in done.stdout

    def test_close_ends_sharing_and_nothing_else(self) -> None:
        cache = PagedKVCache(LAYOUT, 1, CPU)
        cache.close()
        cache.close()
        cache.memory.fill_(3)
        assert cache.fd is None and cache.read([0]).eq(3).all()

    def test_descriptors_and_memory_go_with_the_cache(self) -> None:
        gc.collect()
        before = os.listdir("/proc/self/fd")
        caches = [PagedKVCache(LAYOUT, 1, CPU) for _ in range(5)]
        assert len(os.listdir("/proc/self/fd")) > len(before)
        caches.clear()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == len(before)

    def test_unused_blocks_take_no_memory(self) -> None:
        cache = PagedKVCache(LAYOUT, (256 << 20) // LAYOUT.block_bytes, CPU)
        assert cache.fd is not None
        cache.write([5], cache.read([4]).fill_(1))
        assert os.fstat(cache.fd).st_blocks * 512 <= 1 << 20 < os.fstat(cache.fd).st_size

    def test_only_a_cache_on_the_host_that_is_whole_is_shared(self) -> None:
        assert PagedKVCache(LAYOUT, 1, CPU, world=2).fd is None

    def test_without_memory_files_it_is_private(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "memfd_create")
        cache = PagedKVCache(LAYOUT, 2, CPU)
        cache.memory[1] = 5
        assert cache.fd is None and cache.read([1]).eq(5).all()
        cache.close()

    def test_more_than_the_machine_has_is_refused(self) -> None:
        blocks = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // LAYOUT.block_bytes + 1
        with pytest.raises(ConfigError, match="lower kv_cache_memory_bytes"):
            PagedKVCache(LAYOUT, blocks, CPU)
