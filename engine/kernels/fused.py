"""Triton kernels of what stands between a layer's matrix products, one launch each.

    add_norm   x += y, and RMSNorm of the sum
    write      query and key norm, rotary embedding, and keys and values into the paged cache
    gate       silu(gate) · up
    quantize   rows in FP8, with a scale each

Each reads its inputs once, computes in float32 and rounds what it stores, once.
"""

# Triton's language has no types, and a launch takes other arguments than the kernel declares:
# pyright: basic, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.engine.quantization import float8

HEADS = 8  # in one program of the write kernel
TILE = 1024  # outputs of one program of the gate kernel
LARGEST, LEAST = tl.constexpr(float8.LARGEST), tl.constexpr(float8.LEAST)


@triton.jit
def _add_norm_kernel(
    x, y, weight, output, x_row, y_row, output_row, size, eps,
    ADD: tl.constexpr, SIZE: tl.constexpr,  # a power of two that covers size
):  # fmt: skip
    """One program for each row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    mask = column < size
    values = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(y + row * y_row + column, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)  # the norm is of what the next layer will read
        tl.store(x + row * x_row + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    normed = values * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * output_row + column, normed.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _stored(values, dtype: tl.constexpr):
    """`values` as a cache of `dtype` holds them: FP8 saturates (attention/base.py), and NaN stays NaN."""
    if dtype == tl.float8e4nv:
        values = values.to(tl.float32)
        values = tl.where(values > LARGEST, LARGEST, tl.where(values < -LARGEST, -LARGEST, values))
    return values.to(dtype)


@triton.jit
def _write_kernel(
    qkv, query, kv, cosines, sines, query_weight, key_weight, blocks, offsets,
    qkv_token, query_token, kv_block, kv_part, kv_head, kv_token,  # strides, elements
    heads, kv_heads, head_dim, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,  # a power of two that covers head_dim / 2
):  # fmt: skip
    """Program (token, some heads): first and second halves of HEADS heads of query | key | value, (HEADS, HALF) each.

    A token whose block is negative is written nowhere: it fills up a batch (runner.pad).
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair, half = tl.arange(0, HALF)[None, :], head_dim // 2
    inside = pair < half
    mask = (head < heads + 2 * kv_heads) & inside
    place = qkv + token * qkv_token + head * head_dim + pair
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    is_query, is_value = head < heads, head >= heads + kv_heads
    key, other = first, second
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / head_dim + eps)[:, None]
        of_query = tl.load(query_weight + pair, mask=inside, other=0.0).to(tl.float32)
        of_key = tl.load(key_weight + pair, mask=inside, other=0.0).to(tl.float32)
        key = first * scale * tl.where(is_query, of_query, of_key)
        of_query = tl.load(query_weight + half + pair, mask=inside, other=0.0).to(tl.float32)
        of_key = tl.load(key_weight + half + pair, mask=inside, other=0.0).to(tl.float32)
        other = second * scale * tl.where(is_query, of_query, of_key)
    cosine = tl.load(cosines + token * half + pair, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + token * half + pair, mask=inside, other=0.0).to(tl.float32)
    first = tl.where(is_value, first, key * cosine - other * sine).to(query.dtype.element_ty)
    second = tl.where(is_value, second, other * cosine + key * sine).to(query.dtype.element_ty)
    place = query + token * query_token + head * head_dim + pair
    tl.store(place, first, mask=mask & is_query)
    tl.store(place + half, second, mask=mask & is_query)
    block = tl.load(blocks + token)
    if block >= 0:
        row = tl.where(is_value, kv_part + (head - heads - kv_heads) * kv_head, (head - heads) * kv_head)
        slot = kv + block * kv_block + tl.load(offsets + token) * kv_token + row + pair
        tl.store(slot, _stored(first, kv.dtype.element_ty), mask=mask & (head >= heads))
        tl.store(slot + half, _stored(second, kv.dtype.element_ty), mask=mask & (head >= heads))


@triton.jit
def _quantize_kernel(x, codes, scales, x_row, codes_row, size, SIZE: tl.constexpr):  # SIZE: a power of two, ≥ size
    """One program for each row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    mask = column < size
    values = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    tl.store(codes + row * codes_row + column, (values / scale).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(gate_up, output, gate_up_row, output_row, size, TILE: tl.constexpr):
    """Program (row, tile of columns)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < size
    place = gate_up + row * gate_up_row + column
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + size, mask=mask, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(output + row * output_row + column, gated.to(output.dtype.element_ty), mask=mask)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `x` (T, size), or, in place, of x += y."""
    tokens, size = x.shape
    output = torch.empty_like(x)
    covered = triton.next_power_of_2(size)
    _add_norm_kernel[(tokens,)](
        x, x if y is None else y, weight, output, x.stride(0), x.stride(0) if y is None else y.stride(0),
        output.stride(0), size, eps, ADD=y is not None, SIZE=covered, num_warps=min(16, max(4, covered // 512)),
    )  # fmt: skip
    return output


@dataclass(frozen=True, slots=True)
class Norms:
    query: Tensor  # (head_dim,)
    key: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Slots:
    """Where T tokens stand: angles (T, 1, head_dim / 2), and block and offset in the cache, (T,) int64."""

    cosines: Tensor
    sines: Tensor
    blocks: Tensor
    offsets: Tensor


def write(qkv: Tensor, norms: Norms | None, kv: Tensor, slots: Slots) -> Tensor:
    """The rotated queries (T, heads, head_dim) of `qkv` (T, query heads | key heads | value heads); keys, rotated,
    and values go to `kv[blocks[t], :, :, offsets[t]]`.

    `kv` is (blocks, 2, kv_heads, block_size, head_dim) with any strides but the last, which is 1; so are the others.
    """
    tokens, _, kv_heads, _, head_dim = len(qkv), *kv.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(tokens, heads, head_dim)
    weights = (norms.query, norms.key) if norms else (qkv, qkv)
    _write_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv, query, kv, slots.cosines, slots.sines, *weights, slots.blocks, slots.offsets,
        qkv.stride(0), query.stride(0), *kv.stride()[:4], heads, kv_heads, head_dim, norms.eps if norms else 0.0,
        NORM=norms is not None, HEADS=HEADS, HALF=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return query


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of `gate_up` (T, gate | up): (T, size)."""
    tokens, size = len(gate_up), gate_up.shape[1] // 2
    output = gate_up.new_empty(tokens, size)
    _gate_kernel[(tokens, triton.cdiv(size, TILE))](
        gate_up, output, gate_up.stride(0), output.stride(0), size, TILE=TILE
    )
    return output


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (T, size) as quantization/float8.py has it: FP8 (T, size), and scales (T, 1) float32."""
    tokens, size = x.shape
    codes = torch.empty(x.shape, dtype=float8.DTYPE, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    covered = triton.next_power_of_2(size)
    _quantize_kernel[(tokens,)](
        x, codes, scales, x.stride(0), codes.stride(0), size,
        SIZE=covered, num_warps=min(16, max(4, covered // 512)),
    )  # fmt: skip
    return codes, scales
