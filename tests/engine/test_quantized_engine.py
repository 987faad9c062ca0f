"""`--quantization`: the engine computes what transformers computes from weights that went through the same codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.engine import Engine
from tandem.engine.group import Group
from tandem.engine.plan import Plan
from tandem.engine.quantization.grouped import GroupedWeight, quantize
from tandem.engine.rank import Rank
from tandem.engine.runner import pack
from tests.engine.model_zoo import (
    BLOCK,
    build,
    engine_config,
    generate,
    oracle_generate,
    oracle_logits,
    sequence,
    tokens,
)

FAMILIES = ("llama-biases-tied", "qwen2", "qwen3")


def rounded(model: Any, bits: int) -> Any:
    """`model` with every projection replaced by what its codes are worth, its inputs rounded to 8 bits.

    A tied embedding keeps its own weights.
    """
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                found = kept(quantize(layer.weight, 8 if name == "lm_head" else bits))
                layer.weight = torch.nn.Parameter(found.dequantize())
                layer.register_forward_pre_hook(lambda _, inputs: (rounded_inputs(inputs[0]),))
    return model


def kept(weight: GroupedWeight) -> GroupedWeight:
    """As the kernels keep it: zeros and scales in 16 bits, but a row's only scale as it is."""
    scales = weight.scales.half().float() if weight.scales.shape[1] > 1 else weight.scales
    return replace(weight, scales=scales, zeros=weight.zeros.bfloat16().float())


def rounded_inputs(x: Tensor) -> Tensor:
    """Of every 32 neighbours, to 127ths of the largest."""
    blocks = x.unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scales).round().mul(scales).flatten(-2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_logits_are_those_of_the_rounded_weights(name: str, quantization: str, bits: int, tmp_path: Path) -> None:
    oracle = rounded(build(name, tmp_path), bits)
    rank = Rank.load(Plan.make(engine_config(tmp_path, quantization=quantization)), Group())
    item = sequence(tokens(30, 1), [3, 1, 2, 0])
    logits = rank.runner.forward(pack(build_batch([Scheduled(item, 30)]), BLOCK)).logits
    assert (logits[0] - oracle_logits(oracle, item.token_ids)[-1]).abs().max() < 2e-4


def test_tokens_are_those_of_the_rounded_weights(tmp_path: Path) -> None:
    oracle = rounded(build("llama", tmp_path), 8)
    engine = Engine.load(engine_config(tmp_path, quantization="int8"))
    prompts = [tokens(count, count) for count in (3, 17, 40)]
    assert generate(engine, prompts, 12) == [oracle_generate(oracle, prompt, 12) for prompt in prompts]
    engine.close()


def test_other_weights_make_another_kv_layout(tmp_path: Path) -> None:
    """A prefill and a decode worker that hold different weights must not exchange KV."""
    build("llama", tmp_path)
    kinds = (None, "int8", "int4")
    revisions = {Plan.make(engine_config(tmp_path, quantization=kind)).layout.revision for kind in kinds}
    assert len(revisions) == len(kinds)
