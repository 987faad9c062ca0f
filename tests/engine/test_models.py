"""Every family computes the logits that transformers computes, however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.group import Group
from tandem.engine.models.transformer import all_finite
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tandem.engine.runner import pack
from tandem.engine.sequence import Sequence
from tests.engine.model_zoo import BLOCK, FAMILIES, build, engine_config, oracle_logits, sequence, tokens

TOLERANCE = 1e-4


class Family:
    def __init__(self, name: str, directory: Path) -> None:
        self.oracle: Any = build(name, directory)
        self.directory = directory

    def rank(self, **overrides: Any) -> Rank:
        return Rank.load(Plan.make(engine_config(self.directory, **overrides)), Group())

    def worst(self, item: Sequence, logits: Tensor) -> float:
        """Largest difference to the oracle's logits of the last len(logits) computed tokens of `item`."""
        wanted = oracle_logits(self.oracle, item.token_ids[: item.computed])[-len(logits) :]
        return float((logits - wanted).abs().max())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield Family(request.param, tmp_path_factory.mktemp(request.param))


def step(rank: Rank, *work: tuple[Sequence, int]) -> list[Tensor]:
    """Compute so many tokens of each sequence; the logits of all of them, (tokens, vocab) a sequence."""
    batch = build_batch([Scheduled(item, count) for item, count in work])
    everything = replace(batch, sample_rows=list(range(len(batch.token_ids))))
    logits = rank.runner.forward(pack(everything, BLOCK)).logits
    for item, count in work:
        item.computed += count
    return list(logits.split([count for _, count in work]))


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_logits_equal_transformers(family: Family, backend: str) -> None:
    rank = family.rank(attention_backend=backend)
    first = sequence(tokens(45, 1), [5, 2, 9, 0, 7, 11])
    for count in (16, 3, 22, 4):  # chunks inside, across and at the end of blocks
        (logits,) = step(rank, (first, count))
        assert family.worst(first, logits) < TOLERANCE
    second = sequence(first.token_ids[:32] + tokens(9, 2), [5, 2, 9, 0, 14, 15])  # shares four blocks with `first`
    second.computed = 32
    third = sequence(tokens(17, 3), [20, 21, 22])
    first.token_ids.append(7)
    work = [(second, 5), (first, 1), (third, 17)]  # ragged: a chunk behind a shared prefix, a decode, a prompt
    for (item, _), logits in zip(work, step(rank, *work), strict=True):
        assert family.worst(item, logits) < TOLERANCE
    first.token_ids.append(8)
    for item, logits in zip((first, second), step(rank, (first, 1), (second, 4)), strict=True):
        assert family.worst(item, logits) < TOLERANCE


def test_a_sliding_window_matters(family: Family) -> None:
    """Guards the test above: a window that is too large for its prompts would not show."""
    config = family.oracle.config
    has_window = 20 in Plan.make(engine_config(family.directory)).model.windows
    assert has_window == ("window" in family.directory.name)
    if not has_window:
        return
    rank, item = family.rank(), sequence(tokens(45, 1), [0, 1, 2, 3, 4, 5])
    (logits,) = step(rank, (item, 45))
    window, config.sliding_window = config.sliding_window, 512
    try:
        assert family.worst(item, logits) > 0.01
    finally:
        config.sliding_window = window


def test_only_the_wanted_rows_have_logits(family: Family) -> None:
    rank = family.rank()
    done, partial = sequence(tokens(6, 1), [0]), sequence(tokens(9, 2), [1, 2])
    logits = rank.runner.forward(pack(build_batch([Scheduled(partial, 4), Scheduled(done, 6)]), BLOCK)).logits
    assert logits.shape == (1, family.oracle.config.vocab_size)
    assert (logits[0] - oracle_logits(family.oracle, done.token_ids)[-1]).abs().max() < TOLERANCE
    assert rank.runner.forward(pack(build_batch([Scheduled(partial, 4)]), BLOCK)).logits.shape[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(family: Family, dtype: str) -> None:
    rank, item = family.rank(dtype=dtype), sequence(tokens(30, 4), [3, 1, 2, 0])
    assert rank.cache.tensor.dtype == getattr(torch, dtype)
    (logits,) = step(rank, (item, 30))
    wanted = oracle_logits(family.oracle, item.token_ids)
    error = (logits - wanted).norm() / wanted.norm()
    assert error < (0.08 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finiteness_is_told_of_each_sequence(value: float, dtype: torch.dtype) -> None:
    x = torch.full((6, 8), 60000.0, dtype=dtype)  # their sum overflows float16
    starts = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    assert all_finite(x, starts).tolist() == [True, True, True]
    x[3, 5] = value
    assert all_finite(x, starts).tolist() == [True, False, True]
    x[0, 0], x[5, 7] = value, -value
    assert all_finite(x, starts).tolist() == [False, False, False]
    assert all_finite(x, torch.arange(7)).tolist() == [False, True, True, False, True, False]  # as in decode
