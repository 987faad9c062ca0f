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
INT32, INT64, FLOAT32 = "*i32", "*i64", "*fp32"
WHERE = {"query_start": INT32, "context_lens": INT32}
PARTS = {"part_values": FLOAT32, "part_maxima": FLOAT32, "part_sums": FLOAT32}


@pytest.mark.timeout(300)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="test_attention.py runs them itself")
def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("test_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "triton"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > len(CASES)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_hopper_without_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that the default will change
    from tandem.engine.kernels import kv_write, paged_attention

    pointer = f"*{dtype}"
    tensors = {"query": pointer, "kv": pointer, "output": pointer, "tables": INT32, **WHERE}
    sizes = {"ROWS": 16, "DIM": 64, "TILE": 32}
    compile_kernel(
        kv_write._write_kernel,
        {"key": pointer, "value": pointer, "kv": pointer, "blocks": INT64, "offsets": INT64},
        {"HEADS": 2, "DIM": 64},
    )
    compile_kernel(paged_attention._chunk_kernel, tensors, {"GROUP": 2, **sizes})
    compile_kernel(paged_attention._split_kernel, {**tensors, **PARTS}, {"SPLIT": 256, **sizes})
    compile_kernel(paged_attention._combine_kernel, {**tensors, **PARTS}, {"DIM": 64, "SPLIT": 256})


def compile_kernel(kernel, tensors: Mapping[str, str], constants: Mapping[str, int]) -> None:
    """To machine code for sm_90; what is neither tensor nor constant is an integer, but for the scale."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        **dict.fromkeys(kernel.arg_names, "i32"),
        "scale": "fp32",
        **tensors,
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
