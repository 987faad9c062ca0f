"""Batches over a paged cache with everything a backend may meet, and the same tokens as dense tensors.

Slots that no token was written to hold NaN, so that a backend which reads one is found out; query, key and value are
slices of one tensor, as a fused projection leaves them; the layer is a strided view of a cache of several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.attention.base import AttentionMetadata

LAYERS = 3


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, int], ...]  # of each sequence: new tokens, and tokens with them
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 8
    window: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Inputs:
    query: Tensor  # (T, heads, head_dim)
    key: Tensor  # (T, kv_heads, head_dim)
    value: Tensor
    kv: Tensor  # (blocks, 2, kv_heads, block_size, head_dim), older tokens written
    meta: AttentionMetadata
    dense: list[Tensor]  # of each sequence (2, context, kv_heads, head_dim), new tokens included


RAGGED = ((1, 1), (7, 7), (1, 40), (20, 50), (1, 16), (3, 35))
CASES: dict[str, Case] = {
    "first-token": Case(((1, 1),)),
    "one-decode": Case(((1, 21),)),
    "whole-prompt": Case(((37, 37),)),
    "prompts": Case(((1, 1), (8, 8), (9, 9), (16, 16), (5, 5))),
    "chunk-behind-context": Case(((11, 70),)),
    "decodes": Case(((1, 1), (1, 8), (1, 9), (1, 64), (1, 33))),
    "ragged": Case(RAGGED),
    "long": Case(((1, 600), (2, 520), (1, 256), (1, 257))),
    "no-groups": Case(RAGGED, heads=2, kv_heads=2),
    "groups-of-7": Case(RAGGED, heads=14, kv_heads=2),
    "one-kv-head": Case(RAGGED, heads=8, kv_heads=1),
    "blocks-of-16": Case(RAGGED, block_size=16),
    "blocks-of-1": Case(((1, 5), (3, 7)), block_size=1),
    "head-dim-64": Case(RAGGED, head_dim=64, block_size=16),
    "head-dim-80": Case(RAGGED, head_dim=80),
    "head-dim-128": Case(((1, 40), (20, 50)), head_dim=128),
    "head-dim-256": Case(((1, 20), (5, 9)), head_dim=256),
    "window-1": Case(RAGGED, window=1),
    "window-5": Case(RAGGED, window=5),
    "window-33": Case(RAGGED, window=33),
    "window-beyond-context": Case(((1, 40), (7, 9)), window=4096),
    "long-window": Case(((1, 600), (2, 520), (1, 700)), window=300),
    "bf16": Case(RAGGED, dtype=torch.bfloat16),
    "bf16-head-dim-128-blocks-of-16": Case(((1, 40), (20, 50)), head_dim=128, block_size=16, dtype=torch.bfloat16),
    "bf16-window": Case(((1, 40), (20, 50)), window=33, dtype=torch.bfloat16),
    "fp16": Case(RAGGED, dtype=torch.float16),
}


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // case.block_size) for _, context in case.lengths]
    spare = 3
    order = torch.randperm(sum(counts) + spare, generator=generator)
    tables = [table.tolist() for table in order[: sum(counts)].split(counts)]
    shape = (len(order), LAYERS, 2, case.kv_heads, case.block_size, case.head_dim)
    kv = torch.full(shape, float("nan"), dtype=case.dtype)[:, 1]
    tokens = sum(length for length, _ in case.lengths)
    fused = torch.randn(tokens, case.heads + 2 * case.kv_heads, case.head_dim, generator=generator).to(case.dtype)
    query, key, value = fused.split((case.heads, case.kv_heads, case.kv_heads), dim=1)
    dense, slots, start = [], [], 0
    for (length, context), table in zip(case.lengths, tables, strict=True):
        old = torch.randn(2, context - length, case.kv_heads, case.head_dim, generator=generator).to(case.dtype)
        new = torch.stack((key[start : start + length], value[start : start + length]))
        dense.append(torch.cat((old, new), dim=1))
        places = [(table[position // case.block_size], position % case.block_size) for position in range(context)]
        for position, (block, offset) in enumerate(places[: context - length]):
            kv[block, :, :, offset] = old[:, position]
        slots += places[context - length :]
        start += length
    return Inputs(query, key, value, kv, _metadata(case, tables, slots), dense)


def _metadata(case: Case, tables: list[list[int]], slots: list[tuple[int, int]]) -> AttentionMetadata:
    lengths = [length for length, _ in case.lengths]
    contexts = [context for _, context in case.lengths]
    longest = max(map(len, tables))
    return AttentionMetadata(
        query_start=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor([table + [0] * (longest - len(table)) for table in tables], dtype=torch.int32),
        slot_blocks=torch.tensor([block for block, _ in slots]),
        slot_offsets=torch.tensor([offset for _, offset in slots]),
        query_lens=lengths,
        context_lens_host=contexts,
    )
