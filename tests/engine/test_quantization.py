"""Weights in 4 and 8 bits: what they stand for, how they are cut, and how much they lose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.quantization.grouped import GroupedWeight, quantize
from tests.engine.model_zoo import build, oracle_logits, tokens

ROWS, COLUMNS = 40, 192


def normal(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy(seed: int = 1) -> Tensor:
    """Student's t with 3 degrees of freedom: a normal over the root of the mean of three squares."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(3, ROWS, COLUMNS, generator=generator).square().mean(0).sqrt()
    return torch.randn(ROWS, COLUMNS, generator=generator) / spread * 0.02


def error(weight: Tensor, found: GroupedWeight) -> float:
    return float((found.dequantize() - weight).norm() / weight.norm())


def rounded(weight: Tensor, size: int) -> Tensor:
    """Each group's range in 15 equal steps, the textbook's way."""
    made = weight.clone()
    for row in made:
        for group in row.split(size):
            low, step = group.min(), (group.max() - group.min()) / 15
            group.copy_(((group - low) / step).round() * step + low)
    return made


def made_up(bits: int, size: int) -> GroupedWeight:
    generator = torch.Generator().manual_seed(7)
    groups = COLUMNS // size
    return GroupedWeight(
        codes=torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8),
        scales=torch.rand(ROWS, groups, generator=generator) + 0.1,
        zeros=torch.rand(ROWS, groups, generator=generator) * 9,
        group_size=size,
        bits=bits,
    )


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 64), (8, COLUMNS)])
def test_a_weight_is_its_code_less_the_zero_times_the_scale(bits: int, size: int) -> None:
    weight = made_up(bits, size)
    found = weight.dequantize()
    assert found.shape == weight.shape == (ROWS, COLUMNS) and found.dtype == torch.float32
    for row in range(0, ROWS, 7):
        for column in range(0, COLUMNS, 5):
            group = column // size
            code = float(weight.codes[row, column])
            assert found[row, column] == (code - weight.zeros[row, group]) * weight.scales[row, group]


class TestCutting:
    @pytest.mark.parametrize("size", [32, COLUMNS])
    def test_rows_and_columns(self, size: int) -> None:
        weight = made_up(4, size)
        whole = weight.dequantize()
        assert torch.equal(weight.rows(8, 21).dequantize(), whole[8:21])
        assert torch.equal(weight.columns(64, 160).dequantize(), whole[:, 64:160])
        assert torch.equal(weight.columns(64, 160).rows(3, 4).dequantize(), whole[3:4, 64:160])

    def test_a_row_that_is_one_group_is_cut_anywhere(self) -> None:
        weight = made_up(8, COLUMNS)
        assert torch.equal(weight.columns(13, 50).dequantize(), weight.dequantize()[:, 13:50])

    @pytest.mark.parametrize(("start", "stop"), [(0, 48), (16, 64), (1, 33)])
    def test_a_cut_through_a_group_is_refused(self, start: int, stop: int) -> None:
        with pytest.raises(ConfigError, match=f"inputs {start} to {stop} cut through the quantization groups of 32"):
            made_up(4, 32).columns(start, stop)


class TestQuantizing:
    @pytest.mark.parametrize("make", [normal, heavy])
    def test_8_bits_are_rounded_to_the_nearest_of_255_steps(self, make: object) -> None:
        weight = (normal if make is normal else heavy)()
        found = quantize(weight, 8)
        assert found.scales.shape == (ROWS, 1) and (found.zeros == 128).all() and found.codes.min() >= 1
        steps = weight.abs().amax(1, keepdim=True) / 127
        assert ((found.dequantize() - weight).abs() <= steps * 0.5001).all()

    def test_8_bits_lose_under_a_hundredth(self) -> None:
        assert error(normal(), quantize(normal(), 8)) < 0.008

    @pytest.mark.parametrize(("size", "bound"), [(32, 0.076), (64, 0.088)])
    def test_4_bits_lose_less_than_plain_rounding(self, size: int, bound: float) -> None:
        assert error(normal(), quantize(normal(), 4, size)) < bound  # rounding: 0.081 and 0.093
        for weight in (normal(), heavy()):
            found = (quantize(weight, 4, size).dequantize() - weight).view(ROWS, -1, size).norm(dim=-1)
            plain = (rounded(weight, size) - weight).view(ROWS, -1, size).norm(dim=-1)
            assert (found <= plain * 1.0001).all()
            assert found.norm() < 0.95 * plain.norm()

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("value", [0.0, 0.3, -7.5])
    def test_equal_weights_are_exact(self, bits: int, value: float) -> None:
        weight = torch.full((3, 64), value)
        assert torch.allclose(quantize(weight, bits).dequantize(), weight, rtol=1e-6, atol=0)

    def test_two_values_are_exact_in_4_bits(self) -> None:
        weight = torch.where(normal()[:, :64] > 0, 0.5, -0.25)
        assert torch.allclose(quantize(weight, 4).dequantize(), weight, atol=1e-6)

    def test_an_outlier_costs_its_own_group_only(self) -> None:
        weight = normal()
        weight[0, 0] = 5.0
        found = quantize(weight, 4, 32).dequantize()
        assert torch.equal(found[:, 32:], quantize(normal(), 4, 32).dequantize()[:, 32:])
        assert abs(found[0, 0] - 5.0) < 0.05

    def test_nan_stays_visible(self) -> None:
        weight = normal()
        weight[2, 3] = torch.nan
        assert quantize(weight, 4).dequantize()[2].isnan().any()

    def test_16_bit_weights(self) -> None:
        weight = normal().bfloat16()
        assert torch.equal(quantize(weight, 4).codes, quantize(weight.float(), 4).codes)

    @pytest.mark.parametrize(("inputs", "size"), [(192, 64), (96, 32), (576, 64)])
    def test_group_by_default(self, inputs: int, size: int) -> None:
        assert quantize(torch.ones(2, inputs), 4).group_size == size

    def test_large_weights_are_worked_on_in_parts(self) -> None:
        weight = torch.randn(130, 4096, generator=torch.Generator().manual_seed(3))
        whole = quantize(weight, 4)
        for row in (0, 63, 64, 129):
            part = quantize(weight[row : row + 1], 4)
            assert torch.equal(whole.codes[row : row + 1], part.codes)
            assert torch.equal(whole.scales[row : row + 1], part.scales)

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ConfigError, match="cannot be quantized to 3 bits; supported: 4, 8"):
            quantize(normal(), 3)
        with pytest.raises(ConfigError, match="groups of 128 do not divide a weight's 192 inputs"):
            quantize(normal(), 4, 128)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.45)])
def test_logits_stay_near(tmp_path: Path, bits: int, bound: float) -> None:
    """Every projection of a random Llama, whose logits are far more sensitive than a trained model's."""
    import transformers

    oracle = build("llama", tmp_path)
    prompt = tokens(40, 5)
    wanted = oracle_logits(oracle, prompt)
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = quantize(weight, bits).dequantize()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = oracle_logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), prompt)
    lost = float((found - wanted).norm() / wanted.norm())
    print(f"{bits} bits: the logits' relative error is {lost:.4f}")
    assert 0 < lost < bound
