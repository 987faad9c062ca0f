"""FP8 (e4m3): weights against float64, KV caches against the same attention over what they hold, both by every kernel.

On the GPU where there is one, else by PyTorch's products on the CPU and in Triton's interpreter, in which the last
test runs this file once more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.attention import create_attention
from tandem.engine.attention.base import AttentionMetadata
from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.group import Group
from tandem.engine.kv_cache import PagedKVCache
from tandem.engine.loader import fill_random, load_weights
from tandem.engine.models.layers import ColumnLinear, Placement, RMSNorm
from tandem.engine.models.ops import Ops, StepContext, TorchOps
from tandem.engine.models.transformer import Transformer
from tandem.engine.plan import Plan
from tandem.engine.quantization import float8
from tandem.engine.quantization.float8 import Float8Weight, quantize
from tandem.engine.runner import ModelRunner, pack
from tests.engine.attention_cases import CASES, Case, Inputs, make_inputs
from tests.engine.model_zoo import BLOCK, build, engine_config, oracle_logits, sequence, tokens

HAS_CUDA = torch.cuda.is_available() and float8.has_float8(torch.device("cuda"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, CPU = torch.device("cuda" if HAS_CUDA else "cpu"), torch.device("cpu")
SMALLEST = 2.0**-9  # e4m3's; steps below its normal numbers are as large
SHAPES = [(1, 16), (48, 96), (32, 1040)]
needs_triton = pytest.mark.skipif(not HAS_CUDA and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@pytest.fixture(autouse=True)
def sound_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter loses the carry when it rounds to FP8 (127 becomes 64, not 128), and NaN."""
    if INTERPRETED:
        from triton import language
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def sound(data, source, target, mode):
            if (source, target) == (language.float32, language.float8e4nv):
                return torch.tensor(data).to(float8.DTYPE).view(torch.uint8).numpy()
            return convert(data, source, target, mode)

        monkeypatch.setattr(interpreter, "_convert_float", sound)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype == float8.DTYPE
    assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_each_weight_is_near(shape: tuple[int, int], size: float) -> None:
    weight = normal(*shape) * size
    weight[0, 3] *= 1000  # an outlier takes steps from its own row only
    held = Float8Weight.empty(*shape, DEVICE)
    held.copy_(weight)
    step = held.scales.double() * SMALLEST
    error = (held.dequantize().double() - weight.double()).abs()
    assert bool((error <= torch.maximum(weight.double().abs() / 16, step / 2) * 1.000001).all())
    assert held.dequantize().abs().amax(1).allclose(weight.abs().amax(1)), "the largest of a row is exact"


def test_scales_that_were_of_blocks_cost_another_rounding_and_no_more() -> None:
    codes, blocks = (normal(64, 256) * 60).to(float8.DTYPE), torch.rand(2, 2).to(DEVICE) + 0.5
    exact = codes.double() * blocks.double().repeat_interleave(32, 0).repeat_interleave(128, 1)
    held = Float8Weight.empty(64, 256, DEVICE)
    held.copy_(exact.float())
    error = (held.dequantize().double() - exact).abs()
    assert bool((error <= torch.maximum(exact.abs() / 16, held.scales.double() * SMALLEST / 2) * 1.000001).all())
    assert float(error.norm() / exact.norm()) > 0.005, "it is not free"


def test_codes_with_a_scale_for_each_output_are_kept_bit_by_bit() -> None:
    codes, scales = (normal(32, 48) * 60).to(float8.DTYPE), torch.rand(32, 1).to(DEVICE)
    held = Float8Weight.empty(32, 48, DEVICE)
    held.copy_(Float8Weight(codes, scales))
    same_bits(held.codes, codes)
    assert torch.equal(held.scales, scales)
    same_bits(held.rows(8, 24).columns(16, 32).codes, codes[8:24, 16:32])


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_that_of_the_rounded_numbers(shape: tuple[int, int], biased: bool) -> None:
    """The device's own product against float64, which tells quantization's error from arithmetic's."""
    dtype = torch.bfloat16
    weight, x = normal(*shape, dtype=dtype), normal(7, shape[1], seed=1, dtype=dtype) * 30
    bias = normal(shape[0], seed=2, dtype=dtype) if biased else None
    held = Float8Weight.empty(*shape, DEVICE)
    held.copy_(weight)
    found = held.product(x, bias).double()
    rounded = emulated(held, x.double(), bias)
    torch.testing.assert_close(found, rounded, rtol=1e-2, atol=1e-3 * float(rounded.abs().max()))
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    assert float((found - exact).norm() / exact.norm()) < 0.05  # two roundings of 1/16 at most, 2.5 % each on average


