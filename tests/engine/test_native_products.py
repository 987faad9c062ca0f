"""The packed products of every storage kind, against float64; and a row's bits, which nothing around it may change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.kernels import native
from tandem.engine.kernels.native import ADD, GATE, STORE, Packed, Team

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")

ROWS = (*range(1, 14), 31, 121, 250)  # few rows; across a tile of rows, a block of rows, several blocks
EPSILON = 2.0**-24  # of one float32 operation


@dataclass(frozen=True)
class Storage:
    """How a weight is kept; in codes, `group` inputs share a scale and a zero, or all of them."""

    name: str
    shapes: tuple[tuple[int, int], ...]  # outputs, inputs
    dtype: torch.dtype | None = None
    bits: int = 0
    group: int = 0

    def pack(self, outputs: int, inputs: int, bias: Tensor | None) -> tuple[Packed, Tensor]:
        """And the same weight, (outputs, inputs) float64."""
        generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
        if self.dtype is not None:
            weight = torch.randn(outputs, inputs, generator=generator).to(self.dtype)
            return native.pack(weight, bias), weight.double()
        group = self.group or inputs
        codes = torch.randint(2**self.bits, (outputs, inputs), generator=generator)
        zeros = torch.randint(2**self.bits, (outputs, inputs // group), generator=generator).float()
        scales = (torch.rand(zeros.shape, generator=generator) + 0.1).half().float()
        wide = [part.double().repeat_interleave(group, dim=1) for part in (scales, zeros)]
        packed = native.pack_codes(codes.to(torch.uint8), scales, zeros, self.bits, bias)
        return packed, wide[0] * (codes.double() - wide[1])

    def read(self, x: Tensor) -> Tensor:
        """What the products make of activations, float64: beside codes, 8 bits and a scale for up to 32 inputs."""
        if not self.bits:
            return x.double()
        groups = x.split(self.group or x.shape[1], dim=1)
        return torch.cat([rounded(block) for group in groups for block in group.split(32, dim=1)], dim=1)


def rounded(x: Tensor) -> Tensor:
    """To 127ths of each row's largest, ties to even; float64."""
    largest = x.abs().amax(dim=1, keepdim=True)
    steps = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)  # 127 / tensor is not a rounded quotient
    return (x * steps).round().double() * (largest / 127).double()


ODD = ((5, 37), (49, 300), (100, 513))  # no whole panels, no whole registers; across stretches of 256 inputs
STORAGES = (
    Storage("float32", ODD, torch.float32),
    Storage("bfloat16", ODD, torch.bfloat16),
    Storage("float16", ODD, torch.float16),
    Storage("int8", ODD, bits=8),
    Storage("int8-4", ((5, 12),), bits=8, group=4),
    Storage("int8-128", ((49, 128), (5, 384)), bits=8, group=128),
    Storage("int4", ODD, bits=4),
    Storage("int4-32", ((49, 96), (5, 320)), bits=4, group=32),
    Storage("int4-37", ((49, 111),), bits=4, group=37),
    Storage("int4-64", ((49, 192), (100, 320)), bits=4, group=64),
    Storage("int4-256", ((33, 512),), bits=4, group=256),
)
storages = pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)


@cache
def team(threads: int) -> Team:
    return Team(threads)


def product(weight: Packed, x: Tensor, then: int = STORE, start: Tensor | None = None, threads: int = 1) -> Tensor:
    """y, in the middle of a buffer whose edges must stay as they were."""
    columns = weight.outputs // 2 if then == GATE else weight.outputs
    buffer = torch.full((len(x) + 2, columns), -77.0)
    if start is not None:
        buffer[1:-1] = start
    team(threads).begin()
    team(threads).product(weight, x, buffer[1:-1], then)
    team(threads).end()
    assert (buffer[0] == -77.0).all() and (buffer[-1] == -77.0).all(), "written beside the result"
    return buffer[1:-1]


