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
    """How a weight is kept; `group` inputs share a scale in 4 bits."""

    name: str
    shapes: tuple[tuple[int, int], ...]  # outputs, inputs
    dtype: torch.dtype | None = None
    group: int = 0

    def pack(self, outputs: int, inputs: int, bias: Tensor | None) -> tuple[Packed, Tensor]:
        """And the same weight, (outputs, inputs) float64."""
        generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
        if self.dtype is not None:
            weight = torch.randn(outputs, inputs, generator=generator).to(self.dtype)
            return native.pack(weight, bias), weight.double()
        groups = inputs // self.group if self.group else 1
        scales = torch.rand(outputs, groups, generator=generator) + 0.1
        if not self.group:
            codes = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
            return native.pack_codes(codes, scales, None, 8, bias), codes.double() * scales.double()
        codes = torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8)
        zeros = torch.randint(0, 16, (outputs, groups), generator=generator).float()
        wide = [part.double().repeat_interleave(self.group, dim=1) for part in (scales, zeros)]
        return native.pack_codes(codes, scales, zeros, 4, bias), wide[0] * (codes.double() - wide[1])


ODD = ((5, 37), (49, 300), (100, 513))  # no whole panels, no whole registers; across stretches of 256 inputs
STORAGES = (
    Storage("float32", ODD, torch.float32),
    Storage("bfloat16", ODD, torch.bfloat16),
    Storage("float16", ODD, torch.float16),
    Storage("int8", ODD),
    Storage("int4-32", ((49, 96), (5, 320)), group=32),
    Storage("int4-64", ((49, 192), (100, 320)), group=64),
    Storage("int4-128", ((49, 128), (5, 384)), group=128),
    Storage("int4-37", ((49, 111),), group=37),
    Storage("int4-256", ((33, 512),), group=256),
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


def bound(x: Tensor, weight: Tensor, more: Tensor | float) -> Tensor:
    """What a chain of float32 operations over `inputs` may be off by; zeros of 4 bits are summed apart."""
    zeros = 16.0 * x.double().abs().sum(dim=1, keepdim=True)
    return (x.shape[1] + 16) * EPSILON * (x.double().abs() @ weight.abs().T + zeros + more)


@storages
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_products_are_those_of_float64(storage: Storage, with_bias: bool) -> None:
    for outputs, inputs in storage.shapes:
        bias = biases(outputs) if with_bias else None
        packed, weight = storage.pack(outputs, inputs, bias)
        plus = 0.0 if bias is None else bias.double()
        for rows in ROWS:
            x, start = activations(rows, inputs), activations(rows, outputs, seed=3)
            wanted = x.double() @ weight.T + plus
            allowed = bound(x, weight, abs(plus) + start.double().abs())
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
        whole = x.double() @ weight.T + (0.0 if bias is None else bias.double())
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
