"""Triton kernels of causal attention over the paged cache: chunks of prompts, and single tokens with split keys.

All of them see one kv head at a time, with the query heads that share it (its group) as rows of one tile:

    rows      token 0: head 0 … head G-1 | token 1: head 0 … | …       (ROWS, DIM), G padded to a power of two
    columns   TILE positions of the context, found through the block table

so a key is read once for the whole group; from a cache in FP8 it is widened to the query's dtype. Softmax is online
and in float32 (FlashAttention-2). A lone token is split into fixed runs of SPLIT positions (flash decoding), which
`_combine_kernel` adds up: fixed, not chosen by the batch, so that a sequence's result does not depend on its
neighbours.
"""

# Triton's language has no types, and a launch takes other arguments than the kernel declares:
# pyright: basic, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 256  # positions that one program of the decode kernel reads
MIN_ROWS = 16  # of a matrix product on tensor cores
NO_WINDOW = 1 << 30
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(left, right):
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _run(
    query, row_position, kv, table, first, last, scale, window,
    kv_block, kv_part, kv_token, block_size, head_dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Online softmax of `query` (ROWS, DIM) over positions first … last - 1 of one head, `kv` pointing at its keys.

    Returns the rows' maxima and sums (ROWS,) and weighted values (ROWS, DIM); -inf, 0 and 0 for rows that see none.
    """
    dim = tl.arange(0, DIM)
    maxima = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < last
        block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
        token = kv + block * kv_block + (position % block_size) * kv_token
        mask = inside[:, None] & (dim < head_dim)[None, :]  # loads nothing outside: free slots may hold anything
        key = tl.load(token[:, None] + dim[None, :], mask=mask, other=0.0)
        value = tl.load(token[:, None] + kv_part + dim[None, :], mask=mask, other=0.0)
        key, value = key.to(query.dtype), value.to(query.dtype)  # from FP8 this is exact
        scores = _dot(query, tl.trans(key)) * scale
        distance = row_position[:, None] - position[None, :]
        scores = tl.where((distance >= 0) & (distance < window) & inside[None, :], scores, float("-inf"))
        grown = tl.maximum(maxima, tl.max(scores, 1))
        base = tl.where(grown == float("-inf"), 0.0, grown)  # -inf - -inf would be NaN
        weights = tl.exp(scores - base[:, None])
        decay = tl.exp(maxima - base)
        sums = sums * decay + tl.sum(weights, 1)
        values = values * decay[:, None] + _dot(weights.to(value.dtype), value)
        maxima = grown
    return maxima, sums, values


@triton.jit
def _chunk_kernel(
    query, kv, output, query_start, context_lens, tables, scale, window,
    query_token, query_head, output_token, output_head, kv_block, kv_part, kv_head, kv_token, table_row,
    group, head_dim, block_size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence, kv head): ROWS // GROUP tokens of a sequence with more than one new token."""
    sequence, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - start
    token = tl.program_id(0) * (ROWS // GROUP)
    if (length > 1) & (token < length):
        context = tl.load(context_lens + sequence)
        row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
        row_token, member = token + row // GROUP, row % GROUP
        mask = ((row_token < length) & (member < group))[:, None] & (dim < head_dim)[None, :]
        at, row_head = (start + row_token).to(tl.int64), head * group + member
        place = query + (at * query_token + row_head * query_head)[:, None] + dim[None, :]
        position = context - length + row_token
        oldest = tl.maximum(context - length + token - window + 1, 0)
        newest = tl.minimum(context - length + token + ROWS // GROUP, context)
        _, sums, values = _run(
            tl.load(place, mask=mask, other=0.0), position, kv + head.to(tl.int64) * kv_head,
            tables + sequence * table_row, oldest // TILE * TILE, newest, scale, window,
            kv_block, kv_part, kv_token, block_size, head_dim, ROWS, DIM, TILE,
        )  # fmt: skip
        place = output + (at * output_token + row_head * output_head)[:, None] + dim[None, :]
        tl.store(place, values / tl.where(sums == 0.0, 1.0, sums)[:, None], mask=mask)


@triton.jit
def _split_kernel(
    query, kv, part_values, part_maxima, part_sums, query_start, context_lens, tables, scale, window,
    query_token, query_head, kv_block, kv_part, kv_head, kv_token, table_row,
    group, head_dim, block_size,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, kv head, split): one run of SPLIT positions for a sequence with one new token.

    Leaves unnormalised values (S, heads, splits, head_dim), maxima and sums (S, heads, splits), all float32.
    """
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    oldest = tl.maximum(context - window, 0)
    first = tl.maximum(split * SPLIT, oldest // TILE * TILE)
    last = tl.minimum(split * SPLIT + SPLIT, context)
    if (length == 1) & (first < last):
        member, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
        row_head = head * group + member
        mask = (member < group)[:, None] & (dim < head_dim)[None, :]
        place = query + start.to(tl.int64) * query_token + (row_head * query_head)[:, None] + dim[None, :]
        maxima, sums, values = _run(
            tl.load(place, mask=mask, other=0.0), tl.full((ROWS,), context - 1, tl.int32),
            kv + head.to(tl.int64) * kv_head, tables + sequence * table_row, first, last, scale, window,
            kv_block, kv_part, kv_token, block_size, head_dim, ROWS, DIM, TILE,
        )  # fmt: skip
        heads, splits = tl.num_programs(1) * group, tl.num_programs(2)
        part = (sequence.to(tl.int64) * heads + row_head) * splits + split
        tl.store(part_maxima + part, maxima, mask=member < group)
        tl.store(part_sums + part, sums, mask=member < group)
        tl.store(part_values + (part * head_dim)[:, None] + dim[None, :], values, mask=mask)


@triton.jit
def _combine_kernel(
    part_values, part_maxima, part_sums, output, query_start, context_lens, window,
    output_token, output_head, splits, head_dim,
    DIM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): adds up the splits that `_split_kernel` left, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - start
    if length == 1:
        context = tl.load(context_lens + sequence)
        dim = tl.arange(0, DIM)
        mask = dim < head_dim
        part = (sequence.to(tl.int64) * tl.num_programs(1) + head) * splits
        maximum = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        values = tl.zeros((DIM,), tl.float32)
        for split in range(tl.maximum(context - window, 0) // SPLIT, tl.cdiv(context, SPLIT)):
            found = tl.load(part_maxima + part + split)
            grown = tl.maximum(maximum, found)
            decay, weight = tl.exp(maximum - grown), tl.exp(found - grown)
            total = total * decay + tl.load(part_sums + part + split) * weight
            run = tl.load(part_values + (part + split) * head_dim + dim, mask=mask, other=0.0)
            values = values * decay + run * weight
            maximum = grown
        place = output + start.to(tl.int64) * output_token + head * output_head + dim
        tl.store(place, values / tl.where(total == 0.0, 1.0, total), mask=mask)  # 0 without a context


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the new tokens and the contexts of S sequences are; tensors on the device, maxima on the host."""

    query_start: Tensor  # (S + 1,) int32
    context_lens: Tensor  # (S,) int32
    block_tables: Tensor  # (S, max_blocks) int32
    max_query: int
    max_context: int  # may be overstated: a graph has that of the longest it was captured for


@dataclass(frozen=True, slots=True)
class _Shape:
    group: int
    dim: int  # power of two that covers head_dim
    tile: int  # context positions in one step

    @classmethod
    def of(cls, query: Tensor, kv: Tensor) -> _Shape:
        dim = max(16, triton.next_power_of_2(query.shape[2]))
        tile = min(64, max(16, 16384 // (dim * query.element_size())))  # three steps' tiles fit in shared memory
        return cls(query.shape[1] // kv.shape[2], dim, tile)


def attend_chunks(query: Tensor, kv: Tensor, output: Tensor, where: Sequences, scale: float, window: int) -> None:
    """Rows of `output` (T, heads, head_dim) of the sequences that have several new tokens."""
    shape = _Shape.of(query, kv)
    group = triton.next_power_of_2(shape.group)
    rows = max(MIN_ROWS, group, (128 if query.element_size() == 2 else 64) if shape.dim <= 128 else 32)
    sequences = where.context_lens.shape[0]
    _chunk_kernel[(triton.cdiv(where.max_query, rows // group), sequences, kv.shape[2])](
        query, kv, output, where.query_start, where.context_lens, where.block_tables, scale, window,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1), *kv.stride()[:4],
        where.block_tables.stride(0), shape.group, query.shape[2], kv.shape[3],
        GROUP=group, ROWS=rows, DIM=shape.dim, TILE=shape.tile, num_warps=8 if rows > 64 else 4,
    )  # fmt: skip


def attend_singles(query: Tensor, kv: Tensor, output: Tensor, where: Sequences, scale: float, window: int) -> None:
    """Rows of `output` (T, heads, head_dim) of the sequences that have one new token."""
    shape = _Shape.of(query, kv)
    sequences, heads, head_dim = where.context_lens.shape[0], query.shape[1], query.shape[2]
    splits = triton.cdiv(where.max_context, SPLIT)
    values = torch.empty(sequences, heads, splits, head_dim, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, sequences, heads, splits, dtype=torch.float32, device=query.device)
    _split_kernel[(sequences, kv.shape[2], splits)](
        query, kv, values, maxima, sums, where.query_start, where.context_lens, where.block_tables, scale, window,
        query.stride(0), query.stride(1), *kv.stride()[:4], where.block_tables.stride(0),
        shape.group, head_dim, kv.shape[3],
        ROWS=max(MIN_ROWS, triton.next_power_of_2(shape.group)), DIM=shape.dim, TILE=shape.tile, SPLIT=SPLIT,
    )  # fmt: skip
    _combine_kernel[(sequences, heads)](
        values, maxima, sums, output, where.query_start, where.context_lens, window,
        output.stride(0), output.stride(1), splits, head_dim, DIM=shape.dim, SPLIT=SPLIT,
    )  # fmt: skip