def activations(rows: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def biases(outputs: int) -> Tensor:
    return torch.randn(outputs, generator=torch.Generator().manual_seed(2)) * 3


def bound(storage: Storage, x: Tensor, weight: Tensor, more: Tensor | float) -> Tensor:
    """What a chain of float32 operations may be off by: one for each input, or beside codes one for each block and some
    for each group, where sums of zeros go apart."""
    operations = 16.0 + (x.shape[1] / 4 if storage.bits else x.shape[1])
    zeros = {0: 0.0, 4: 16.0, 8: 128.0}[storage.bits] * x.double().abs().sum(dim=1, keepdim=True)
    return operations * EPSILON * (x.double().abs() @ weight.abs().T + zeros + more)


@storages
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_products_are_those_of_float64(storage: Storage, with_bias: bool) -> None:
    for outputs, inputs in storage.shapes:
        bias = biases(outputs) if with_bias else None
        packed, weight = storage.pack(outputs, inputs, bias)
        plus = 0.0 if bias is None else bias.double()
        for rows in ROWS:
            x, start = activations(rows, inputs), activations(rows, outputs, seed=3)
            wanted = storage.read(x) @ weight.T + plus
            allowed = bound(storage, x, weight, abs(plus) + start.double().abs())
            where = f"{outputs} x {inputs}, {rows} rows"
            assert ((product(packed, x) - wanted).abs() <= allowed).all(), where
            added = product(packed, x, ADD, start)
            assert ((added - (wanted + start.double())).abs() <= allowed).all(), f"{where}, added"


@storages
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_gated_products_are_those_of_float64(storage: Storage, with_bias: bool) -> None:
    """Panels of gate and up alternate; see packed.interleaved for the ones that are filled up."""
    inputs = storage.shapes[-1][1]
    bias = biases(96) if with_bias else None
    packed, weight = storage.pack(96, inputs, bias)
    for rows in ROWS:
        x = activations(rows, inputs) / inputs**0.5 / weight.abs().max()  # so that no gate is all open or shut
        whole = storage.read(x) @ weight.T + (0.0 if bias is None else bias.double())
        gate, up = whole.view(rows, 3, 2, 16).unbind(dim=2)
        wanted = (F.silu(gate) * up).flatten(1)
        torch.testing.assert_close(product(packed, x, GATE).double(), wanted, atol=2e-5, rtol=2e-5)


@storages
@pytest.mark.parametrize("then", [STORE, ADD, GATE])
def test_a_row_has_the_same_bits_in_any_batch_at_any_place_on_any_threads(storage: Storage, then: int) -> None:
    inputs = storage.shapes[-1][1]
    packed, _ = storage.pack(96, inputs, biases(96))
    x, start = activations(250, inputs), activations(250, 48 if then == GATE else 96, seed=3)
    alone = torch.cat([product(packed, x[row : row + 1], then, start[row : row + 1]) for row in range(250)])
    generator = torch.Generator().manual_seed(4)
    for rows in (*ROWS, 12, 24, 120, 240):
        for threads in (1, 2):
            chosen = torch.randperm(250, generator=generator)[:rows]
            batch = product(packed, x[chosen], then, start[chosen], threads)
            assert torch.equal(batch, alone[chosen]), f"{rows} rows, {threads} threads"


def test_what_is_no_number_stays_in_its_row() -> None:
    for storage in STORAGES:
        packed, _ = storage.pack(96, storage.shapes[-1][1], None)
        x = activations(31, storage.shapes[-1][1])
        before = {
            then: product(packed, x, then, torch.zeros(31, 96)[:, : 48 if then == GATE else 96]) for then in (0, 2)
        }
        x[7, 5], x[20, 0] = float("nan"), float("inf")
        sound = torch.ones(31, dtype=torch.bool)
        sound[[7, 20]] = False
        for then, expected in before.items():
            after = product(packed, x, then)
            assert torch.equal(after[sound], expected[sound]), storage.name
            assert after[7].isnan().all() and not after[20].isfinite().all(), storage.name


@pytest.mark.parametrize("size", [24, 64, 576])
def test_normalize(size: int) -> None:
    x, weight = activations(37, size) * 5, activations(1, size, seed=2)[0]
    y = torch.empty_like(x)
    team(2).normalize(x, weight, 1e-5, y)
    torch.testing.assert_close(y.double(), F.rms_norm(x.double(), (size,), weight.double(), 1e-5), atol=1e-5, rtol=1e-5)
    alone = torch.empty(1, size)
    for row in range(37):
        team(1).normalize(x[row : row + 1], weight, 1e-5, alone)
        assert torch.equal(alone[0], y[row])


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, _ = STORAGES[0].pack(5, 37, None)
    for x, y in (((2, 36), (2, 5)), ((2, 37), (3, 5)), ((2, 37), (2, 6))):
        with pytest.raises(AssertionError):
            team(1).product(packed, torch.zeros(x), torch.zeros(y))
    with pytest.raises(AssertionError, match="float64"):
        team(1).product(packed, torch.zeros(2, 37, dtype=torch.float64), torch.zeros(2, 5))
    with pytest.raises(AssertionError, match="strides"):
        team(1).product(packed, torch.zeros(37, 2).t(), torch.zeros(2, 5))
