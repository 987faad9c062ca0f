"""Engine.forward, driven by the least scheduler there is, writes what transformers' `generate` writes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.common.errors import ConfigError, InvalidRequest
from tandem.engine.batch import Scheduled
from tandem.engine.engine import Engine
from tests.engine.model_zoo import (
    BLOCK,
    FAMILIES,
    VOCAB,
    Greedy,
    build,
    engine_config,
    generate,
    oracle_generate,
    sequence,
    tokens,
)

PROMPTS = [tokens(length, 10 + length) for length in (1, 2, 7, 8, 9, 24, 63, 100)]
COUNT = 12


class Loaded:
    def __init__(self, name: str, directory: Path) -> None:
        self.oracle: Any = build(name, directory)
        self.directory = directory
        self.engine = Engine.load(engine_config(directory))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    made = Loaded(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    made = Loaded("qwen3", tmp_path_factory.mktemp("qwen"))
    yield made
    made.engine.close()


def test_greedy_generation_equals_transformers(loaded: Loaded) -> None:
    """Eight prompts at once, in chunks that end anywhere, decoding while others are still prefilled."""
    wanted = [oracle_generate(loaded.oracle, prompt, COUNT) for prompt in PROMPTS]
    assert generate(loaded.engine, PROMPTS, COUNT) == wanted
    assert len({tuple(output) for output in wanted}) == len(wanted)  # the prompts matter


def test_a_shared_prefix_is_computed_once(qwen: Loaded) -> None:
    prefix = tokens(5 * BLOCK, 3)
    prompts = [prefix + tokens(length, length) for length in (1, 6, 20)]
    greedy = Greedy(qwen.engine)
    owner = greedy.add(prefix, 1)
    greedy.run()
    made = [greedy.add(prompt, COUNT, owner.blocks[:5], computed=len(prefix)) for prompt in prompts]
    greedy.run()
    assert [item.output_ids for item in made] == [oracle_generate(qwen.oracle, prompt, COUNT) for prompt in prompts]


def test_blocks_moved_to_another_engine_go_on_there(qwen: Loaded) -> None:
    """Prefill here, decode there: what the hand-off does, without the network."""
    prompt = tokens(29, 8)
    source, target = Greedy(qwen.engine), Greedy(Engine.load(engine_config(qwen.directory)), next_block=50)
    here = source.add(prompt, 1)
    source.run()
    payload = qwen.engine.store.read(here.blocks[:4])
    assert payload.shape == (4, qwen.engine.layout.block_bytes) and payload.dtype == torch.uint8
    target.engine.store.write([40, 3, 41, 7], payload)
    there = target.add(prompt + here.output_ids, COUNT - 1, [40, 3, 41, 7], computed=len(prompt))
    target.run()
    assert here.output_ids + there.output_ids == oracle_generate(qwen.oracle, prompt, COUNT)
    assert target.engine.layout == qwen.engine.layout


def test_a_copied_block_serves_like_its_source(qwen: Loaded) -> None:
    store = qwen.engine.store
    greedy = Greedy(qwen.engine, next_block=8)
    owner = greedy.add(tokens(BLOCK, 5), 1, [2])
    greedy.run()
    store.copy(owner.blocks[0], 6)
    assert torch.equal(store.read([2]), store.read([6])) and store.read([2]).any()


def test_forward_leaves_the_sequences_alone(qwen: Loaded) -> None:
    item = sequence(tokens(9, 1), [0, 1])
    first, again = (qwen.engine.forward([Scheduled(item, 9)]) for _ in range(2))
    assert first == again and first[0].sequence is item
    assert (item.computed, len(item.token_ids), item.blocks) == (0, 9, [0, 1])
    assert qwen.engine.forward([Scheduled(item, 4)]) == []
    assert qwen.engine.forward([]) == []


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 40])
def test_a_foreign_token_id_is_refused_by_name(qwen: Loaded, token: int) -> None:
    item = sequence([3, token], [0])
    item.request_id = "req-17"
    with pytest.raises(InvalidRequest, match="req-17"):
        qwen.engine.forward([Scheduled(item, 2)])


def test_a_poisoned_sequence_does_not_disturb_the_others(qwen: Loaded) -> None:
    """NaN in one sequence's KV, as a hardware fault or an overflow leaves it."""
    prompts = [tokens(20, 30), tokens(20, 31)]
    greedy = Greedy(qwen.engine)
    sick, well = (greedy.add(prompt, 1) for prompt in prompts)
    greedy.run()
    spoil(qwen.engine, sick.blocks[:1])
    failed, good = qwen.engine.forward([Scheduled(sick, 1), Scheduled(well, 1)])
    assert failed.sequence is sick and failed.error and not failed.token_ids
    assert good.token_ids == (oracle_generate(qwen.oracle, prompts[1], 2)[1],)
    qwen.engine.store.zero(sick.blocks)


