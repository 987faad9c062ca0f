"""From a Batch to logits. The batch becomes one int64 tensor, so one copy moves it to the device or to other ranks.

packed   [ T S R W | token_ids T | positions T | slot_blocks T | slot_offsets T | query_start S+1
         | context_lens S | block_tables S·W | sample_rows R ]
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.batch import Batch
from tandem.engine.kv_cache import PagedKVCache
from tandem.engine.models.transformer import Model, StepInputs, StepOutput

HEADER = 4


def pack(batch: Batch, block_size: int) -> Tensor:
    """The batch and where its new KV goes, on the host. Block tables are padded with 0 to the longest."""
    tokens, sequences = len(batch.token_ids), len(batch.context_lens)
    used = [-(-length // block_size) for length in batch.context_lens]  # blocks in sight; more may be allocated
    width = max(used)
    table = array("q")
    for count, blocks in zip(used, batch.block_tables, strict=True):
        assert len(blocks) >= count, f"{len(blocks)} blocks allocated, {count} needed"
        table.extend(blocks[:count])
        table.extend([0] * (width - count))
    tables = torch.frombuffer(table, dtype=torch.int64)
    start = torch.tensor(batch.query_start)
    positions = torch.tensor(batch.positions)
    owner = torch.arange(sequences).repeat_interleave(start.diff(), output_size=tokens)  # (T,) index into sequences
    return torch.cat([
        torch.tensor([tokens, sequences, len(batch.sample_rows), width]),
        torch.tensor(batch.token_ids),
        positions,
        tables[owner * width + positions // block_size],
        positions % block_size,
        start,
        torch.tensor(batch.context_lens),
        tables,
        torch.tensor(batch.sample_rows, dtype=torch.int64),
    ])  # fmt: skip


def unpack(packed: Tensor, device: torch.device) -> StepInputs:
    """What `pack` made, on `device`; the host keeps the lengths it needs."""
    tokens, sequences, rows, width = integers(packed[:HEADER])
    sizes = [HEADER, tokens, tokens, tokens, tokens, sequences + 1, sequences, sequences * width, rows]
    host = torch.split(packed, sizes)
    _, ids, positions, blocks, offsets, start, lens, table, sampled = torch.split(packed.to(device), sizes)
    meta = AttentionMetadata(
        query_start=start.int(),
        context_lens=lens.int(),
        block_tables=table.view(sequences, width).int(),
        slot_blocks=blocks,
        slot_offsets=offsets,
        query_lens=integers(host[5].diff()),
        context_lens_host=integers(host[6]),
    )
    return StepInputs(ids, positions, sampled, meta)


def integers(values: Tensor) -> list[int]:
    """`values` (n,) as Python's own."""
    return cast(list[int], values.tolist())  # pyright: ignore[reportUnknownMemberType]  # the stub says only `list`


class ModelRunner:
    """One rank's model on its cache. Not thread-safe: one step at a time."""

    def __init__(self, model: Model, cache: PagedKVCache, attention: AttentionBackend) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._device = cache.tensor.device

    @torch.inference_mode()
    def forward(self, packed: Tensor, after_layer: Callable[[int], None] | None = None) -> StepOutput:
        """Compute the KV of all tokens of `packed`, and the logits of its sample rows."""
        inputs = unpack(packed, self._device)
        return self._model.forward(inputs, self._attention, self._cache.layers, after_layer)
