"""Whole models on the C++ kernels: a token's logits have the same bits however, and beside whatever, it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.engine import Engine
from tandem.engine.group import Group
from tandem.engine.kernels import native
from tandem.engine.models.packed import PackedTransformer, interleaved
from tandem.engine.models.transformer import StepOutput
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tandem.engine.runner import pack
from tandem.engine.sampler import NOT_FINITE
from tandem.engine.sequence import Sequence
from tests.engine.model_zoo import BLOCK, build, engine_config, generate, sequence, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")

LENGTH = 70
# Biases everywhere; a window and heads of 24; norms of queries and keys
MODELS = (("llama-biases-tied", "float32"), ("mistral-window", "bfloat16"), ("qwen3", "float16"))


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: "-".join(param))
def rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    name, dtype = request.param
    directory = tmp_path_factory.mktemp(name)
    build(name, directory)
    config = engine_config(directory, attention_backend="native", dtype=dtype)
    yield Rank.load(Plan.make(config), Group())


def forward(rank: Rank, work: list[tuple[Sequence, int]]) -> StepOutput:
    """One step, with the logits of all tokens."""
    batch = build_batch([Scheduled(item, count) for item, count in work])
    output = rank.runner.forward(pack(replace(batch, sample_rows=list(range(len(batch.token_ids)))), BLOCK))
    for item, count in work:
        item.computed += count
    return output


def prompt(rank: Rank, seed: int, length: int = LENGTH) -> Sequence:
    """In blocks of its own; what they held before is gone."""
    blocks = [seed * 10 + index for index in range(-(-length // BLOCK))]
    rank.cache.tensor[blocks] = float("nan")
    return sequence(tokens(length, seed), blocks)


def in_chunks(rank: Rank, item: Sequence, sizes: list[int]) -> Tensor:
    """(tokens, vocab): `sizes` at a time, over and over."""
    logits = list[Tensor]()
    while item.remaining:
        logits.append(forward(rank, [(item, min(item.remaining, sizes[len(logits) % len(sizes)]))]).logits)
    return torch.cat(logits)


@pytest.mark.parametrize("sizes", [[1], [33, 1], [7, 16, 22], [69, 1]], ids=str)
def test_logits_have_the_same_bits_however_a_prompt_is_cut(rank: Rank, sizes: list[int]) -> None:
    whole = in_chunks(rank, prompt(rank, 1), [LENGTH])
    assert whole.isfinite().all() and len(whole.unique(dim=0)) == LENGTH
    assert torch.equal(in_chunks(rank, prompt(rank, 1), sizes), whole)


def test_kv_has_the_same_bytes_however_a_prompt_is_cut(rank: Rank) -> None:
    """What a prefix cache or a hand-off passes on does not depend on who computed it, or in which steps."""
    blocks = [10, 11, 12, 13, 14, 15, 16, 17]
    in_chunks(rank, prompt(rank, 1), [LENGTH])
    whole = rank.cache.read(blocks)
    in_chunks(rank, prompt(rank, 1), [13, 1])
    assert torch.equal(rank.cache.read(blocks), whole)


def test_logits_have_the_same_bits_in_any_batch(rank: Rank) -> None:
    """A decode among prompts and chunks, first, in the middle and last."""
    alone = {seed: in_chunks(rank, prompt(rank, seed), [LENGTH]) for seed in range(6)}
    for order in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4)):
        items = {seed: prompt(rank, seed) for seed in order}
        for counts in ((69, 20, 1, 40, 70, 5), (1, 1, 1, 30, 0, 64), (0, 49, 1, 0, 0, 1)):
            work = [(items[seed], counts[seed]) for seed in order if counts[seed]]
            starts = [item.computed for item, _ in work]
            output = forward(rank, work)
            assert output.finite.all()
            parts = output.logits.split([count for _, count in work])
            seeds = [seed for seed in order if counts[seed]]
            for seed, start, (_, count), part in zip(seeds, starts, work, parts, strict=True):
                assert torch.equal(part, alone[seed][start : start + count]), f"sequence {seed} of {order}"


def test_the_number_of_threads_does_not_matter(rank: Rank) -> None:
    model = rank.runner._model
    assert isinstance(model, PackedTransformer)
    usual, team = model._team, native.Team(1)
    whole = in_chunks(rank, prompt(rank, 1), [LENGTH])
    try:
        for model._team in (team, native.Team(4)):
            assert torch.equal(in_chunks(rank, prompt(rank, 1), [LENGTH]), whole)
    finally:
        model._team = usual


def as_asked(rank: Rank, work: list[tuple[Sequence, int]]) -> StepOutput:
    """One step as the engine asks for it, with the logits of whole sequences' last tokens."""
    output = rank.runner.forward(pack(build_batch([Scheduled(*item) for item in work]), BLOCK))
    for item, count in work:
        item.computed += count
    return output


