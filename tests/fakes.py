"""A model without weights whose KV cache tells when it is wrong.

The "KV" of position i is a checksum of token_ids[: i + 1]. Before a token is sampled, every position of the sequence
is read back from its blocks and compared: a block that is foreign, stale, missing or written at the wrong place
raises ForeignKV. The next token is a checksum too, so anybody can compute the expected output.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from tandem.common.kv_layout import KVLayout
from tandem.common.request import Leg, LegUpdate, SamplingParams
from tandem.engine.batch import Sampled, Scheduled
from tandem.engine.sequence import Sequence

VOCAB = 997


class ForeignKV(AssertionError):
    """A sequence was about to attend to KV that is not its own."""


def checksum(token_ids: Seq[int], salt: int = 0) -> int:
    return zlib.crc32(repr((list(token_ids), salt)).encode()) >> 1


def next_token(token_ids: Seq[int], choice: int = 0) -> int:
    return checksum(token_ids, choice + 1) % VOCAB


def expected_output(prompt: Seq[int], max_tokens: int, choice: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, choice))
    return tokens[len(prompt) :]


class FakeStore:
    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Laid out as the layout says, in memory that another process, or a connector, could map."""
        self.layout = layout
        self.fd: int | None = os.memfd_create("fake-kv")
        os.ftruncate(self.fd, num_blocks * layout.block_bytes)
        memory = torch.frombuffer(mmap.mmap(self.fd, 0), dtype=torch.uint8).view(num_blocks, layout.block_bytes)
        self.memory: Tensor | None = memory
        # (blocks, layers, key and value, tokens): one number each, as one head of one float
        self.tensor = memory.view(torch.int32).view(num_blocks, layout.layers, 2, layout.block_size)

    def read(self, blocks: Seq[int]) -> Tensor:
        return self.tensor[list(blocks)].view(len(blocks), -1).view(torch.uint8)

    def write(self, blocks: Seq[int], payload: Tensor, first_layer: int = 0, num_layers: int | None = None) -> None:
        stop = first_layer + (self.layout.layers if num_layers is None else num_layers)
        values = payload.contiguous().view(torch.int32).view(len(blocks), stop - first_layer, 2, -1)
        self.tensor[list(blocks), first_layer:stop] = values

    def copy(self, source: int, target: int) -> None:
        self.tensor[target] = self.tensor[source]

    def fence(self) -> None:
        """Nothing is ever under way."""

    def zero(self, blocks: Seq[int]) -> None:
        self.tensor[list(blocks)] = 0

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class FakeEngine:
    """Looks like engine.Engine to a worker."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4) -> None:
        self.layout = KVLayout("fake", "float32", block_size, layers=2, kv_heads=1, head_dim=1)
        self.store = FakeStore(self.layout, num_blocks)
        self.num_blocks, self.max_model_len, self.vocab_size = num_blocks, num_blocks * block_size, VOCAB
        self.poison: set[str] = set()  # request ids whose step raises
        self.not_finite: set[str] = set()  # request ids whose computed values are not
        self.steps: list[list[tuple[str, int]]] = []  # (request id, tokens) of each step
        self.closed = False
        self.prompts = 0  # that a prefill worker posted

    def prepare(self) -> bool:
        return False

    def post_prompts(self, count: int) -> None:
        self.prompts = count

    def prompts_elsewhere(self) -> int:
        return 0

    def forward(
        self, scheduled: list[Scheduled], on_layers: Callable[[int, int], None] | None = None, layer_group: int = 1
    ) -> list[Sampled]:
        self.steps.append([(item.sequence.request_id, item.num_tokens) for item in scheduled])
        if any(item.sequence.request_id in self.poison for item in scheduled):
            raise RuntimeError("poisoned step")
        for layer in range(2):
            self._compute(scheduled, layer)
            if on_layers is not None and layer_group == 1:
                on_layers(layer, 1)
        if on_layers is not None and layer_group > 1:
            on_layers(0, 2)
        sick = [item.sequence for item in scheduled if item.sequence.request_id in self.not_finite]
        failed = {sequence: Sampled.failed(sequence, "not finite") for sequence in sick}
        results = [
            failed.get(item.sequence) or (self._sample(item.sequence) if item.samples else None) for item in scheduled
        ]
        return [result for result in results if result is not None]

    def _compute(self, scheduled: list[Scheduled], layer: int) -> None:
        for item in scheduled:
            for position in range(item.sequence.computed, item.sequence.computed + item.num_tokens):
                self._slot(item.sequence, position)[layer] = checksum(item.sequence.token_ids[: position + 1])

    def _sample(self, sequence: Sequence) -> Sampled:
        for position in range(len(sequence.token_ids)):
            found = self._slot(sequence, position).tolist()
            if found != [[checksum(sequence.token_ids[: position + 1])] * 2] * 2:
                raise ForeignKV(f"{sequence.request_id}: position {position} holds foreign KV")
        tokens = tuple(next_token(sequence.token_ids, choice) for choice in sequence.choices)
        return Sampled(sequence, tokens, (None,) * len(tokens))

    def _slot(self, sequence: Sequence, position: int) -> Tensor:
        size = self.layout.block_size
        return self.store.tensor[sequence.blocks[position // size], :, :, position % size]

    def close(self) -> None:
        self.closed = True
        self.store.close()


class Client:
    """Collects the updates of one leg and checks that they are a legal history."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.ends: list[LegUpdate] = []

    def __call__(self, update: LegUpdate) -> None:
        assert not self.ends, "an update after the end of the leg"
        for token in update.tokens:
            mine = self.tokens.setdefault(token.choice, [])
            assert self.reasons.get(token.choice, "") == "", "a token after the choice finished"
            mine.append(token.token_id)
            self.reasons[token.choice] = token.finish_reason
        if update.last:
            self.ends.append(update)

    @property
    def ended(self) -> bool:
        return bool(self.ends)

    @property
    def error(self) -> Exception | None:
        return self.ends[0].error if self.ends else None


def make_leg(request_id: str, prompt: Seq[int], max_tokens: int = 8, **changes: object) -> Leg:
    changes.setdefault("sampling", SamplingParams(max_tokens=max_tokens, temperature=0.0))
    return Leg(request_id, 1, tuple(prompt), **changes)  # pyright: ignore[reportArgumentType]
