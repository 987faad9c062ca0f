"""The same tokens in blocks of another size: P converts what it sends to the block size of D.

P, 4 tokens a block   [ t0 t1 t2 t3 ][ t4 t5 t6 t7 ][ t8 … ]
D, 6 tokens a block   [ t0 t1 t2 t3   t4 t5 ][ t6 t7   t8 … ]        block: (layers, 2, kv_heads, tokens, head_dim)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import BlockStore


def resliced(store: BlockStore, blocks: Sequence[int], first: int, count: int, size: int) -> Tensor:
    """Blocks [first, first + count) of `size` tokens of the sequence that lies in `blocks` of the store.

    (count, block bytes) uint8, a copy. Tokens behind the sequence's last block are zero.
    """
    own = store.layout.block_size
    start, stop = first * size, (first + count) * size
    covering = blocks[start // own : -(-stop // own)]
    tokens = _by_token(store.read(covering), store.layout)
    skipped = start - start // own * own
    wanted = tokens[..., skipped : skipped + count * size, :]
    padding = count * size - wanted.shape[-2]
    padded = torch.nn.functional.pad(wanted, (0, 0, 0, padding)) if padding else wanted
    return _by_block(padded, replace(store.layout, block_size=size))


def _by_token(payload: Tensor, layout: KVLayout) -> Tensor:
    """(n, block bytes) → (layers, 2, kv_heads, n · block_size, bytes of one head's token)"""
    layers, two, heads, size, _ = layout.block_shape
    shaped = payload.view(payload.shape[0], layers, two, heads, size, -1)
    return shaped.permute(1, 2, 3, 0, 4, 5).reshape(layers, two, heads, payload.shape[0] * size, -1)


def _by_block(tokens: Tensor, layout: KVLayout) -> Tensor:
    """The inverse of `_by_token`."""
    layers, two, heads, length, width = tokens.shape
    size = layout.block_size
    shaped = tokens.reshape(layers, two, heads, length // size, size, width).permute(3, 0, 1, 2, 4, 5)
    return shaped.reshape(length // size, -1).contiguous()
