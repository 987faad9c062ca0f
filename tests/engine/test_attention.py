"""Every backend computes the same attention, and leaves alone what is not its business.

Triton's kernels run on the GPU where there is one. Elsewhere they need Triton's interpreter, which is chosen when
triton is imported: test_attention_triton.py runs this file once more for them, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.common.errors import ConfigError
from tandem.engine.attention import BACKENDS, create_attention
from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tests.engine.attention_cases import CASES, Case, Inputs, make_inputs

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = HAS_CUDA or os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    return torch.device("cuda") if name == "triton" and HAS_CUDA else CPU


def create(name: str) -> AttentionBackend:
    return create_attention(name, device_of(name))[0]


RUNNABLE = [name for name in BACKENDS if name != "triton" or HAS_TRITON]
backends = pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "reference"])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(name: str, case: Case, inputs: Inputs) -> Tensor:
    """What `name` computes; `inputs.kv` is left as it leaves it."""
    backend, device, meta = create(name), device_of(name), inputs.meta
    kv = inputs.kv.to(device)
    moved = AttentionMetadata(
        meta.query_start.to(device),
        meta.context_lens.to(device),
        meta.block_tables.to(device),
        meta.slot_blocks.to(device),
        meta.slot_offsets.to(device),
        meta.query_lens,
        meta.context_lens_host,
    )
    backend.write(kv, inputs.key.to(device), inputs.value.to(device), moved)
    output = backend.attend(inputs.query.to(device), kv, moved, case.scale, case.window)
    inputs.kv.copy_(kv)
    return output.cpu()


def dense_attention(case: Case, inputs: Inputs) -> Tensor:
    """The same without a cache: PyTorch's own attention over each sequence, with a mask written out cell by cell."""
    outputs, start = [], 0
    for (length, context), kv in zip(case.lengths, inputs.dense, strict=True):
        key, value = kv.float().transpose(1, 2).repeat_interleave(case.heads // case.kv_heads, dim=1)
        query = inputs.query[start : start + length].float().transpose(0, 1)
        start += length
        window = case.window or context
        mask = torch.tensor(
            [[at - window < seen <= at for seen in range(context)] for at in range(context - length, context)]
        )
        dense = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask, scale=case.scale)
        outputs.append(dense[0].transpose(0, 1))
    return torch.cat(outputs).to(case.dtype)


@cases
def test_reference_agrees_with_dense_attention(case: Case) -> None:
    inputs = make_inputs(case)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(
        run("reference", case, inputs), dense_attention(case, inputs), atol=tolerance, rtol=tolerance
    )


@backends
@cases
def test_backend_agrees_with_reference(name: str, case: Case) -> None:
    inputs, expected = make_inputs(case), make_inputs(case)
    output = run(name, case, inputs)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(output, run("reference", case, expected), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(inputs.kv, expected.kv, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", RUNNABLE)
def test_write_stores_each_token_in_its_slot_and_nothing_else(name: str) -> None:
    case = CASES["ragged"]
    inputs, before = make_inputs(case), make_inputs(case).kv
    run(name, case, inputs)
    blocks, offsets = inputs.meta.slot_blocks, inputs.meta.slot_offsets
    assert torch.equal(inputs.kv[blocks, 0, :, offsets], inputs.key)
    assert torch.equal(inputs.kv[blocks, 1, :, offsets], inputs.value)
    for kv in (before, inputs.kv):
        kv[blocks, :, :, offsets] = 0.0
    torch.testing.assert_close(inputs.kv, before, atol=0, rtol=0, equal_nan=True)


@backends
@pytest.mark.parametrize("window", [None, 5])
def test_a_sequence_does_not_depend_on_its_neighbours(name: str, window: int | None) -> None:
    case = Case(((1, 300), (6, 20), (1, 17)), window=window)
    together = make_inputs(case)
    expected = run(name, case, together)
    for row, (start, end) in enumerate(((0, 1), (1, 7), (7, 8))):
        meta = together.meta
        alone = AttentionMetadata(
            torch.tensor([0, end - start], dtype=torch.int32),
            meta.context_lens[row : row + 1],
            meta.block_tables[row : row + 1],
            meta.slot_blocks[start:end],
            meta.slot_offsets[start:end],
            [end - start],
            [meta.context_lens_host[row]],
        )
        query, key, value = (part[start:end] for part in (together.query, together.key, together.value))
        output = run(name, case, Inputs(query, key, value, together.kv, alone, []))
        assert torch.equal(output, expected[start:end])


def test_the_model_s_device_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, why = create_attention("auto", CPU)
    assert (backend.name, why) == ("native", "the model is on the CPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend, why = create_attention("auto", torch.device("cuda"))
    assert backend.name == "reference"
    assert "triton" in why


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_backend_has_the_name_it_is_chosen_by(name: str) -> None:
    assert create(name).name == name


@pytest.mark.parametrize(
    ("name", "device", "fault"),
    [
        ("flash", "cpu", "unknown attention backend 'flash'"),
        ("cpu", "cuda", "computes on the CPU, but the model is on cuda"),
        ("native", "cuda", "kernels run on the CPU, but the model is on cuda"),
        ("triton", "cpu", "need a CUDA device, but the model is on cpu"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    name: str, device: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as caught:
        create_attention(name, torch.device(device))
    assert fault in str(caught.value)
    assert "supported are auto, cpu, native, reference, triton" in str(caught.value)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        create_attention("triton", torch.device("cuda"))


def test_a_backend_not_chosen_is_not_imported() -> None:
    code = "import sys, tandem.engine.sampler, tandem.engine.attention.cpu; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
