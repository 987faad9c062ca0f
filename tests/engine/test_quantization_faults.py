"""A quantized checkpoint that cannot be read is one line that names the file and the fault, mostly before loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.common.errors import ModelError
from tandem.engine.group import Group
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tests.engine.model_zoo import build, engine_config
from tests.engine.quantized_zoo import FORMATS, QUERY, edit_config, edit_weights, write_both

SUPPORTED = "supported: awq, compressed-tensors, fp8, gptq"


def weights_of(form: str, **changes: Any) -> dict[str, Any]:
    group = FORMATS[form].config["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no method": ("gptq-4", {"quant_method": None}, f"quant_method 'missing' is not supported; {SUPPORTED}"),
    "bitsandbytes": ("gptq-4", {"quant_method": "bitsandbytes"}, f"'bitsandbytes' is not supported; {SUPPORTED}"),
    "gguf": ("gptq-4", {"quant_method": "gguf"}, f"quant_method 'gguf' is not supported; {SUPPORTED}"),
    "method a number": ("gptq-4", {"quant_method": 4}, "'quant_method' must be a string"),
    "gptq 3 bits": ("gptq-4", {"bits": 3}, "bits 3 is not supported; supported: 4, 8"),
    "gptq no bits": ("gptq-4", {"bits": None}, "'bits' must be an integer"),
    "gptq other bits": (
        "gptq-4",
        {"bits": 8},
        f"'{QUERY}.qweight' has shape [8, 64], but config.json implies [16, 64]",
    ),
    "gptq group size": ("gptq-4", {"group_size": 16}, f"'{QUERY}.qzeros' has shape [2, 8], but config.json implies [4"),
    "gptq uneven groups": ("gptq-4", {"group_size": 48}, "groups of 48 do not divide the 64 inputs of"),
    "gptq marlin": ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; supp"),
    "gptq old marlin": ("gptq-4", {"is_marlin_format": True}, "is_marlin_format True is not supported"),
    "gptq other words": ("gptq-4", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported; supported: int32"),
    "gptq no g_idx": ("gptq-4", {"desc_act": True}, f"tensor '{QUERY}.g_idx' is missing"),
    "awq 8 bits": ("awq", {"bits": 8}, "bits 8 is not supported; supported: 4"),
    "awq gemv": ("awq", {"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
    "awq llm-awq": ("awq", {"version": None, "format": "llm-awq"}, "format 'llm-awq' is not supported"),
    "awq no zeros": ("awq", {"zero_point": False}, "zero_point False is not supported"),
    "fp8 e5m2": ("fp8", {"fmt": "e5m2"}, "fmt 'e5m2' is not supported; supported: e4m3"),
    "fp8 blocks missing": ("fp8", {"weight_block_size": [32, 32]}, f"'{QUERY}.weight_scale_inv' is missing"),
    "fp8 blocks odd": ("fp8", {"weight_block_size": [32]}, "'weight_block_size' must be two lengths, not [32]"),
    "fp8 blocks zero": ("fp8", {"weight_block_size": [32, 0]}, "'weight_block_size' must be two lengths"),
    "fp8 unannounced": ("fp8-blocks", {"weight_block_size": None}, f"'{QUERY}.weight_scale_inv' has shape [1, 1], but"),
    "ct format": ("pack-4-group", {"format": "marlin-24"}, "format 'marlin-24' is not supported; supported: pack-"),
    "ct no format": ("pack-4-group", {"format": None}, "format 'missing' is not supported"),
    "ct 3 bits": ("pack-4-group", weights_of("pack-4-group", num_bits=3), "num_bits 3 is not supported"),
    "ct type": ("pack-4-group", weights_of("pack-4-group", type="float"), "type 'float' is not supported"),
    "ct strategy": ("pack-4-group", weights_of("pack-4-group", strategy="token"), "strategy 'token' is not"),
    "ct no group size": ("pack-4-group", weights_of("pack-4-group", group_size=None), "'group_size' must be an int"),
    "ct other groups": (
        "pack-4-group",
        weights_of("pack-4-group", group_size=16),
        "weight_scale' has shape [64, 2], b",
    ),
    "ct uneven": ("pack-4-group", weights_of("pack-4-group", group_size=48), "groups of 48 do not divide the 64"),
    "ct asymmetric": ("pack-4-group", weights_of("pack-4-group", symmetric=False), "weight_zero_point' is missing"),
    "ct g_idx": ("pack-4-group", weights_of("pack-4-group", actorder="group"), f"{QUERY}.weight_g_idx' is missing"),
    "ct order": ("pack-4-group", weights_of("pack-4-group", actorder=["x"]), "actorder ['x'] is not supported"),
    "ct block": ("float-block", weights_of("float-block", block_structure=None), "'block_structure' must be two"),
    "ct float zeros": ("float-block", weights_of("float-block", symmetric=False), "symmetric False is not supported"),
    "ct transform": ("pack-4-group", {"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not"),
    "ct sparse": ("pack-4-group", {"sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask' is not supp"),
    "ct not ignored": ("pack-4-group", {"ignore": []}, "'lm_head.weight_scale' is missing"),
    "ct pattern": ("pack-4-group", {"ignore": ["re:("]}, "ignore: '(' is not a pattern"),
    "ct slow pattern": ("pack-4-group", {"ignore": ["re:(a+)+$"]}, "the pattern '(a+)+$' repeats too much"),
    "ct slower pattern": ("pack-4-group", {"ignore": ["re:" + ".?" * 30]}, "repeats too much"),
    "ct groups a list": ("pack-4-group", {"config_groups": []}, "'config_groups' must be an object"),
    "ct group a list": ("pack-4-group", {"config_groups": {"W4A16": ["Linear"]}}, "'W4A16' must be an object"),
}
TENSORS: dict[str, tuple[str, str, Tensor | None, str]] = {  # form, part of QUERY, what is there instead, fault
    "gptq no scales": ("gptq-4", "scales", None, f"tensor '{QUERY}.scales' is missing"),
    "gptq no codes": ("gptq-4", "qweight", None, f"tensor '{QUERY}.qweight' is missing"),
    "gptq codes floats": ("gptq-4", "qweight", torch.ones(8, 64), "has dtype F32; supported: I32"),
    "gptq scales short": (
        "gptq-4",
        "scales",
        torch.ones(1, 64),
        "scales' has shape [1, 64], but config.json implies [2",
    ),
    "gptq g_idx short": (
        "gptq-4-g-idx",
        "g_idx",
        torch.ones(9).int(),
        "g_idx' has shape [9], but config.json implies [64",
    ),
    "awq no zeros": ("awq", "qzeros", None, f"tensor '{QUERY}.qzeros' is missing"),
    "awq turned": (
        "awq",
        "qweight",
        torch.ones(8, 64).int(),
        "qweight' has shape [8, 64], but config.json implies [64",
    ),
    "fp8 no scale": ("fp8", "weight_scale", None, f"tensor '{QUERY}.weight_scale' is missing"),
    "fp8 wrong scale": (
        "fp8-blocks",
        "weight_scale_inv",
        torch.ones(2, 1),
        "has shape [2, 1], but config.json implies [1",
    ),
    "fp8 scale ints": ("fp8", "weight_scale", torch.ones(1).int(), "has dtype I32; supported: F32, F16, BF16"),
    "fp8 no weight": ("fp8", "weight", None, f"tensor '{QUERY}.weight' is missing"),
    "ct no scale": ("pack-4-group", "weight_scale", None, f"tensor '{QUERY}.weight_scale' is missing"),
    "ct no codes": ("pack-4-group", "weight_packed", None, f"tensor '{QUERY}.weight_packed' is missing"),
    "ct short": (
        "pack-4-group",
        "weight_packed",
        torch.ones(64, 7).int(),
        "has shape [64, 7], but config.json implies [64",
    ),
    "ct zeros": ("pack-4-asymmetric", "weight_zero_point", torch.ones(64, 2).int(), "has shape [64, 2], but config"),
    "int zeros": ("int-asymmetric", "weight_zero_point", torch.ones(64, 1), "has dtype F32; supported: I8"),
    "int floats": ("int-channel", "weight", torch.ones(64, 64), "has dtype F32; supported: I8"),
}


def fault_of(directory: Path, action: Callable[[Path], object] = lambda path: Plan.make(engine_config(path))) -> str:
    with pytest.raises(ModelError) as caught:
        action(directory)
    assert "\n" not in caught.value.message and str(directory) in caught.value.message
    return caught.value.message


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """A fresh copy of the Llama in one format."""
    made: dict[str, Path] = {}
    plain = tmp_path_factory.mktemp("plain")
    build("llama", plain)

    def copy(name: str, target: Path) -> Path:
        if name not in made:
            made[name], _ = write_both(plain, tmp_path_factory.mktemp("made") / name, FORMATS[name])
        return Path(shutil.copytree(made[name], target / "copy"))

    return copy


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_supported(written: Callable[[str, Path], Path], tmp_path: Path, name: str) -> None:
    form, changes, fault = CONFIGS[name]
    path = written(form, tmp_path)
    edit_config(path, quantization_config=FORMATS[form].config | changes)
    assert fault in fault_of(path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit(written: Callable[[str, Path], Path], tmp_path: Path, name: str) -> None:
    form, part, value, fault = TENSORS[name]
    path = written(form, tmp_path)
    key = f"{QUERY}.{part}"
    edit_weights(path, lambda tensors: tensors.pop(key) if value is None else tensors.update({key: value}))
    assert fault in fault_of(path)


@pytest.mark.parametrize(("form", "part"), [("gptq-4-g-idx", "g_idx"), ("pack-4-g-idx", "weight_g_idx")])
@pytest.mark.parametrize("value", [-1, 2, 1 << 30])
def test_groups_out_of_range(
    written: Callable[[str, Path], Path], tmp_path: Path, form: str, part: str, value: int
) -> None:
    """Headers cannot show it, so loading does."""
    path = written(form, tmp_path)
    edit_weights(path, lambda tensors: tensors[f"{QUERY}.{part}"].__setitem__(5, value))
    fault = fault_of(path, lambda path: Rank.load(Plan.make(engine_config(path)), Group()))
    assert f"model.safetensors: tensor '{QUERY}.{part}' has the groups" in fault and "but there are 2" in fault


def test_codes_without_a_config(written: Callable[[str, Path], Path], tmp_path: Path) -> None:
    for form, fault in (("gptq-4", "is missing"), ("fp8", "has dtype F8_E4M3; supported: F32, F16, BF16")):
        path = written(form, tmp_path / form)
        edit_config(path, quantization_config=None)
        assert f"'{QUERY}.weight' {fault}" in fault_of(path)
