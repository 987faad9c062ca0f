"""From a Batch to logits. The batch becomes one int64 tensor, so one copy moves it to the device or to other ranks.

packed   [ T S R W | token_ids T | positions T | slot_blocks T | slot_offsets T | query_start S+1
         | context_lens S | block_tables S·W | sample_rows R ]
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.batch import Batch
from tandem.engine.graphs import Graphs, Key, padded_size, power_of_two
from tandem.engine.kv_cache import PagedKVCache
from tandem.engine.models.transformer import Model, StepInputs, StepOutput
from tandem.engine.upload import upload

HEADER = 4
NOWHERE = -1  # instead of a block: what a token's KV is written to that only fills up a batch
LEAST_CONTEXT = 256  # tokens that the smallest graph reaches


class Shape(NamedTuple):
    """The head of a packed batch."""

    tokens: int
    sequences: int
    rows: int
    width: int  # of the block tables

    @classmethod
    def of(cls, packed: Tensor) -> Shape:
        return cls(*integers(packed[:HEADER]))

    @property
    def is_decode(self) -> bool:
        """Every sequence has one token, and wants its logits."""
        return self.tokens == self.sequences == self.rows

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The parts after the head, views: ids, positions, blocks, offsets, starts, context lengths, tables, rows."""
        tokens, sequences, rows, width = self
        sizes = [HEADER, tokens, tokens, tokens, tokens, sequences + 1, sequences, sequences * width, rows]
        return torch.split(packed, sizes)[1:]


def pack(batch: Batch, block_size: int) -> Tensor:
    """The batch and where its new KV goes, on the host. Block tables are padded with 0 to the longest."""
    used = [-(-length // block_size) for length in batch.context_lens]  # blocks in sight; more may be allocated
    width = max(used)
    values = array("q", [len(batch.token_ids), len(used), len(batch.sample_rows), width])
    values.extend(batch.token_ids)
    values.extend(batch.positions)
    for (start, end), count, blocks in zip(pairwise(batch.query_start), used, batch.block_tables, strict=True):
        assert len(blocks) >= count, f"{len(blocks)} blocks allocated, {count} needed"
        values.extend(blocks[position // block_size] for position in batch.positions[start:end])
    values.extend(position % block_size for position in batch.positions)
    values.extend(batch.query_start)
    values.extend(batch.context_lens)
    for count, blocks in zip(used, batch.block_tables, strict=True):
        values.extend(blocks[:count])
        values.extend([0] * (width - count))
    values.extend(batch.sample_rows)
    return torch.frombuffer(values, dtype=torch.int64)


def unpack(packed: Tensor, device: torch.device) -> StepInputs:
    """What `pack` made, on `device`; the host keeps the lengths it needs."""
    shape = Shape.of(packed)
    _, _, _, _, start, lens, _, _ = shape.split(packed)
    query_lens = [end - begin for begin, end in pairwise(integers(start))]
    return view(upload(packed, device), shape, query_lens, integers(lens))


def view(packed: Tensor, shape: Shape, query_lens: list[int], context_lens: list[int]) -> StepInputs:
    """The parts of `packed`, which is on the device already."""
    ids, positions, blocks, offsets, start, lens, table, rows = shape.split(packed)
    meta = AttentionMetadata(
        query_start=start.int(),
        context_lens=lens.int(),
        block_tables=table.view(shape.sequences, shape.width).int(),
        slot_blocks=blocks,
        slot_offsets=offsets,
        query_lens=query_lens,
        context_lens_host=context_lens,
    )
    return StepInputs(ids, positions, rows, meta)


def pad(packed: Tensor, size: int, width: int) -> Tensor:
    """A packed decode batch as one of `size` sequences and `width` blocks each. Those added have one token each, like
    the others, which sees nothing, is written nowhere and has logits that mean nothing."""
    shape = Shape.of(packed)
    ids, positions, blocks, offsets, _, lens, table, _ = shape.split(packed)
    more = (0, size - shape.sequences)
    return torch.cat([
        torch.tensor([size, size, size, width]),
        F.pad(ids, more),
        F.pad(positions, more),
        F.pad(blocks, more, value=NOWHERE),
        F.pad(offsets, more),
        torch.arange(size + 1),
        F.pad(lens, more),
        F.pad(table.view(shape.sequences, shape.width), (0, width - shape.width, *more)).flatten(),
        torch.arange(size),
    ])  # fmt: skip


def integers(values: Tensor) -> list[int]:
    """`values` (n,) as Python's own."""
    return cast(list[int], values.tolist())  # pyright: ignore[reportUnknownMemberType]  # the stub says only `list`


class ModelRunner:
    """One rank's model on its cache. Not thread-safe: one step at a time."""

    def __init__(
        self, model: Model, cache: PagedKVCache, attention: AttentionBackend, graphs: Graphs | None = None
    ) -> None:
        """`graphs` run the decode steps that they cover; they need the kernels that skip what `pad` adds."""
        self._model = model
        self._cache = cache
        self._attention = attention
        self._graphs = graphs
        self._device = cache.tensor.device

    @torch.inference_mode()
    def forward(self, packed: Tensor, after_layer: Callable[[int], None] | None = None) -> StepOutput:
        """Compute the KV of all tokens of `packed`, and the logits of its sample rows. Valid until the next step."""
        shape, graphs = Shape.of(packed), self._graphs
        if graphs is not None and after_layer is None and shape.is_decode and graphs.cover(shape.sequences):
            return self._decode(graphs, packed, shape)
        return self.eager(packed, after_layer)

    @torch.inference_mode()
    def eager(self, packed: Tensor, after_layer: Callable[[int], None] | None = None) -> StepOutput:
        """`forward`, launch by launch."""
        inputs = unpack(packed, self._device)
        return self._model.forward(inputs, self._attention, self._cache.layers, after_layer)

    def _decode(self, graphs: Graphs, packed: Tensor, shape: Shape) -> StepOutput:
        """By the graph of the next larger size, for the next larger context."""
        size, block_size = padded_size(shape.sequences), self._cache.layout.block_size
        width = power_of_two(max(shape.width, -(-LEAST_CONTEXT // block_size)))

        def step(inputs: Tensor) -> StepOutput:
            everyone = view(inputs, Shape(size, size, size, width), [1] * size, [width * block_size] * size)
            return self._model.forward(everyone, self._attention, self._cache.layers)

        output = graphs.run(Key(size, width), pad(packed, size, width), step)
        return StepOutput(output.logits[: shape.sequences], output.finite[: shape.sequences])
