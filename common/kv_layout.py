"""The shape of a KV block, the same on P, on D and on the wire.

    block: (layers, 2, kv_heads, block_size, head_dim)      2 = key, value; contiguous

A block is whole on the wire: all layers, all heads. A tensor-parallel group keeps a slice of the heads on each
rank and joins them when a block leaves or lands, so P and D may differ in tensor-parallel degree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FLOAT8 = "float8_e4m3fn"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FLOAT8: 1}


MAX_BLOCK_SIZE = 1024  # tokens


@dataclass(frozen=True, slots=True)
class KVLayout:
    revision: str  # of the model: hex digest over configuration and weights
    dtype: str  # of keys and values; key of ELEMENT_BYTES
    block_size: int  # tokens
    layers: int
    kv_heads: int  # of the whole model
    head_dim: int

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim * ELEMENT_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """One layer of one block: a contiguous run inside the block."""
        return self.block_bytes // self.layers

    @property
    def fingerprint(self) -> bytes:
        """32 bytes, in which block hashes are rooted: equal hashes mean equal bytes."""
        text = f"tandem.kv.v1|{self.revision}|{self.dtype}|{self.block_shape}"
        return hashlib.sha256(text.encode()).digest()

    @property
    def pairing(self) -> bytes:
        """32 bytes; P and D pair only when they are equal. The block size is not in it: P converts to D's."""
        text = f"tandem.pairing.v1|{self.revision}|{self.dtype}|{self.layers}|{self.kv_heads}|{self.head_dim}"
        return hashlib.sha256(text.encode()).digest()