def test_last_tokens_alone_have_the_same_bits_and_leave_the_same_kv(rank: Rank) -> None:
    items = [prompt(rank, seed) for seed in (1, 2, 3)]
    blocks = [block for item in items for block in item.blocks[: LENGTH // BLOCK]]
    alone = [in_chunks(rank, item, [LENGTH])[-1] for item in items]
    written = rank.cache.read(blocks)
    items = [prompt(rank, seed) for seed in (1, 2, 3)]
    assert as_asked(rank, list(zip(items, (69, 1, 33), strict=True))).logits.shape[0] == 0
    output = as_asked(rank, [(item, item.remaining) for item in items])
    assert torch.equal(output.logits, torch.stack(alone))
    assert torch.equal(rank.cache.read(blocks), written)


def test_broken_kv_of_the_last_layer_is_reported_by_a_chunk_that_asks_for_nothing(rank: Rank) -> None:
    """Else the prefix cache would pass it on."""
    item = prompt(rank, 1)
    as_asked(rank, [(item, 40)])
    rank.cache.tensor[item.blocks[4], -1, 0, :, 7] = float("nan")  # token 39
    assert as_asked(rank, [(item, 20)]).finite.tolist() == [False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_broken_kv_is_reported_and_touches_nobody_else(rank: Rank, part: int, value: float) -> None:
    alone = {seed: in_chunks(rank, prompt(rank, seed), [LENGTH]) for seed in (1, 2, 3)}
    items = [prompt(rank, seed) for seed in (1, 2, 3)]
    forward(rank, [(item, count) for item, count in zip(items, (69, 69, 50), strict=True)])
    rank.cache.tensor[items[1].blocks[8], 0, part, :, 2] = value  # token 66, in sight of a window too
    work = [(items[0], 1), (items[1], 1), (items[2], 20)]
    output = forward(rank, work)
    assert output.finite.tolist() == [True, False, True]
    first, _, third = output.logits.split([1, 1, 20])
    assert torch.equal(first, alone[1][69:]) and torch.equal(third, alone[3][50:])


def test_broken_hidden_states_are_reported_and_touch_nobody_else(rank: Rank) -> None:
    """An embedding that is no number, of a token that only one sequence has."""
    model = rank.runner._model
    assert isinstance(model, PackedTransformer)
    alone = in_chunks(rank, prompt(rank, 1), [LENGTH])
    unused = next(token for token in range(199) if token not in tokens(LENGTH, 1))
    kept = model.embedding.weight[unused].clone()
    model.embedding.weight[unused, 3] = float("nan")
    try:
        sound, broken = prompt(rank, 1), prompt(rank, 2)
        broken.token_ids[40] = unused
        output = forward(rank, [(broken, 45), (sound, 30)])
        assert output.finite.tolist() == [False, True]
        assert torch.equal(output.logits[45:], alone[:30])
        output = forward(rank, [(sound, 40), (broken, 25)])  # its later tokens see the broken one
        assert output.finite.tolist() == [True, False]
        assert torch.equal(output.logits[:40], alone[30:])
    finally:
        model.embedding.weight[unused] = kept


def test_the_engine_ends_a_broken_sequence_only(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = Engine.load(engine_config(tmp_path))
    assert engine.attention_backend == "native"
    items = [sequence(tokens(9, seed), [2 * seed, 2 * seed + 1], 4) for seed in range(3)]
    engine.forward([Scheduled(item, 8) for item in items])
    engine._rank.cache.tensor[items[1].blocks[0], 1, 0, :, 3] = float("nan")
    for item in items:
        item.computed = 8
    results = engine.forward([Scheduled(item, 1) for item in items])
    assert [result.error for result in results] == ["", NOT_FINITE, ""]
    assert [len(result.token_ids) for result in results] == [1, 0, 1]
    engine.close()


def test_backends_agree_on_tokens(tmp_path: Path) -> None:
    build("qwen2", tmp_path)
    prompts = [tokens(length, length) for length in (1, 9, 40, 77)]
    found = []
    for backend in ("native", "cpu"):
        engine = Engine.load(engine_config(tmp_path, attention_backend=backend))
        found.append(generate(engine, prompts, 12))
        engine.close()
    assert found[0] == found[1]


def test_layers_are_reported_in_order_each_with_its_kv(rank: Rank) -> None:
    """The hand-off pushes a layer's KV as soon as it is called final."""
    item, kv = prompt(rank, 1, 20), list[Tensor]()
    batch = pack(build_batch([Scheduled(item, 20)]), BLOCK)
    written = list[tuple[int, bool]]()

    def after_layer(index: int) -> None:
        kv.append(rank.cache.layers[index][item.blocks[:2]].clone())
        written.append((index, bool(kv[-1].isfinite().all())))

    rank.runner.forward(batch, after_layer)
    assert written == [(0, True), (1, True)]
    for index, part in enumerate(kv):
        assert torch.equal(rank.cache.layers[index][item.blocks[:2]], part)


@pytest.mark.parametrize("inner", [32, 40, 96])
def test_gate_and_up_are_interleaved_by_panels(inner: int) -> None:
    """Row by row: sixteen of gate, sixteen of up; the last panels end in zeros."""
    rows = torch.arange(2 * inner, dtype=torch.float32)
    weight, bias = interleaved(rows[:, None].repeat(1, 3) + 1, rows + 1)
    assert bias is not None and torch.equal(weight[:, 0], bias) and len(weight) == 2 * (-(-inner // 16) * 16)
    for index in range(len(bias)):
        panel, within = divmod(index, 16)
        of_its_half = panel // 2 * 16 + within
        wanted = of_its_half + panel % 2 * inner + 1 if of_its_half < inner else 0
        assert bias[index] == wanted
