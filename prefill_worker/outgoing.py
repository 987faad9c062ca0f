"""Which KV of one prompt is final, and how it leaves for D: by chunks of the prompt and by groups of layers.

    D's blocks   [ D has them ][ pushed ][ being computed: layers 0 … k pushed, the others as they come ][ later ]
                               first     next                                                         end

A block is final when it is full, or when the prompt ends in it. Block numbers count in D's block size; the blocks
themselves are sent from where they lie, unless D's blocks have another size: then a converted copy is sent.

Invariant: every layer of every granted block is pushed exactly once, in order, and never before it is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.common.block_hash import BlockHash, block_hashes, chain_root
from tandem.common.handoff import Grant, Manifest
from tandem.engine.allocation import blocks_for
from tandem.engine.sequence import Sequence as Prompt
from tandem.kv_transfer.base import BlockStore
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.reslice import resliced


@dataclass(frozen=True, slots=True)
class Source:
    """P's side of every transfer."""

    store: BlockStore
    max_backlog_bytes: int  # copied out of the cache and not yet sent, per link
    pipelined_from: int  # tokens; shorter prompts leave in one piece, when they are complete


class Outgoing:
    def __init__(self, source: Source, sequence: Prompt, grant: Grant, link: PushLink) -> None:
        self._source, self._sequence, self._grant, self._link = source, sequence, grant, link
        self._size = grant.block_size
        self._next = grant.first_block
        self._layers = 0  # of the blocks from `_next` on, pushed already
        self._end = grant.first_block + grant.num_blocks

    @property
    def complete(self) -> bool:
        return self._next == self._end

    @property
    def by_layers(self) -> bool:
        """Whether layers may leave while later ones are computed."""
        return self._pipelined and not self._copies

    def push_layers(self, computed: int, first: int, count: int) -> None:
        """Layers [first, first + count) of all tokens before `computed` are final."""
        end = self._final(computed)
        if first == self._layers and end > self._next:
            self._push(end, first, count)
            self._layers += count
            self._finish_layers(end)

    def push(self) -> None:
        """Everything that is final now, as far as the link has room for copies."""
        if not self._pipelined and self._sequence.remaining:
            return
        end = self._final(self._sequence.computed)
        if self._copies:
            end = min(end, self._next + self._room())
        if end > self._next:
            self._push(end, self._layers, self._source.store.layout.layers - self._layers)
            self._layers = self._source.store.layout.layers
            self._finish_layers(end)

    def manifest(self, first_tokens: tuple[int, ...]) -> Manifest:
        """Without the digests: the link fills them in."""
        grant, length = self._grant, len(self._sequence.token_ids)
        return Manifest(grant.transfer_id, grant.generation, length, tuple(self._hashes()), (), first_tokens)

    def _hashes(self) -> Sequence[BlockHash]:
        """Of D's blocks."""
        prompt, layout = self._sequence, self._source.store.layout
        if self._size == layout.block_size:
            return prompt.block_hashes(self._size, layout.fingerprint)
        root = chain_root(prompt.salt, replace(layout, block_size=self._size).fingerprint)
        return block_hashes(prompt.token_ids, self._size, root)

    @property
    def _copies(self) -> bool:
        store = self._source.store
        return store.memory is None or self._size != store.layout.block_size

    @property
    def _pipelined(self) -> bool:
        return len(self._sequence.token_ids) >= self._source.pipelined_from

    def _final(self, computed: int) -> int:
        length = len(self._sequence.token_ids)
        return computed // self._size if computed < length else blocks_for(length, self._size)

    def _room(self) -> int:
        """Blocks that may be copied now; at least one when nothing waits, however large it is."""
        backlog, limit = self._link.backlog_bytes, self._source.max_backlog_bytes
        block_bytes = self._source.store.layout.block_bytes * self._size // self._source.store.layout.block_size
        return max((limit - backlog) // block_bytes, 0 if backlog else 1)

    def _push(self, end: int, first_layer: int, num_layers: int) -> None:
        first, grant = self._next, self._grant
        start = first - grant.first_block
        targets = grant.targets[start : start + end - first]
        payload = self._payload(first, end, first_layer, num_layers)
        ready = self._source.store.fence()
        piece = Piece(first, payload, first_layer, num_layers, targets, ready)
        self._link.push(grant.transfer_id, grant.generation, piece)

    def _payload(self, first: int, end: int, first_layer: int, num_layers: int) -> Payload:
        store, blocks = self._source.store, self._sequence.blocks
        if self._size != store.layout.block_size:
            return Payload.whole(resliced(store, blocks, first, end - first, self._size))
        if store.memory is None:
            return Payload.whole(store.read(blocks[first:end]))
        size = store.layout.layer_bytes
        return Payload.layers(store.memory, blocks[first:end], first_layer * size, num_layers * size)

    def _finish_layers(self, end: int) -> None:
        if self._layers == self._source.store.layout.layers:
            self._next, self._layers = end, 0
