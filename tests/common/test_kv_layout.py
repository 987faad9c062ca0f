"""Sizes and names of a KV block."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tandem.common.kv_layout import KVLayout

LAYOUT = KVLayout("abc", "bfloat16", 16, 3, 2, 8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_block_bytes_are_those_of_an_array_of_its_shape(dtype: str) -> None:
    layout = dataclasses.replace(LAYOUT, dtype=dtype)
    assert layout.block_bytes == np.zeros(layout.block_shape, dtype).nbytes


def test_every_field_changes_the_fingerprint() -> None:
    changed = [
        dataclasses.replace(LAYOUT, **{name: value})
        for name, value in [
            ("revision", "abd"), ("dtype", "float16"), ("block_size", 8),
            ("layers", 4), ("kv_heads", 4), ("head_dim", 4),
        ]
    ]  # fmt: skip
    assert len({layout.fingerprint for layout in [LAYOUT, *changed]}) == 7
    assert len(LAYOUT.fingerprint) == 32
    assert dataclasses.replace(LAYOUT).fingerprint == LAYOUT.fingerprint
