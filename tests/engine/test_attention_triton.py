"""Triton's kernels where there is no GPU: their results in Triton's interpreter, and that they compile for one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.engine.attention_cases import CASES

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_BYTES = 227 << 10  # of an SM of Hopper
INT32, INT64, FLOAT32 = "*i32", "*i64", "*fp32"
WHERE = {"query_start": INT32, "context_lens": INT32}
PARTS = {"part_values": FLOAT32, "part_maxima": FLOAT32, "part_sums": FLOAT32}


@pytest.mark.timeout(300)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the files run them themselves")
@pytest.mark.parametrize(
    ("file", "least"), [("test_attention.py", len(CASES)), ("test_fused.py", 30), ("test_graphs.py", 5)]
)
def test_kernels_agree_with_the_reference_in_the_interpreter(file: str, least: int) -> None:
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "triton"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > least


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_hopper_without_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that the default will change
    from tandem.engine.kernels import paged_attention

    pointer = f"*{dtype}"
    tensors = {"query": pointer, "kv": pointer, "output": pointer, "tables": INT32, **WHERE}
    sizes = {"DIM": 128, "TILE": 64 if dtype == "bf16" else 32}
    rows, warps = (128, 8) if dtype == "bf16" else (64, 4)
    compile_kernel(paged_attention._chunk_kernel, tensors, {"GROUP": 4, "ROWS": rows, **sizes}, warps)
    compile_kernel(paged_attention._split_kernel, {**tensors, **PARTS}, {"SPLIT": 256, "ROWS": 16, **sizes})
    compile_kernel(paged_attention._combine_kernel, {**tensors, **PARTS}, {"DIM": 128, "SPLIT": 256})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flag", [False, True])
def test_fused_kernels_compile_for_hopper_without_a_gpu(
    dtype: str, flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from tandem.engine.kernels import fused

    pointers = dict.fromkeys(("x", "y", "weight", "output", "qkv", "query", "kv", "gate_up"), f"*{dtype}")
    pointers |= dict.fromkeys(("cosines", "sines", "query_weight", "key_weight"), f"*{dtype}")
    pointers |= {"blocks": INT64, "offsets": INT64}
    compile_kernel(fused._add_norm_kernel, pointers, {"ADD": flag, "SIZE": 4096}, 8)
    compile_kernel(fused._write_kernel, pointers, {"NORM": flag, "HEADS": fused.HEADS, "HALF": 64})
    compile_kernel(fused._gate_kernel, pointers, {"TILE": fused.TILE})


def compile_kernel(kernel, tensors: Mapping[str, str], constants: Mapping[str, int], warps: int = 4) -> None:
    """To machine code for sm_90 that fits an SM's shared memory; what is neither tensor nor constant is an integer,
    but for the scale and epsilon."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        **dict.fromkeys(kernel.arg_names, "i32"),
        "scale": "fp32",
        "eps": "fp32",
        **tensors,
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES
