"""One choice being generated (or the common prompt of several), and its place in the KV cache.

    token_ids   [ prompt …………………… | output ………… ]
    computed    ─────────────────►                     KV of these positions is in `blocks`
    blocks      [ b0 ][ b1 ][ b2 ][ b3 ]               position i lives in blocks[i // block_size]

Everything else is derived: what remains to compute is len(token_ids) - computed; a sequence whose remainder fits
into one step is sampled at the end of that step. Prefill, decode, resumption and recomputation after preemption
differ only in these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.common.block_hash import BlockHash, chain_root, next_hash
from tandem.common.errors import InvalidRequest
from tandem.common.request import Leg, SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    request_id: str
    choices: tuple[int, ...]  # more than one only until the first token: then the sequence is forked
    token_ids: list[int]
    prompt_len: int  # token_ids[prompt_len:] is output
    sampling: SamplingParams
    salt: bytes = b""
    arrival: float = 0.0  # monotonic seconds
    blocks: list[int] = field(default_factory=list[int])
    computed: int = 0
    cached: int = 0  # tokens found in the prefix cache when first scheduled
    hashes: list[BlockHash] = field(default_factory=list[BlockHash])  # of full blocks, extended on demand

    @classmethod
    def from_leg(cls, leg: Leg, arrival: float) -> Sequence:
        token_ids = [*leg.prompt_ids, *leg.output_ids]
        return cls(leg.request_id, leg.choices, token_ids, len(leg.prompt_ids), leg.sampling, leg.cache_salt, arrival)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next one can be sampled."""
        return len(self.token_ids) - self.computed

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    def block_hashes(self, block_size: int, fingerprint: bytes) -> list[BlockHash]:
        """The hashes of all full blocks of `token_ids`; computed once each."""
        while (len(self.hashes) + 1) * block_size <= len(self.token_ids):
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else chain_root(self.salt, fingerprint)
            self.hashes.append(next_hash(parent, self.token_ids[start : start + block_size]))
        return self.hashes

    def fork(self, choice: int) -> Sequence:
        """The same tokens and blocks for one choice; the caller takes references on the blocks."""
        return Sequence(
            self.request_id, (choice,), list(self.token_ids), self.prompt_len, self.sampling, self.salt,
            self.arrival, list(self.blocks), self.computed, self.cached, list(self.hashes),
        )  # fmt: skip

    def finish_reason(self) -> str:
        """See SamplingParams.finish_reason; needs at least one output token."""
        return self.sampling.finish_reason(self.output_len, self.token_ids[-1])


def check_tokens(token_ids: list[int], vocab_size: int) -> None:
    """A worker trusts no caller: an id outside the embedding would end the whole step. Raises InvalidRequest."""
    largest = max(token_ids)
    if largest >= vocab_size:
        raise InvalidRequest(f"token id {largest} is not in the model's vocabulary of {vocab_size}", param="prompt")
