"""Quantized checkpoints in every published format, and the floats that they stand for.

GPTQ, AWQ and FP8 are written by loops over single codes, after AutoGPTQ's and AutoAWQ's; compressed-tensors by its own
library. A format's writer turns the shape of a weight into the tensors behind its module's name and the floats.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]  # behind the module's name
Written = tuple[Parts, Tensor]  # and the floats, (out, in)
Writer = Callable[[int, int, torch.Generator], Written]
ROUNDING = 0.03  # relative error of logits: products with codes round activations to 8 bits; found: 0.012 to 0.020
DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Format:
    config: dict[str, Any]
    write: Writer
    grouped: bool = True  # the reader keeps codes


# --------------------------------------------------------------------------------------------------------- the writers


def integers(low: int, high: int, *shape: int, random: torch.Generator) -> list[Any]:
    return torch.randint(low, high, shape, generator=random).tolist()


def word(codes: list[int], bits: int) -> int:
    """Codes in an int32, the first in the lowest bits."""
    value = 0
    for place, code in enumerate(codes):
        value |= code << (bits * place)
    return value


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[value - (1 << 32) if value >> 31 else value for value in row] for row in rows]).int()


def written_out(codes: list[Any], zeros: list[Any], scales: Tensor, index: list[int]) -> Tensor:
    """(out, in): code - zero times scale; zeros and scales are (groups, out)."""
    differences = [
        [float(code - zeros[group][output]) for code, group in zip(row, index, strict=True)]
        for output, row in enumerate(codes)
    ]
    return torch.tensor(differences) * torch.stack([scales[group].float() for group in index], dim=1)


def gptq(bits: int, size: int, version: int = 1, order: str = "", symmetric: bool = False) -> Writer:
    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        per, width = 32 // bits, size if size > 0 else inputs
        groups = inputs // width
        index = [column // width for column in range(inputs)]
        if order == "shuffled":
            index = [index[place] for place in torch.randperm(inputs, generator=random).tolist()]
        codes = integers(0, 2**bits, outputs, inputs, random=random)
        zeros = integers(0, 2**bits, groups, outputs, random=random)
        if symmetric:
            zeros = [[2 ** (bits - 1)] * outputs for _ in range(groups)]
        scales = ((torch.rand(groups, outputs, generator=random) + 0.5) * 0.3 / 2**bits).half()
        packed = [
            [word([codes[output][row + place] for place in range(per)], bits) for output in range(outputs)]
            for row in range(0, inputs, per)
        ]
        ones = word([1] * per, bits) if version == 1 else 0
        lessened = [
            [(word(row[column : column + per], bits) - ones) % (1 << 32) for column in range(0, outputs, per)]
            for row in zeros
        ]
        parts = {"qweight": int32(packed), "qzeros": int32(lessened), "scales": scales}
        if order:
            parts["g_idx"] = torch.tensor(index).int()
        return parts, written_out(codes, zeros, scales, index)

    return write


def awq(size: int) -> Writer:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map: which output comes i-th in a word

    def pack(rows: list[list[int]]) -> Tensor:
        return int32(
            [[word([row[column + place] for place in order], 4) for column in range(0, len(row), 8)] for row in rows]
        )

    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        codes = integers(0, 16, inputs, outputs, random=random)
        zeros = integers(0, 16, inputs // size, outputs, random=random)
        scales = ((torch.rand(inputs // size, outputs, generator=random) + 0.5) * 0.02).half()
        index = [column // size for column in range(inputs)]
        floats = written_out([list(row) for row in zip(*codes, strict=True)], zeros, scales, index)
        return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, floats

    return write


def fp8(block: tuple[int, int] | None, name: str, shape: tuple[int, ...] = ()) -> Writer:
    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        stored = (torch.randn(outputs, inputs, generator=random) * 60).to(torch.float8_e4m3fn)
        if block is None:
            scale = torch.full(shape, 0.0023)
            return {"weight": stored, name: scale, "input_scale": torch.tensor(1.0)}, stored.float() * scale
        rows, columns = block
        scale = (torch.rand(-(-outputs // rows), -(-inputs // columns), generator=random) + 0.5) * 0.0025
        floats = stored.float()
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                part = floats[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
                part.mul_(scale[row, column])
        return {"weight": stored, name: scale}, floats

    return write


def compressed(layout: str, strategy: str, **settings: Any) -> Writer:
    """The library's own compressor; scales and zeros are made up, so that weights are often clipped."""

    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args: Any = QuantizationArgs.model_validate(settings | {"strategy": strategy})
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor: Any = BaseCompressor.get_value_from_registry(layout)
        shape = {"tensor": (1,), "channel": (outputs, 1), "group": (outputs, inputs // (args.group_size or 1))}
        if args.block_structure:
            rows, columns = args.block_structure
            shape["block"] = (-(-outputs // rows), -(-inputs // columns))
        level = 0.3 / 2**args.num_bits if args.type == "int" else 0.002
        parts = {
            "weight": torch.randn(outputs, inputs, generator=random) * 0.15,
            "weight_scale": (torch.rand(shape[strategy], generator=random) + 0.5) * level,
        }
        if not args.symmetric:
            zeros = torch.randint(-5, 6, shape[strategy], generator=random)
            parts["weight_zero_point"] = zeros.to(torch.int8)
        made = compressor.compress(parts, scheme)
        return made, compressor.decompress(dict(made), scheme)["weight"]

    return write


def shuffled_pack(size: int) -> Writer:
    """weight_g_idx, which the library no longer writes: the groups of another order's neighbours."""
    plain = compressed("pack-quantized", "group", num_bits=4, group_size=size)

    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        parts, floats = plain(outputs, inputs, random)
        index = torch.arange(inputs).div(size, rounding_mode="floor")[torch.randperm(inputs, generator=random)].int()
        neighbours = parts["weight_scale"].repeat_interleave(size, dim=1)
        codes = (floats / neighbours).round()
        return parts | {"weight_g_idx": index}, codes * parts["weight_scale"][:, index]

    return write


def groups(layout: str, ignore: tuple[str, ...] = ("lm_head",), **weights: Any) -> dict[str, Any]:
    """A quantization_config with the nulls that the library's files have."""
    full = {"type": "int", "symmetric": True, "group_size": None, "block_structure": None, "actorder": None} | weights
    group = {"targets": ["Linear"], "weights": full, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def compressed_format(layout: str, strategy: str, **settings: Any) -> Format:
    config = groups(layout, strategy=strategy, **settings)
    return Format(config, compressed(layout, strategy, **settings), grouped=settings.get("type") != "float")


def gptq_config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}
FORMATS = {
    "gptq-4": Format(gptq_config(4, 32), gptq(4, 32, symmetric=True)),
    "gptq-4-asymmetric": Format(gptq_config(4, 32, sym=False, checkpoint_format="gptq"), gptq(4, 32)),
    "gptq-4-v2": Format(gptq_config(4, 16, sym=False, checkpoint_format="gptq_v2"), gptq(4, 16, version=2)),
    "gptq-4-one-group": Format(gptq_config(4, -1), gptq(4, -1)),
    "gptq-4-g-idx": Format(gptq_config(4, 32, desc_act=True), gptq(4, 32, order="shuffled"), grouped=False),
    "gptq-4-trivial-g-idx": Format(gptq_config(4, 32), gptq(4, 32, order="neighbours")),
    "gptq-8": Format(gptq_config(8, 32), gptq(8, 32, symmetric=True)),
    "gptq-8-asymmetric": Format(gptq_config(8, 32, sym=False), gptq(8, 32)),
    "gptq-8-v2-g-idx": Format(
        gptq_config(8, 32, desc_act=True, format="gptq_v2"), gptq(8, 32, 2, order="shuffled"), grouped=False
    ),
    "awq": Format(AWQ_CONFIG, awq(32)),
    "awq-old-names": Format({"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "gemm"}, awq(16)),
    "fp8": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8(None, "weight_scale", (1,)),
        grouped=False,
    ),
    "fp8-scalar": Format(
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8(None, "weight_scale_inv"), grouped=False
    ),
    "fp8-blocks": Format(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        fp8((128, 128), "weight_scale_inv"),
        grouped=False,
    ),
    "fp8-cut-blocks": Format(
        {"quant_method": "fp8", "weight_block_size": [24, 40]}, fp8((24, 40), "weight_scale_inv"), grouped=False
    ),
    "pack-4-group": compressed_format("pack-quantized", "group", num_bits=4, group_size=32),
    "pack-4-asymmetric": compressed_format("pack-quantized", "group", num_bits=4, group_size=32, symmetric=False),
    "pack-4-channel": compressed_format("pack-quantized", "channel", num_bits=4, symmetric=False),
    "pack-8-channel": compressed_format("pack-quantized", "channel", num_bits=8),
    "pack-8-asymmetric": compressed_format("pack-quantized", "group", num_bits=8, group_size=16, symmetric=False),
    "pack-4-g-idx": Format(
        groups("pack-quantized", strategy="group", num_bits=4, group_size=32, actorder="group"),
        shuffled_pack(32),
        grouped=False,
    ),
    "int-channel": compressed_format("int-quantized", "channel", num_bits=8),
    "int-4-channel": compressed_format("int-quantized", "channel", num_bits=4),
    "int-tensor": compressed_format("int-quantized", "tensor", num_bits=8),
    "int-asymmetric": compressed_format("int-quantized", "channel", num_bits=8, symmetric=False),
    "float-tensor": compressed_format("float-quantized", "tensor", num_bits=8, type="float"),
    "float-channel": compressed_format("float-quantized", "channel", num_bits=8, type="float"),
    "float-block": compressed_format("float-quantized", "block", num_bits=8, type="float", block_structure=[24, 40]),
    "naive": compressed_format("naive-quantized", "channel", num_bits=8, type="float"),
}


# --------------------------------------------------------------------------------------------------------- the models


def write_both(source: Path, target: Path, form: Format, skip: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """The model of `source` with other projections: as `form` has it, and as floats."""
    quantized, floats = target / "quantized", target / "floats"
    weights = load_file(source / "model.safetensors")
    written, random = dict(weights), torch.Generator().manual_seed(11)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        if module not in skip:
            outputs, inputs = weights[name].shape
            parts, exact = form.write(outputs, inputs, random)
            weights[name] = exact.contiguous()
            del written[name]
            written |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    for path, tensors in ((quantized, written), (floats, weights)):
        path.mkdir(parents=True)
        shutil.copy(source / "config.json", path)
        save_file(tensors, path / "model.safetensors")
    edit_config(quantized, quantization_config=form.config)
    return quantized, floats


def check_near(found: Tensor, exact: Tensor) -> None:
    """But for the rounding of activations."""
    assert float((found - exact).norm() / exact.norm()) < ROUNDING


def edit_config(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
