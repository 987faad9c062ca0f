"""The C++ attention: the same bits however a context is cut, against float64, and deaf to what is not its business.

What no token was written to holds NaN, padding of block tables names blocks that do not exist, and each token is
written only when it is computed: whoever reads too far is found out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tandem.engine.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")

NOWHERE = 1 << 30  # a block that would be read far outside of the cache
LONG = 1100  # tokens: across tiles of 64 positions and splits of 512, two of them whole


@dataclass(frozen=True)
class Shape:
    group: int = 3
    kv_heads: int = 2
    head_dim: int = 24
    block_size: int = 8
    window: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def heads(self) -> native.Heads:
        heads = self.group * self.kv_heads
        return native.Heads(heads, self.kv_heads, self.head_dim, self.window, self.head_dim**-0.5)


SHAPES = {
    "group-1": Shape(group=1, head_dim=64, block_size=16),
    "group-3": Shape(),
    "group-8": Shape(group=8, kv_heads=1, head_dim=128, block_size=32),
    "group-96": Shape(group=96, kv_heads=1, head_dim=20),  # as many as the rows of a task
    "group-100": Shape(group=100, kv_heads=1, head_dim=20),  # and more
    "head-dim-80": Shape(head_dim=80, block_size=4),
    "head-dim-20": Shape(group=1, head_dim=20, block_size=1),
    "window-1": Shape(window=1),
    "window-20": Shape(window=20, block_size=4, head_dim=80),
    "window-600": Shape(window=600, block_size=16, group=8, kv_heads=1),
    "bfloat16": Shape(head_dim=64, block_size=16, dtype=torch.bfloat16),
    "bfloat16-group-5": Shape(group=5, kv_heads=1, head_dim=96, dtype=torch.bfloat16),
    "bfloat16-head-dim-20": Shape(group=2, head_dim=20, dtype=torch.bfloat16),  # not in whole vectors
    "float16": Shape(head_dim=80, dtype=torch.float16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@cache
def team(threads: int) -> native.Team:
    return native.Team(threads)


class Context:
    """A sequence's tokens: what they ask, and what they leave in a cache."""

    def __init__(self, shape: Shape, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = shape.group * shape.kv_heads
        self.query = torch.randn(tokens, heads, shape.head_dim, generator=generator) * 2
        kv = torch.randn(2, tokens, shape.kv_heads, shape.head_dim, generator=generator)
        self.kv = kv.to(shape.dtype)
        self.blocks = -(-tokens // shape.block_size)


Work = list[tuple[int, int, int]]  # tokens first … last - 1 of a sequence


class Paged:
    """Sequences in one cache, in blocks of random order, with as many blocks that nobody owns."""

    def __init__(self, shape: Shape, contexts: list[Context], seed: int = 0) -> None:
        self.shape, self.contexts = shape, contexts
        counts = [context.blocks for context in contexts]
        order = random.Random(seed).sample(range(2 * sum(counts)), sum(counts))
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        size = (2 * sum(counts), 3, 2, shape.kv_heads, shape.block_size, shape.head_dim)
        self.kv = torch.full(size, float("nan"), dtype=shape.dtype)[:, 1]  # the second of three layers

    def step(self, work: Work, threads: int = 2) -> list[Tensor]:
        """Write these tokens' keys and values, then what each sees: (tokens, heads, head_dim) for each of `work`."""
        for which, first, last in work:
            positions = torch.arange(first, last)
            blocks = torch.tensor(self.tables[which])[positions // self.shape.block_size]
            self.kv[blocks, :, :, positions % self.shape.block_size] = (
                self.contexts[which].kv[:, first:last].transpose(0, 1)
            )
        return self.attend(work, threads)

    def attend(self, work: Work, threads: int = 2) -> list[Tensor]:
        lengths = [last - first for _, first, last in work]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        ends = torch.tensor([last for *_, last in work], dtype=torch.int32)
        width = max(map(len, self.tables)) + 3
        used = [self.tables[which][: -(-last // self.shape.block_size)] for which, _, last in work]
        tables = torch.tensor([blocks + [NOWHERE] * (width - len(blocks)) for blocks in used], dtype=torch.int32)
        query = torch.cat([self.contexts[which].query[first:last] for which, first, last in work])
        addresses = [starts.data_ptr(), ends.data_ptr(), tables.data_ptr(), None, None, None, None]
        step, seen = native.Step(len(query), len(work), width, *addresses), torch.full_like(query, -77.0)
        team(threads).begin()
        team(threads).attention(self.shape.heads, step, native.Cache.of(self.kv), query, seen)
        team(threads).end()
        return list(seen.split(lengths))


def in_chunks(shape: Shape, context: Context, sizes: list[int], threads: int = 2) -> Tensor:
    """All of the context's tokens, `sizes` at a time, over and over."""
    paged, first, seen, tokens = Paged(shape, [context]), 0, list[Tensor](), len(context.query)
    while first < tokens:
        last = min(tokens, first + sizes[len(seen) % len(sizes)])
        seen += paged.step([(0, first, last)], threads)
        first = last
    return torch.cat(seen)


def dense(shape: Shape, context: Context) -> Tensor:
    """In float64, with every score written out."""
    tokens = len(context.query)
    key, value = context.kv.double().repeat_interleave(shape.group, dim=2)
    scores = torch.einsum("qhd,khd->hqk", context.query.double(), key) * shape.head_dim**-0.5
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    hidden = (distance < 0) | (distance >= (shape.window or tokens))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), value)


@shapes
def test_it_is_attention(shape: Shape) -> None:
    context = Context(shape, 560, seed=1)
    torch.testing.assert_close(in_chunks(shape, context, [560]).double(), dense(shape, context), atol=5e-6, rtol=5e-6)


@shapes
def test_a_context_has_the_same_bits_however_it_is_cut(shape: Shape) -> None:
    """Whole, in odd chunks, with single tokens behind and between chunks, on one thread and on two."""
    context = Context(shape, LONG, seed=2)
    whole = in_chunks(shape, context, [LONG])
    for sizes in ([LONG - 1, 1], [37], [1, 97, 31, 1, 33, 512], [513, 2]):
        assert torch.equal(in_chunks(shape, context, sizes), whole), sizes
    assert torch.equal(in_chunks(shape, context, [LONG], threads=1), whole)
    assert torch.equal(in_chunks(shape, context, [301, 1], threads=1), whole)


@pytest.mark.parametrize("name", ["group-3", "group-8", "window-20", "window-600", "bfloat16"])
def test_token_by_token(name: str) -> None:
    shape = SHAPES[name]
    context = Context(shape, LONG, seed=3)
    assert torch.equal(in_chunks(shape, context, [1]), in_chunks(shape, context, [LONG]))


@shapes
def test_a_sequence_has_the_same_bits_alone_and_beside_others(shape: Shape) -> None:
    lengths = (1, 31, 32, 33, 512, 513, 700, 1025, 90)
    contexts = [Context(shape, length, seed) for seed, length in enumerate(lengths)]
    alone = [in_chunks(shape, context, [1025]) for context in contexts]
    new = (1, 1, 1, 5, 1, 1, 1, 1, 40)  # tokens of the step that they share
    for order in (range(9), (8, 3, 7, 0, 1, 6, 5, 2, 4)):
        paged = Paged(shape, contexts)
        paged.step([(which, 0, lengths[which] - new[which]) for which in order if lengths[which] > new[which]])
        work = [(which, lengths[which] - new[which], lengths[which]) for which in order]
        for (which, first, _), seen in zip(work, paged.step(work), strict=True):
            assert torch.equal(seen, alone[which][first:]), f"{lengths[which]} tokens"


def shared(shape: Shape) -> tuple[Paged, Work]:
    """Three sequences, all their tokens but the last few written: single tokens, of a long context too, and a chunk."""
    paged = Paged(shape, [Context(shape, length, seed) for seed, length in enumerate((40, 600, 75))])
    paged.step([(0, 0, 39), (1, 0, 599), (2, 0, 55)])
    return paged, [(0, 39, 40), (1, 599, 600), (2, 55, 75)]


@pytest.mark.parametrize("garbage", [0.0, float("inf"), -3e38])
def test_free_slots_and_blocks_do_not_matter(garbage: float) -> None:
    """Compared with NaN, which they hold elsewhere."""
    paged, work = shared(SHAPES["group-3"])
    expected = paged.step(work)
    assert all(part.isfinite().all() for part in expected)
    assert paged.kv.isnan().any()
    paged.kv[paged.kv.isnan()] = garbage
    for seen, wanted in zip(paged.attend(work), expected, strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_kv_breaks_its_own_sequence_only(part: int, broken: int, value: float) -> None:
    paged, work = shared(SHAPES["head-dim-80"])
    expected = paged.step(work)
    paged.kv[paged.tables[broken][3], part, :, 1] = value
    for which, (seen, wanted) in enumerate(zip(paged.attend(work), expected, strict=True)):
        if which == broken:
            assert not seen.flatten(1).isfinite().all(dim=1).any()
        else:
            assert torch.equal(seen, wanted)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], ids=hex)
def test_every_pattern_of_nan_is_one(bits: int) -> None:
    """The integer arithmetic of exp() makes finite numbers of NaN whose low bits are set: what comes of it must not."""
    shape = SHAPES["group-3"]
    context = Context(shape, 8, seed=1)
    context.kv *= 0.01  # small values, so that a huge finite weight does not overflow
    paged = Paged(shape, [context])
    paged.step([(0, 0, 7)])
    paged.kv.view(torch.int32)[paged.tables[0][0], 0, :, 2] = bits
    (seen,) = paged.step([(0, 7, 8)])
    assert seen.isnan().all()


def test_scores_of_any_size() -> None:
    """Softmax does not overflow, and one that is far ahead takes all."""
    shape = replace(SHAPES["group-1"], dtype=torch.float32)
    context = Context(shape, 200, seed=5)
    context.query *= 1e4
    seen = in_chunks(shape, context, [200])
    assert seen.isfinite().all()
    torch.testing.assert_close(seen.double(), dense(shape, context), atol=2e-2, rtol=2e-2)
    assert torch.equal(in_chunks(shape, context, [7, 1]), seen)