def test_what_is_not_finite_stays_so_in_its_row() -> None:
    x = normal(4, 32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    held = Float8Weight.empty(16, 32, DEVICE)
    held.copy_(normal(16, 32, seed=1))
    finite = held.product(x.bfloat16(), None).isfinite()
    assert finite[[0, 3]].all() and not finite[[1, 2]].any()


def test_a_row_of_zeros_is_zero() -> None:
    held = Float8Weight.empty(16, 32, DEVICE)
    held.copy_(torch.zeros(16, 32))
    assert held.dequantize().count_nonzero() == 0
    assert held.product(torch.zeros(2, 32, device=DEVICE, dtype=torch.bfloat16), None).count_nonzero() == 0


def everywhere(name: str) -> bool:
    return True


def model(directory: Path, in_float8: Callable[[str], bool], rank: int = 0, world: int = 1) -> tuple[Plan, Transformer]:
    plan = Plan.make(engine_config(directory, dtype="bfloat16", attention_backend="reference", device=DEVICE.type))
    made = Transformer(plan.model, Placement(DEVICE, torch.bfloat16, Group(rank, world), in_float8))
    load_weights(plan.checkpoint, made.slots(), None)
    return plan, made


@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen3"])
def test_a_whole_model_computes_what_its_rounded_numbers_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = build(name, tmp_path)
    plan, held = model(tmp_path, everywhere)
    assert all(isinstance(linear.float8, Float8Weight) for layer in held.layers for linear in linears(layer))
    attention = create_attention("reference", DEVICE)[0]
    runner = ModelRunner(held, PagedKVCache(plan.layout, 8, DEVICE), attention)
    prompt = tokens(30, 3)
    found = runner.forward(pack(build_batch([Scheduled(sequence(prompt, [1, 2, 3, 4]), 30)]), BLOCK)).logits[0].cpu()
    monkeypatch.setattr(Float8Weight, "product", emulated)
    wanted = runner.forward(pack(build_batch([Scheduled(sequence(prompt, [1, 2, 3, 4]), 30)]), BLOCK)).logits[0].cpu()
    assert float((found - wanted).norm() / wanted.norm()) < 0.1  # two computations in bfloat16
    original = oracle_logits(oracle, prompt)[-1]
    assert 0.02 < float((found - original).norm() / original.norm()) < 0.3  # random models amplify every rounding


def emulated(held: Float8Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """Float8Weight.product in float64."""
    codes, scales = quantize(x)
    rounded = (codes.double() * scales) @ held.dequantize().double().t()
    return (rounded if bias is None else rounded + bias).to(x.dtype)


def linears(layer) -> tuple:
    return layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down


def test_each_rank_holds_its_share(tmp_path: Path) -> None:
    """Of the outputs with their scales, or of the inputs with scales of its own."""
    build("llama", tmp_path)
    plain = linears(model(tmp_path, lambda name: False)[1].layers[0])
    ranks = [linears(model(tmp_path, everywhere, rank, 2)[1].layers[0]) for rank in (0, 1)]
    for index, (whole, *shares) in enumerate(zip(plain, *ranks, strict=True)):
        if index % 2:
            joined = torch.cat([share.float8.dequantize() for share in shares], dim=1)
            wanted = whole.weight
        else:
            joined = shares[0].float8.dequantize()
            wanted = torch.cat([part.chunk(2)[0] for part in whole.weight.split([size for _, size in whole.parts])])
        error = (joined - wanted.float()).abs()
        assert bool((error <= wanted.float().abs() / 15 + 1e-3).all())


def test_only_the_chosen_weights_are_held_so_and_only_in_shapes_that_multiply() -> None:
    place = Placement(DEVICE, torch.bfloat16, Group(), lambda name: name in ("a.weight", "b.weight"))
    assert isinstance(ColumnLinear([("a", 16), ("b", 16)], 32, False, place).float8, Float8Weight)
    assert ColumnLinear([("a", 16), ("c", 16)], 32, False, place).float8 is None
    assert ColumnLinear([("a", 16), ("b", 8)], 32, False, place).float8 is None
    assert ColumnLinear([("a", 16), ("b", 16)], 40, False, place).float8 is None


def test_random_weights_fill_them() -> None:
    place = Placement(DEVICE, torch.bfloat16, Group(), everywhere)
    linear, plain = (
        ColumnLinear([("a", 32)], 64, False, where) for where in (place, Placement(DEVICE, place.dtype, Group()))
    )
    for filled in (linear, plain):
        fill_random(filled.slots(), 3)
    assert isinstance(linear.float8, Float8Weight)
    assert float((linear.float8.dequantize() - plain.weight.float()).norm() / plain.weight.float().norm()) < 0.04


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES, (3, 100), (2, 3000)], ids=lambda shape: f"triton-{shape}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_quantizes_as_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from tandem.engine.kernels import fused

    x = normal(*shape, dtype=dtype) * 50
    x[0] = 0
    (codes, scales), (wanted, expected) = fused.quantize(x), quantize(x)
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)
    differs = codes.float() != wanted.float()  # a division that is not the last bit's equal may round to the other side
    assert float(differs.float().mean()) < 0.001 and codes.float().allclose(wanted.float(), rtol=0.13, atol=SMALLEST)


