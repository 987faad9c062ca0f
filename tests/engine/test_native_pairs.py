"""Products of bfloat16 pairs, as processors with AVX-512 BF16 compute them, here with the same arithmetic in floats."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.engine.batch import Scheduled
from tandem.engine.engine import Engine
from tandem.engine.kernels import compile as kernels
from tandem.engine.kernels import native
from tandem.engine.kernels.native import ADD, GATE, STORE, Team
from tests.engine.model_zoo import build, engine_config, oracle_logits, sequence, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")
ROWS = (1, 2, 3, 5, 12, 13, 31, 121, 250)


@pytest.fixture(scope="module", autouse=True)
def paired() -> Iterator[None]:
    """The kernels compiled for pairs; the other tests' library stays loaded beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-DTANDEM_DOT"))
        library = functools.cache(kernels.library.__wrapped__)
        patch.setattr(native, "library", library)
        assert isinstance(library(), ctypes.CDLL)
        yield


def test_bfloat16_is_packed_in_pairs() -> None:
    weight = torch.arange(32 * 3).view(32, 3).bfloat16()
    (panels,) = native.pack(weight).tensors
    assert panels.shape == (2, 2, 16, 2)
    assert panels[1, 0, 5].tolist() == weight[21, :2].tolist() and panels[1, 1, 5].tolist() == [weight[21, 2], 0]


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (49, 301)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_rounded_activations(outputs: int, inputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight, x = (torch.randn(count, inputs, generator=generator) for count in (outputs, max(ROWS)))
    bias, team = torch.randn(outputs, generator=generator), Team(threads)
    packed = native.pack(weight.bfloat16(), bias)
    wanted = x.bfloat16().double() @ weight.bfloat16().double().t() + bias
    alone = torch.empty(1, outputs)
    team.begin()
    for rows in ROWS:
        y, added = torch.empty(rows, outputs), torch.ones(rows, outputs)
        team.product(packed, x[:rows], y, STORE)
        team.product(packed, x[:rows], added, ADD)
        assert (y - wanted[:rows]).abs().max() < 1e-4 and (added - y - 1).abs().max() < 1e-4
        team.product(packed, x[rows - 1 : rows], alone)
        assert torch.equal(alone[0], y[-1]), f"a row of {rows} has other bits than alone"
    team.end()


def test_a_gate_between_panels() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(64, 40, generator=generator), torch.randn(7, 40, generator=generator)
    team, y = Team(1), torch.empty(7, 32)
    team.begin()
    team.product(native.pack(weight.bfloat16()), x, y, GATE)
    team.end()
    product = (x.bfloat16().double() @ weight.bfloat16().double().t()).view(7, 2, 2, 16)
    wanted = torch.nn.functional.silu(product[:, :, 0]) * product[:, :, 1]
    assert (y - wanted.flatten(1)).abs().max() < 1e-3


def test_a_model_in_bfloat16_is_close(tmp_path: Path) -> None:
    oracle = build("qwen3", tmp_path)
    engine, item = Engine.load(engine_config(tmp_path, dtype="bfloat16")), sequence(tokens(30, 4), [3, 1, 2, 0])
    (result,) = engine.forward([Scheduled(item, 30)])
    wanted = oracle_logits(oracle, item.token_ids)[-1]
    assert wanted[result.token_ids[0]] > wanted.max() - 0.08 * wanted.norm()
    engine.close()
