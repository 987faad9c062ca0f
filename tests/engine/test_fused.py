"""The fused kernels compute what the layers compute in plain PyTorch, and whole models with them the same logits.

On the GPU where there is one, else in Triton's interpreter: test_attention_triton.py runs this file there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine.attention import create_attention
from tandem.engine.attention.base import AttentionMetadata
from tandem.engine.attention.reference import ReferenceAttention
from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.group import Group
from tandem.engine.kv_cache import PagedKVCache
from tandem.engine.loader import load_weights
from tandem.engine.models.layers import Placement, RMSNorm
from tandem.engine.models.ops import Ops, StepContext, TorchOps
from tandem.engine.models.transformer import Transformer
from tandem.engine.plan import Plan
from tandem.engine.runner import ModelRunner, pack
from tests.engine.model_zoo import BLOCK, FAMILIES, build, engine_config, sequence, tokens

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(
    not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: f"triton-{str(dtype)[6:]}")


@pytest.fixture
def fused() -> Ops:
    from tandem.engine.models.fused import FusedOps

    return FusedOps()


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def norm_of(size: int, dtype: torch.dtype, seed: int = 9) -> RMSNorm:
    norm = RMSNorm("norm", size, 1e-5, Placement(DEVICE, dtype, Group()))
    norm.weight = random(dtype, size, seed=seed)
    return norm


@dtypes
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 1), (2, 2049)], ids=str)
def test_add_norm(fused: Ops, dtype: torch.dtype, added: bool, shape: tuple[int, int]) -> None:
    norm, x = norm_of(shape[1], dtype), random(dtype, *shape)
    y = random(dtype, *shape, seed=1) * 3 if added else None
    wanted, normed = TorchOps().add_norm(x.clone(), y, norm)
    found, output = fused.add_norm(x, y, norm)
    close(found, wanted)
    close(output, normed)


@dtypes
@pytest.mark.parametrize("shape", [(1, 96), (3, 1), (4, 1025), (2, 3000)], ids=str)
def test_gate(fused: Ops, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = random(dtype, shape[0], 2 * shape[1]) * 4
    close(fused.gate(gate_up), TorchOps().gate(gate_up))


def written(ops: Ops, qkv: Tensor, norms: list[RMSNorm], kv: Tensor, slots: list[tuple[int, int]]) -> Tensor:
    """Queries; `kv` gets the rest. The angles are not those of positions: any will do."""
    count, half = len(qkv), kv.shape[4] // 2
    angles = random(qkv.dtype, count, 1, half, seed=5), random(qkv.dtype, count, 1, half, seed=6)
    blocks, offsets = (torch.tensor(column, device=DEVICE) for column in zip(*slots, strict=True))
    none = torch.empty(0)
    meta = AttentionMetadata(none, none, none, blocks, offsets, [], [])
    return ops.write(qkv, norms, kv, StepContext(ops, ReferenceAttention(), meta, angles))


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 32), (14, 2, 24), (1, 1, 2), (32, 8, 128), (3, 3, 80)], ids=str
)
def test_write(fused: Ops, dtype: torch.dtype, normed: bool, heads: int, kv_heads: int, head_dim: int) -> None:
    slots = [(4, 0), (1, 2), (1, 1)]
    norms = [norm_of(head_dim, dtype, seed) for seed in (3, 4)] if normed else []
    qkv = random(dtype, len(slots), (heads + 2 * kv_heads) * head_dim)
    kv = torch.full((5, 2, 2, kv_heads, 3, head_dim), float("nan"), dtype=dtype, device=DEVICE)[:, 1]
    expected = kv.clone()
    wanted = written(TorchOps(), qkv, norms, expected, slots)
    close(written(fused, qkv, norms, kv, slots), wanted)
    close(kv, expected)


def test_a_token_of_no_block_is_written_nowhere_triton(fused: Ops) -> None:
    memory = torch.zeros(3, 2, 1, 4, 8, device=DEVICE)
    kv = memory[1:]  # its block -1 would be the first of `memory`
    written(fused, random(torch.float32, 2, 24), [], kv, [(-1, 0), (1, 3)])
    assert kv[1, :, :, 3].count_nonzero() == memory.count_nonzero() == 16


class Models:
    """One family as `transformers` saved it, by plain PyTorch and by the kernels."""

    def __init__(self, name: str, directory: Path, fused: Ops, dtype: str) -> None:
        build(name, directory)
        self._plan = Plan.make(engine_config(directory, dtype=dtype, attention_backend="reference"))
        self.plain = self._runner(TorchOps(), "reference")
        self.fast = self._runner(fused, "triton")

    def _runner(self, ops: Ops, backend: str) -> ModelRunner:
        model = Transformer(self._plan.model, Placement(DEVICE, getattr(torch, self._plan.layout.dtype), Group()))
        load_weights(self._plan.checkpoint, model.slots(), None)
        model.ops = ops
        cache = PagedKVCache(self._plan.layout, 16, DEVICE)
        return ModelRunner(model, cache, create_attention(backend, DEVICE)[0])

    def step(self, *work: tuple[Any, int]) -> tuple[Tensor, Tensor]:
        packed = pack(build_batch([Scheduled(item, count) for item, count in work]), BLOCK)
        for item, count in work:
            item.computed += count
        return self.plain.forward(packed).logits, self.fast.forward(packed).logits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in FAMILIES), ("llama", "bfloat16"), ("qwen3", "bfloat16")],
    ids=lambda value: f"triton-{value}",
)
def test_families_have_the_same_logits(name: str, dtype: str, fused: Ops, tmp_path: Path) -> None:
    models = Models(name, tmp_path, fused, dtype)
    first, second = sequence(tokens(17, 1), [5, 2, 9]), sequence(tokens(7, 2), [3])
    for work in ([(first, 14)], [(first, 3), (second, 7)]):
        plain, fast = models.step(*work)
        assert plain.shape == fast.shape
    first.token_ids.append(4)
    second.token_ids.append(5)
    plain, fast = models.step((first, 1), (second, 1))
    error = (plain - fast).norm() / plain.norm()
    assert error < (1e-5 if dtype == "float32" else 0.08)  # bfloat16: as test_models.py


def test_a_cuda_model_uses_them_triton() -> None:
    from tandem.engine.models.fused import FusedOps
    from tandem.engine.models.ops import create_ops

    assert isinstance(create_ops(torch.device("cuda")), FusedOps) and isinstance(
        create_ops(torch.device("cpu")), TorchOps
    )