# --------------------------------------------------------------------------------------------------------- KV caches


def stored(kv: Tensor) -> Tensor:
    return kv.clamp(-448, 448).to(float8.DTYPE)


def run(name: str, case: Case, inputs: Inputs, kv: Tensor) -> Tensor:
    """What the backend computes; `kv` is left as it leaves it."""
    device = DEVICE if name == "triton" else CPU
    backend, _ = create_attention(name, device, float8=True)
    meta, cache = on(device, inputs.meta), kv.to(device)
    backend.write(cache, inputs.key.to(device), inputs.value.to(device), meta)
    output = backend.attend(inputs.query.to(device), cache, meta, case.scale, case.window)
    kv.copy_(cache)
    return output.cpu()


def on(device: torch.device, meta: AttentionMetadata) -> AttentionMetadata:
    names = ("query_start", "context_lens", "block_tables", "slot_blocks", "slot_offsets")
    return replace(meta, **{name: getattr(meta, name).to(device) for name in names})


KV_CASES = (
    "decodes", "ragged", "long-window", "groups-of-7", "head-dim-80", "head-dim-256", "window-5", "bf16",
    "bf16-head-dim-128-blocks-of-16", "fp16",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", KV_CASES)
def test_backends_attend_to_what_the_cache_holds(backend: str, name: str) -> None:
    """The same as over a cache in the model's dtype that holds the rounded values."""
    case = CASES[name]
    inputs, widened = make_inputs(case), make_inputs(case)
    narrow = stored(inputs.kv)
    found = run(backend, case, inputs, narrow)
    meta, plain = widened.meta, create_attention("reference", CPU)[0]
    wide = stored(widened.kv).to(case.dtype)
    for part, values in enumerate((widened.key, widened.value)):
        wide[meta.slot_blocks, part, :, meta.slot_offsets] = stored(values).to(case.dtype)
    wanted = plain.attend(widened.query, wide, meta, case.scale, case.window)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[case.dtype]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(narrow.float(), wide.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=needs_triton)])
def test_attention_is_near_that_of_a_cache_in_float32(backend: str) -> None:
    case = CASES["ragged"]
    inputs, exact = make_inputs(case), make_inputs(case)
    found = run(backend, case, inputs, stored(inputs.kv))
    plain = create_attention("reference", CPU)[0]
    plain.write(exact.kv, exact.key, exact.value, exact.meta)
    wanted = plain.attend(exact.query, exact.kv, exact.meta, case.scale, case.window)
    assert 0.005 < float((found - wanted).norm() / wanted.norm()) < 0.05


LIMITS = [448.0, 449.0, 500.0, 6e4, float("inf")]  # and the negative ones


