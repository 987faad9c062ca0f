"""Decode steps by graphs: padded, in fixed places, by whatever graph covers them, they are the steps they replace.

Without a GPU a graph is a function that runs the captured launches again, on Triton's interpreter, which proves all
but CUDA's own part: test_attention_triton.py runs this file there. The tests marked gpu capture real graphs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine import graphs as graphs_module
from tandem.engine.attention import create_attention
from tandem.engine.batch import Scheduled, build_batch
from tandem.engine.graphs import Graphs, Key, padded_size
from tandem.engine.group import Group
from tandem.engine.kv_cache import PagedKVCache
from tandem.engine.loader import load_weights
from tandem.engine.models.layers import Placement
from tandem.engine.models.transformer import StepOutput, Transformer
from tandem.engine.plan import Plan
from tandem.engine.runner import ModelRunner, Shape, pack, pad, unpack
from tandem.engine.sampler import look, sample
from tandem.engine.sequence import Sequence
from tests.engine.model_zoo import BLOCK, FAMILIES, build, engine_config, sequence, tokens

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = HAS_CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, CPU = torch.device("cuda" if HAS_CUDA else "cpu"), torch.device("cpu")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs a GPU or Triton's interpreter")
Run = Callable[[], None]


def again(run: Run) -> Run:
    """The graph of a machine without CUDA."""
    return run


def refused(run: Run) -> Run:
    raise RuntimeError("no graphs today\nand a trace")


def unwanted(run: Run) -> Run:
    raise AssertionError("a step was captured that is none of the graphs' business")


def decode_batch(sequences: list[Sequence]) -> Tensor:
    return pack(build_batch([Scheduled(item, 1) for item in sequences]), BLOCK)


def decoding(lengths: list[int]) -> list[Sequence]:
    """Sequences that have computed all but their last token, in blocks of their own."""
    made = list[Sequence]()
    for index, length in enumerate(lengths):
        first = sum(-(-other // BLOCK) for other in lengths[:index])
        item = sequence(tokens(length, index), list(range(first, first + -(-length // BLOCK))))
        item.computed = length - 1
        made.append(item)
    return made


class TestSizes:
    def test_sizes(self) -> None:
        sizes = [padded_size(count) for count in range(1, 41)]
        assert sizes[:10] == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16]
        assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40]
        assert all(size >= count for count, size in enumerate(sizes, start=1))

    def test_what_is_padded_sees_nothing_and_has_no_place(self) -> None:
        packed = decode_batch(decoding([9, 20, 3]))
        before, after = unpack(packed, CPU), unpack(pad(packed, 8, 4), CPU)
        assert Shape.of(pad(packed, 8, 4)) == (8, 8, 8, 4)
        for name in ("token_ids", "positions", "rows"):
            assert torch.equal(getattr(after, name)[:3], getattr(before, name))
        assert after.meta.query_start.tolist() == list(range(9))
        assert after.meta.slot_blocks.tolist() == [*before.meta.slot_blocks.tolist(), -1, -1, -1, -1, -1]
        assert after.meta.slot_offsets[:3].equal(before.meta.slot_offsets)
        assert after.meta.context_lens.tolist() == [9, 20, 3, 0, 0, 0, 0, 0]
        assert after.meta.block_tables[:3, :3].equal(before.meta.block_tables)
        assert not after.meta.block_tables[3:].any() and not after.meta.block_tables[:, 3:].any()

    def test_only_whole_batches_of_single_tokens_are_decodes(self) -> None:
        first, second = decoding([9, 20])
        assert Shape.of(decode_batch([first, second])).is_decode
        second.computed -= 1
        assert not Shape.of(decode_batch([first, second])).is_decode  # the second's chunk does not reach its end
        assert not Shape.of(pack(build_batch([Scheduled(second, 2)]), BLOCK)).is_decode


class TestGraphs:
    """With a step that only adds up its inputs."""

    def step(self, inputs: Tensor) -> StepOutput:
        self.calls += 1
        return StepOutput((inputs[:2, None] * torch.ones(3, device=inputs.device)).float(), inputs[:2] > 0)

    def run(self, graphs: Graphs, first: int) -> list[float]:
        output = graphs.run(Key(2, 4), torch.tensor([first, first + 1, 7]), self.step)
        return output.logits[:, 0].tolist()

    def test_a_replay_reads_what_is_new(self) -> None:
        self.calls = 0
        graphs = Graphs(CPU, 4, again)
        assert [self.run(graphs, first) for first in (1, 5, 9)] == [[1, 2], [5, 6], [9, 10]]
        assert self.calls == 3

    def test_without_capture_it_goes_on_with_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        self.calls = 0
        graphs = Graphs(CPU, 4, refused)
        assert graphs.cover(4) and not graphs.cover(5)
        with caplog.at_level(logging.WARNING, logger=graphs_module.__name__):
            assert self.run(graphs, 3) == [3, 4]
        assert len(caplog.records) == 1 and "no graphs today" in caplog.text and "trace" not in caplog.text
        assert not graphs.cover(1)


class Models:
    """The same weights, step by step and by graphs, on a cache each."""

    def __init__(self, name: str, directory: Path, graphs: Graphs, dtype: str = "float32") -> None:
        from tandem.engine.models.fused import FusedOps

        build(name, directory)
        plan = Plan.make(engine_config(directory, dtype=dtype, attention_backend="reference"))
        self.model = Transformer(plan.model, Placement(DEVICE, getattr(torch, plan.layout.dtype), Group()))
        load_weights(plan.checkpoint, self.model.slots(), None)
        self.model.ops = FusedOps()
        self.caches = [PagedKVCache(plan.layout, 72, DEVICE) for _ in range(2)]
        values = torch.randn(self.caches[0].tensor.shape, generator=torch.Generator().manual_seed(1))
        for cache in self.caches:
            cache.tensor.copy_(values)
        attention = create_attention("triton", DEVICE)[0]
        self.eager = ModelRunner(self.model, self.caches[0], attention)
        self.fast = ModelRunner(self.model, self.caches[1], attention, graphs)

    def agree(self, packed: Tensor) -> None:
        wanted, found = self.eager.forward(packed), self.fast.forward(packed)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.finite, wanted.finite)
        torch.testing.assert_close(self.caches[1].tensor, self.caches[0].tensor, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"], ids=lambda name: f"triton-{name}")
def test_steps_by_graphs_are_the_steps(name: str, tmp_path: Path) -> None:
    models = Models(name, tmp_path, Graphs(DEVICE, 4, again))
    for lengths in ([30, 9, 1], [3, 25, 8]):
        models.agree(decode_batch(decoding(lengths)))


@needs_triton
def test_a_graph_covers_the_sizes_and_contexts_up_to_its_own_triton(tmp_path: Path) -> None:
    captured = list[Run]()

    def capture(run: Run) -> Run:
        captured.append(run)
        return run

    models = Models("llama", tmp_path, Graphs(DEVICE, 4, capture))
    for lengths, graphs in (([1, 2, 3], 1), ([7, 2, 5, 11], 1), ([260], 2), ([256], 3), ([9], 3), ([400], 3)):
        models.agree(decode_batch(decoding(lengths)))
        assert len(captured) == graphs


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy computes, in the interpreter
def test_a_broken_sequence_is_told_from_its_neighbours_triton(tmp_path: Path) -> None:
    models, sequences = Models("llama", tmp_path, Graphs(DEVICE, 8, again)), decoding([9, 20, 3])
    for cache in models.caches:
        cache.tensor[sequences[1].blocks[0]] = float("nan")
    for _ in range(2):
        assert models.fast.forward(decode_batch(sequences)).finite.tolist() == [True, False, True]


@needs_triton
def test_prompts_and_callers_who_watch_layers_do_without_triton(tmp_path: Path) -> None:
    models = Models("llama", tmp_path, Graphs(DEVICE, 2, unwanted))
    sequences, seen = decoding([9, 20, 3]), list[int]()
    models.agree(decode_batch(sequences))  # too many
    models.agree(pack(build_batch([Scheduled(sequence(tokens(5, 3), [60]), 5)]), BLOCK))
    models.fast.forward(decode_batch(sequences[:1]), seen.append)
    assert seen == [0, 1]


class Fetches:
    """Lets the sampler's own fetches wait for the device, and counts them; nothing else may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forbid: Callable[[bool], None]) -> None:
        from tandem.engine import sampler

        fetch = sampler._list
        self.count = 0

        def counted(tensor: Tensor) -> list[Any]:
            self.count += 1
            forbid(False)
            values = fetch(tensor)
            forbid(True)
            return values

        monkeypatch.setattr(sampler, "_list", counted)


