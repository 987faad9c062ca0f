"""Products of 8- and 4-bit codes: the same integers on any processor, and near what the codes stand for."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tandem.engine.kernels import compile as kernels
from tandem.engine.kernels import native
from tandem.engine.kernels.native import Team

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")
PROCESSORS = ["native"] + ["x86-64-v2"] * (platform.machine() == "x86_64")  # has no AVX2: plain integers
SHAPES = ((96, 256, 1), (49, 300, 3), (5, 37, 1), (40, 120, 30))  # outputs, inputs, groups


@pytest.fixture(params=PROCESSORS, scope="module")
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels compiled for it: for another one without optimization, which must not change a bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "native":
            target = {"-march=native": f"-march={request.param}", "-O3": "-O0"}
            patch.setattr(kernels, "FLAGS", tuple(target.get(flag, flag) for flag in kernels.FLAGS))
            library = functools.cache(kernels.library.__wrapped__)
            patch.setattr(native, "library", library)
            assert isinstance(library(), ctypes.CDLL)
        yield request.param


def product(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, x: Tensor) -> Tensor:
    team, y = Team(1), torch.empty(len(x), len(codes))
    team.begin()
    team.product(native.pack_codes(codes, scales, zeros, bits), x, y)
    team.end()
    return y


def whole_numbers(rows: int, inputs: int, groups: int) -> Tensor:
    """Activations that are their own 8 bits: in each block of 32 inputs the largest is 127."""
    x = torch.randint(-127, 128, (rows, inputs), generator=torch.Generator().manual_seed(rows)).float()
    for group in x.view(rows, groups, -1).unbind(dim=1):
        for index, block in enumerate(group.split(32, dim=1)):
            block[:, 0] = 127 * (-1) ** index
    return x


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs", "groups"), SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_integers_are_exact(processor: str, bits: int, outputs: int, inputs: int, groups: int, rows: int) -> None:
    """Scales of 1 leave nothing but the integers, all below 2^24."""
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(2**bits, (outputs, inputs), generator=generator)
    codes[0], codes[1] = 0, 2**bits - 1
    zeros = torch.randint(2**bits, (outputs, groups), generator=generator)
    x = whole_numbers(rows, inputs, groups)
    x[-1] = 127
    found = product(codes.to(torch.uint8), torch.ones(outputs, groups), zeros.float(), bits, x)
    weight = (codes - zeros.repeat_interleave(inputs // groups, dim=1)).numpy()
    assert (found.numpy() == x.long().numpy() @ weight.T).all(), f"{processor}, {bits} bits"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outlier", "bound"), [(1.0, 0.008), (50.0, 0.012)], ids=["normal", "outliers"])
def test_products_are_near_those_of_the_weight(processor: str, bits: int, outlier: float, bound: float) -> None:
    """An outlier costs precision in its block of 32 inputs only."""
    generator = torch.Generator().manual_seed(bits)
    x, codes = (torch.randn(60, 1024, generator=generator) for _ in range(2))
    x[:, 100] *= outlier
    codes = (codes * 2.0**bits / 8 + 2.0 ** (bits - 1)).round().clamp(0, 2**bits - 1)
    scales, zeros = torch.full((60, 16), 0.013), torch.full((60, 16), 2.0 ** (bits - 1) + 0.25)
    found = product(codes.to(torch.uint8), scales, zeros, bits, x).double()
    wanted = x.double() @ ((codes - zeros[0, 0]) * scales[0, 0]).double().T
    assert (found - wanted).norm() < bound * wanted.norm()


def test_scales_keep_their_precision_whatever_their_size() -> None:
    """float16 holds them beside a power of two of their row: those of published checkpoints, in 16 bits, exactly."""
    x, codes = whole_numbers(3, 64, 2), torch.ones(32, 64, dtype=torch.uint8)
    for size in (1e-30, 3e-6, 1.0, 1e20):
        scales = (torch.tensor([[1.0, 0.75]]) * size).expand(32, 2).bfloat16().float()
        found = product(codes, scales, torch.zeros(32, 2), 4, x)
        wanted = (x.view(3, 2, 32).sum(2) @ scales[:1].t()).expand(3, 32)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert not product(codes, torch.zeros(32, 2), torch.ones(32, 2), 8, x).any()


def test_a_row_of_zeros_is_zero(processor: str) -> None:
    codes = torch.randint(256, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert not product(codes, torch.ones(5, 1), torch.full((5, 1), 128.0), 8, torch.zeros(3, 64)).any()


def test_what_can_be_packed() -> None:
    assert native.packable(96, 3, 4) and native.packable(37, 1, 8)
    assert not native.packable(96, 5, 4) and not native.packable(96, 3, 3) and not native.packable(96, 0, 8)
    codes, scales = torch.zeros(5, 96, dtype=torch.uint8), torch.ones(5, 5)
    with pytest.raises(AssertionError, match="96 inputs in 5 groups of 4 bits"):
        native.pack_codes(codes, scales, scales, 4)