def test_a_write_saturates_and_keeps_nan() -> None:
    values = torch.tensor([*LIMITS, *(-value for value in LIMITS), float("nan"), 447.0, 0.0011, 0.0009])
    key = values.view(1, 1, -1)
    kv = torch.zeros(2, 2, 1, 4, len(values), dtype=float8.DTYPE)
    none = torch.empty(0)
    meta = AttentionMetadata(none, none, none, torch.tensor([1]), torch.tensor([2]), [], [])
    create_attention("reference", CPU)[0].write(kv, key, -key, meta)
    wanted = torch.tensor([448.0] * 5 + [-448.0] * 5 + [float("nan"), 448.0, SMALLEST, 0.0])
    torch.testing.assert_close(kv[1, 0, 0, 2].float(), wanted, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(kv[1, 1, 0, 2].float(), -wanted, equal_nan=True, rtol=0, atol=0)
    kv[1, :, :, 2] = 0
    assert kv.float().count_nonzero() == 0


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: f"triton-{dtype}")
@pytest.mark.parametrize("size", [1.0, 400.0], ids=["triton-usual", "triton-saturating"])
def test_the_fused_write_is_the_plain_one(dtype: torch.dtype, size: float) -> None:
    from tandem.engine.models.fused import FusedOps

    heads, kv_heads, dim, slots = 6, 2, 24, [(4, 0), (1, 2), (1, 1)]
    norm = RMSNorm("norm", dim, 1e-5, Placement(DEVICE, dtype, Group()))
    norm.weight = normal(dim, seed=3, dtype=dtype).abs() * size
    qkv = normal(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    qkv[:, (heads + kv_heads) * dim :] *= size
    fast, plain = (torch.zeros(5, 2, 2, kv_heads, 3, dim, dtype=float8.DTYPE, device=DEVICE)[:, 1] for _ in range(2))
    query, wanted = (written(ops, qkv, norm, kv, slots) for ops, kv in ((FusedOps(), fast), (TorchOps(), plain)))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(query, wanted, rtol=tolerance, atol=tolerance * size)
    assert query.dtype == dtype and bool((query.to(float8.DTYPE).to(dtype) != query).any()), "queries are not in FP8"
    torch.testing.assert_close(fast.float(), plain.float(), rtol=0.13, atol=SMALLEST * size)  # one step of e4m3
    differs = float((fast.float() != plain.float()).float().mean())
    assert differs < (0.001 if dtype == torch.float32 else 0.05)
    assert bool((plain.float().abs() == 448).any()) == (size > 1)


def written(ops: Ops, qkv: Tensor, norm: RMSNorm, kv: Tensor, slots: list[tuple[int, int]]) -> Tensor:
    half = kv.shape[4] // 2
    angles = (normal(3, 1, half, seed=5, dtype=qkv.dtype), normal(3, 1, half, seed=6, dtype=qkv.dtype))
    blocks, offsets = (torch.tensor(column, device=DEVICE) for column in zip(*slots, strict=True))
    none = torch.empty(0)
    meta = AttentionMetadata(none, none, none, blocks, offsets, [], [])
    attention = create_attention("reference", DEVICE)[0]
    return ops.write(qkv, [norm, norm], kv, StepContext(ops, attention, meta, angles))


def test_auto_chooses_a_backend_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, why = create_attention("auto", CPU, float8=True)
    assert backend.name == "cpu" and "FP8" in why
    with pytest.raises(ConfigError, match="'native' cannot run here: its kernels do not read a KV cache in FP8"):
        create_attention("native", CPU, float8=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"'triton' cannot run here: .* capability 8\.9 or newer"):
        create_attention("auto", torch.device("cuda"), float8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert create_attention("auto", torch.device("cuda"), float8=True)[0].name == "triton"


# ------------------------------------------------------------------------------------------------ Triton, without GPU


@pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="the interpreter compiles nothing"
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_hopper(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from tandem.engine.kernels import fused, paged_attention
    from tests.engine.test_attention_triton import FLOAT32, INT32, INT64, PARTS, WHERE, compile_kernel

    narrow, wide = "*fp8e4nv", f"*{dtype}"
    tensors = {"query": wide, "kv": narrow, "output": wide, "tables": INT32, **WHERE}
    sizes = {"DIM": 128, "TILE": 64 if dtype == "bf16" else 32}
    rows, warps = (128, 8) if dtype == "bf16" else (64, 4)
    compile_kernel(paged_attention._chunk_kernel, tensors, {"GROUP": 4, "ROWS": rows, **sizes}, warps)
    compile_kernel(paged_attention._split_kernel, {**tensors, **PARTS}, {"SPLIT": 256, "ROWS": 16, **sizes})
    pointers = dict.fromkeys(("qkv", "query", "cosines", "sines", "query_weight", "key_weight", "x"), wide)
    pointers |= {"kv": narrow, "codes": narrow, "scales": FLOAT32, "blocks": INT64, "offsets": INT64}
    compile_kernel(fused._write_kernel, pointers, {"NORM": True, "HEADS": fused.HEADS, "HALF": 64})
    compile_kernel(fused._quantize_kernel, pointers, {"SIZE": 4096}, 8)
    compile_kernel(fused._quantize_kernel, pointers, {"SIZE": 16384}, 16)


@pytest.mark.timeout(300)
@pytest.mark.skipif(INTERPRETED or HAS_CUDA or importlib.util.find_spec("triton") is None, reason="they run above")
def test_kernels_agree_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 25
