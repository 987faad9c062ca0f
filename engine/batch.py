"""What one forward pass computes, between scheduler, runner and (for tensor parallelism) the other ranks.

sequences      s0        s1  s2          two chunks and a decode, concatenated without padding
tokens       [ a b c d | e | f g h ]     T = 8
query_start    0       4   5        8
sample_rows          3   4              rows whose logits are wanted (s2's prompt is not finished)
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.request import Logprobs
from tandem.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute token_ids[computed : computed + num_tokens] of `sequence`; sampled iff that reaches the end."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.num_tokens == self.sequence.remaining


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of each of `sequence.choices`, in their order; or, if `error` says why, none.

    With an error the sequence is over, and the KV that it computed is good for nothing: it must not be published or
    sent. A sequence that does not sample in a step has a result only if it failed.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs | None, ...]
    error: str = ""

    @classmethod
    def failed(cls, sequence: Sequence, error: str) -> Sampled:
        return cls(sequence, (), (), error)


@dataclass(frozen=True, slots=True)
class Batch:
    """Plain integers, so that it can be broadcast to the other tensor-parallel ranks without pickling."""

    token_ids: list[int]  # (T,)
    positions: list[int]  # (T,) position of each token in its sequence
    query_start: list[int]  # (S + 1,)
    context_lens: list[int]  # (S,) tokens of the sequence that are in the KV cache after this pass
    block_tables: list[list[int]]  # (S, ragged) block ids covering context_lens
    sample_rows: list[int]  # indices into (T,), one for each sampled sequence


def build_batch(scheduled: list[Scheduled]) -> Batch:
    batch = Batch([], [], [0], [], [], [])
    for item in scheduled:
        sequence, start, end = item.sequence, item.sequence.computed, item.sequence.computed + item.num_tokens
        batch.token_ids.extend(sequence.token_ids[start:end])
        batch.positions.extend(range(start, end))
        batch.query_start.append(len(batch.token_ids))
        batch.context_lens.append(end)
        batch.block_tables.append(sequence.blocks)
        if item.samples:
            batch.sample_rows.append(len(batch.token_ids) - 1)
    return batch