def spoil(engine: Engine, blocks: list[int]) -> None:
    engine.store.write(blocks, torch.full((len(blocks), engine.layout.block_bytes), 0xFF, dtype=torch.uint8))


def test_a_poisoned_prompt_is_told_of_before_it_samples(qwen: Loaded) -> None:
    """A chunk that ends before its prompt does has no logits, but what it computed must not be published or sent."""
    sick, well, fresh = (sequence(tokens(40, seed), list(range(at, at + 5))) for seed, at in ((1, 0), (2, 5), (3, 10)))
    assert qwen.engine.forward([Scheduled(one, 16) for one in (sick, well)]) == []
    sick.computed = well.computed = 16
    spoil(qwen.engine, sick.blocks[:1])
    (failed,) = qwen.engine.forward([Scheduled(well, 8), Scheduled(sick, 8), Scheduled(fresh, 1)])
    assert failed.sequence is sick and "not finite" in failed.error and not failed.token_ids
    assert torch.isfinite(qwen.engine.store.read(well.blocks[:3]).view(torch.float32)).all()
    qwen.engine.store.zero(sick.blocks)
    assert not qwen.engine.store.read(sick.blocks).any()


def test_one_bad_token_in_the_midst_of_a_chunk_is_enough(qwen: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = getattr(qwen.engine._rank.runner._model, "embedding")  # noqa: B009  (both kinds of model have one)
    embed = embedding.embed

    def spoiled(ids: torch.Tensor) -> torch.Tensor:
        hidden = embed(ids).clone()
        hidden[12, 3] = float("inf")  # the third token of the second sequence
        return hidden

    monkeypatch.setattr(embedding, "embed", spoiled)
    first, second = sequence(tokens(10, 1), [0, 1]), sequence(tokens(10, 2), [2, 3])
    good, failed = qwen.engine.forward([Scheduled(first, 10), Scheduled(second, 9 + 1)])
    assert (good.sequence, good.error) == (first, "") and failed.sequence is second and failed.error
    qwen.engine.store.zero(second.blocks)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stale_nan_behind_a_sequence_is_not_seen(qwen: Loaded, backend: str) -> None:
    """A block is not wiped when it changes hands: what lies behind the new owner's tokens must not count."""
    engine = Engine.load(engine_config(qwen.directory, attention_backend=backend))
    spoil(engine, list(range(engine.num_blocks)))
    prompts = [tokens(3, 9), tokens(17, 9)]
    assert generate(engine, prompts, COUNT) == [oracle_generate(qwen.oracle, prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize(("group", "calls"), [(1, [(0, 1), (1, 1)]), (2, [(0, 2)]), (5, [(0, 2)])])
def test_groups_of_layers_are_final_when_they_are_told(qwen: Loaded, group: int, calls: list[tuple[int, int]]) -> None:
    store, layer_bytes = qwen.engine.store, qwen.engine.layout.layer_bytes
    one, other = sequence(tokens(20, 4), [4, 2, 9]), sequence(tokens(3, 5), [7])
    store.zero([4, 2, 9, 7])
    seen = list[tuple[int, int]]()
    bytes_then = list[torch.Tensor]()

    def on_layers(first: int, count: int) -> None:
        seen.append((first, count))
        assert store.memory is not None
        rows = store.memory[[4, 2, 9, 7]]
        bytes_then.append(rows[:, first * layer_bytes : (first + count) * layer_bytes].clone())
        assert rows[:, : first * layer_bytes].any() == (first > 0)
        assert not rows[:, (first + count) * layer_bytes :].any(), "later layers are not computed yet"

    with_hook = qwen.engine.forward([Scheduled(one, 20), Scheduled(other, 3)], on_layers, group)
    assert seen == calls
    assert torch.equal(torch.cat(bytes_then, dim=1), store.read([4, 2, 9, 7])) and bytes_then[0].any()
    assert with_hook == qwen.engine.forward([Scheduled(one, 20), Scheduled(other, 3)])


def test_what_the_engine_says_about_itself(qwen: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tandem.engine"):
        engine = Engine.load(engine_config(qwen.directory))
    layout = engine.layout
    assert (layout.layers, layout.kv_heads, layout.head_dim, layout.block_size) == (2, 2, 32, BLOCK)
    assert engine.num_blocks == (4 << 20) // layout.block_bytes
    assert (engine.vocab_size, engine.max_model_len, str(engine.device)) == (VOCAB, 512, "cpu")
    assert engine.attention_backend == "native" and engine.why
    assert f"KV cache size: {engine.num_blocks * BLOCK} tokens" in caplog.text
    assert "Loading weights took" in caplog.text and "Attention backend: native" in caplog.text


def test_progress_counts_every_byte(qwen: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    Engine.load(engine_config(qwen.directory), lambda done, total: seen.append((done, total)))
    total = sum(weight.numel() * 4 for weight in qwen.oracle.parameters())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


class TestSizes:
    def test_default_cache_is_no_larger_than_all_sequences_need(self, qwen: Loaded) -> None:
        engine = Engine.load(engine_config(qwen.directory, kv_cache_memory_bytes=None, max_num_seqs=3))
        assert engine.num_blocks == 3 * 512 // BLOCK

    def test_model_len_follows_a_small_cache(self, qwen: Loaded) -> None:
        block_bytes = qwen.engine.layout.block_bytes
        engine = Engine.load(engine_config(qwen.directory, kv_cache_memory_bytes=block_bytes * 5 + 17))
        assert (engine.num_blocks, engine.max_model_len) == (5, 5 * BLOCK)

    @pytest.mark.parametrize(
        ("flags", "fault"),
        [
            ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes"),
            ({"kv_cache_memory_bytes": 1 << 60}, "does not fit"),
            ({"kv_cache_memory_bytes": 1 << 16, "max_model_len": 512}, "raise kv_cache_memory_bytes"),
            ({"max_model_len": 513}, "max_model_len 513"),
            ({"max_model_len": 1}, "max_model_len 1"),
            ({"block_size": 0}, "block_size"),
            ({"dtype": "int8"}, "float32, bfloat16, float16"),
            ({"device": "tpu"}, "auto, cpu, cuda"),
            ({"load_format": "pickle"}, "auto, safetensors, dummy"),
            ({"attention_backend": "magic"}, "magic"),
            ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
            ({"tensor_parallel_size": 3}, "does not divide"),
            ({"quantization": "int2"}, "int8, int4"),
            ({"quantization": "int4", "attention_backend": "cpu"}, "needs the native CPU kernels"),
            ({"deterministic": True, "attention_backend": "reference"}, "needs the native CPU kernels"),
            ({"deterministic": True, "tensor_parallel_size": 2}, "tensor_parallel_size 1"),
            ({"tensor_parallel_size": 4}, "4 does not divide the model's 2 KV heads"),
        ],
    )
    def test_wrong_flags_are_named(self, qwen: Loaded, flags: dict[str, Any], fault: str) -> None:
        with pytest.raises(ConfigError, match=fault):
            Engine.load(engine_config(qwen.directory, **flags))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
    def test_a_missing_gpu_is_named(self, qwen: Loaded) -> None:
        with pytest.raises(ConfigError, match="1 CUDA devices are needed, 0 can be seen"):
            Engine.load(engine_config(qwen.directory, device="cuda"))


class TestDummyWeights:
    def test_are_a_function_of_the_seed(self, qwen: Loaded, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((qwen.directory / "config.json").read_bytes())
        flags = {"load_format": "dummy"}
        engines = [Engine.load(engine_config(tmp_path, seed=seed, **flags)) for seed in (1, 1, 2)]
        first, same, other = (generate(engine, PROMPTS, COUNT) for engine in engines)
        assert first == same != other
        revisions = [engine.layout.revision for engine in engines]
        assert revisions[0] == revisions[1] != revisions[2]
        assert qwen.engine.layout.revision not in revisions