SAMPLINGS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({"temperature": 0.0}, 1),
    "random": ({"temperature": 1.0}, 2),
    "all": ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1,
             "presence_penalty": 0.1, "logit_bias": ((3, 1.0),), "min_tokens": 5, "stop_token_ids": (4,)}, 2),
    "logprobs": ({"temperature": 0.0, "logprobs": 3}, 3),
}  # fmt: skip


def sampled_decodes(sampling: dict[str, Any]) -> list[Sequence]:
    from tandem.common.request import Leg, SamplingParams

    legs = [
        Leg(f"r{index}", 0, tuple(tokens(9, index)), SamplingParams(max_tokens=9, **sampling)) for index in range(2)
    ]
    made = [Sequence.from_leg(leg, 0.0) for leg in legs]
    for index, item in enumerate(made):
        item.blocks, item.computed = [2 * index, 2 * index + 1], 8
    return made


@pytest.mark.parametrize("case", SAMPLINGS)
def test_sampling_fetches_once_and_once_for_draws(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, where waiting cannot be seen: nothing but the counted fetches may read a value."""
    sampling, fetches = SAMPLINGS[case]

    def read(self: Tensor) -> Any:
        raise AssertionError("a value was read from the device")

    counted = Fetches(monkeypatch, lambda on: None)
    for method in ("item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, method, read)
    sequences, logits = sampled_decodes(sampling), torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    peaks, _ = look(logits, torch.ones(2, dtype=torch.bool))
    assert not any(result.error for result in sample(logits, sequences, peaks))
    assert counted.count == fetches


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("case", SAMPLINGS)
@pytest.mark.parametrize("by_graph", [False, True])
def test_only_the_fetches_wait_for_the_device(
    case: str, by_graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, fetches = SAMPLINGS[case]
    models, sequences = Models("qwen3", tmp_path, Graphs(DEVICE, 8), "bfloat16"), sampled_decodes(sampling)
    runner = models.fast if by_graph else models.eager

    def step() -> None:
        output = runner.forward(decode_batch(sequences))
        peaks, _ = look(output.logits, output.finite)
        assert not any(result.error for result in sample(output.logits, sequences, peaks))

    step()  # compiles and captures
    counted = Fetches(monkeypatch, lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default"))
    with ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("error")
        step()
    assert counted.count == fetches


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_real_graphs_are_the_steps(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = Models(name, tmp_path, Graphs(DEVICE, 16))
    for lengths in ([30, 9, 17], [3, 40, 8], [70, 2, 5, 11], [260], [5], [8] * 13, [400, 17], [9] * 16):
        models.agree(decode_batch(decoding(lengths)))
    assert not caplog.records
