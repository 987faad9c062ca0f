"""`kv_cache_dtype` and `quantization` fp8, from flags to tokens: what is chosen, what is refused, and P and D on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tandem.common.errors import ConfigError, TicketRefused
from tandem.decode_worker.limits import DecodeLimits
from tandem.engine.engine import Engine
from tandem.engine.group import Group
from tandem.engine.loader import load_weights
from tandem.engine.models.layers import Placement
from tandem.engine.models.transformer import Transformer
from tandem.engine.plan import Plan
from tandem.engine.quantization import float8
from tandem.prefill_worker.worker import PrefillLimits
from tests.engine.model_zoo import Greedy, build, engine_config, generate, oracle_logits, sequence, tokens
from tests.engine.quantized_zoo import FORMATS, write_both
from tests.engine.test_models import step
from tests.fakes import FakeEngine
from tests.worker_pair import Decode, Pair, Prefill

CPU = torch.device("cpu")
PROMPTS = [tokens(length, 70 + length) for length in (1, 8, 30, 61)]
COUNT = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("qwen3", path)
    return path


def load(directory: Path, **flags: Any) -> Engine:
    return Engine.load(engine_config(directory, kv_cache_dtype="fp8", **flags))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper as far as plans are concerned: nothing is allocated on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


# --------------------------------------------------------------------------------------------------------------- KV


@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_logits_with_kv_in_fp8_are_near_those_without(name: str, tmp_path: Path) -> None:
    oracle = build(name, tmp_path)
    engine, prompt = load(tmp_path, dtype="float32"), tokens(30, 4)
    assert engine.store.layout.dtype == "float8_e4m3fn" and engine._rank.cache.tensor.dtype == float8.DTYPE
    (logits,) = step(engine._rank, (sequence(prompt, [1, 2, 3, 4]), 30))
    error = float((logits - oracle_logits(oracle, prompt)).norm() / oracle_logits(oracle, prompt).norm())
    assert 0.002 < error < 0.15


def test_tokens_do_not_depend_on_chunks(directory: Path) -> None:
    engine, found = load(directory, dtype="float32"), list[list[list[int]]]()
    for chunk in (64, 5):
        greedy = Greedy(engine, chunk)
        made = [greedy.add(prompt, COUNT) for prompt in PROMPTS]
        greedy.run()
        found.append([item.output_ids for item in made])
    assert found[0] == found[1]


def test_it_takes_a_byte_for_each_number(directory: Path) -> None:
    plain = Engine.load(engine_config(directory, dtype="float32", attention_backend="cpu"))
    engine = load(directory, dtype="float32")
    assert plain.layout.block_bytes == 4 * engine.layout.block_bytes
    assert engine.describe()["kv_cache_dtype"] == "float8_e4m3fn" and engine.describe()["dtype"] == "float32"
    engine = load(directory, kv_cache_memory_bytes=engine.layout.block_bytes * 5 + 17)
    assert engine.num_blocks == 5


def test_two_ranks_keep_their_heads_in_it(directory: Path) -> None:
    threads, one, two = torch.get_num_threads(), load(directory), load(directory, tensor_parallel_size=2)
    try:
        assert generate(one, PROMPTS[:2], COUNT) == generate(two, PROMPTS[:2], COUNT)
        blocks = one.store.read([0, 2]).view(float8.DTYPE).float(), two.store.read([0, 2]).view(float8.DTYPE).float()
        torch.testing.assert_close(*blocks, rtol=0.13, atol=0.02)  # sums over ranks round differently
    finally:
        two.close()
        torch.set_num_threads(threads)


def test_what_is_computed_is_in_the_pairing(directory: Path) -> None:
    flags = ({}, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, {"dtype": "bfloat16"})
    plans = [Plan.make(engine_config(directory, **({"dtype": "float32"} | change))) for change in flags]
    assert len({plan.layout.pairing for plan in plans}) == len({plan.layout.fingerprint for plan in plans}) == 4


class EnginePair(Pair):
    """Pair, of real engines."""

    def __init__(self, prefill: Engine, decode: Engine, connector: str) -> None:
        self._real: dict[str, Any] = {"p": prefill, "d": decode}
        super().__init__(prefill_limits=PrefillLimits(max_num_batched_tokens=16), connector=connector)

    def _decode(self, engine: FakeEngine, limits: DecodeLimits) -> Decode:
        return super()._decode(self._real["d"], limits)

    def _prefill(self, engine: FakeEngine, limits: PrefillLimits) -> Prefill:
        return super()._prefill(self._real["p"], limits)


@pytest.fixture
def engines(directory: Path) -> Iterator[tuple[Engine, Engine]]:
    pair = load(directory, dtype="float32"), load(directory, dtype="float32")
    yield pair
    for engine in pair:
        engine.close()


@pytest.mark.parametrize("connector", ["inproc", "shm", "tcp"])
def test_decode_goes_on_from_prefill_s_cache(engines: tuple[Engine, Engine], directory: Path, connector: str) -> None:
    expected = generate(load(directory, dtype="float32"), PROMPTS, COUNT)
    pair = EnginePair(*engines, connector)
    calls = [pair.request(str(index), prompt, COUNT) for index, prompt in enumerate(PROMPTS)]
    pair.until(lambda: all(call.ended for call in calls), seconds=60.0)
    assert [call.error for call in calls] == [None] * len(calls)
    assert [call.output() for call in calls] == expected
    assert [len(call.prefill.tokens[0]) for call in calls] == [1] * len(calls), "D computed the others"
    pair.assert_conserved()
    pair.close()


def test_a_worker_with_another_kv_dtype_is_refused(engines: tuple[Engine, Engine], directory: Path) -> None:
    plain = Engine.load(engine_config(directory, dtype="float32", attention_backend="cpu"))
    pair = EnginePair(engines[0], plain, "inproc")
    call = pair.request("r", PROMPTS[2], COUNT)
    pair.until(lambda: call.decode.ended)
    assert isinstance(call.error, TicketRefused) and "another KV layout" in str(call.error)
    call.cancel()
    pair.close()
    plain.close()


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype 'int4' is unknown; supported: auto, fp8"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "native"}, "do not read a KV cache in FP8"),
        ({"kv_cache_dtype": "fp8", "deterministic": True}, "kv_cache_dtype auto"),
        ({"kv_cache_dtype": "fp8", "quantization": "int8"}, "kv_cache_dtype auto"),
        ({"quantization": "fp8"}, r"capability 8\.9 or newer: CPUs have no products in FP8; use int8 or int4 there"),
        ({"quantization": "fp8", "deterministic": True}, "CPUs have no products"),
        ({"dtype": "float8_e4m3fn"}, "supported: float32, bfloat16, float16$"),
    ],
)
def test_what_cannot_be_is_refused(directory: Path, flags: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Engine.load(engine_config(directory, **flags))


def plan(directory: Path, **flags: Any) -> Plan:
    return Plan.make(engine_config(directory, **({"device": "cuda", "dtype": "bfloat16"} | flags)))


def test_hopper_holds_weights_in_fp8(directory: Path, cuda: pytest.MonkeyPatch) -> None:
    plain, made = plan(directory), plan(directory, quantization="fp8", kv_cache_dtype="fp8")
    assert made.quantization == "fp8" and made.bits is None and made.layout.dtype == "float8_e4m3fn"
    assert made.in_float8()("model.layers.0.mlp.down_proj.weight") and not plain.in_float8()("x")
    with pytest.raises(ConfigError, match="deterministic needs the native CPU kernels"):
        plan(directory, quantization="fp8", deterministic=True)
    with pytest.raises(
        ConfigError, match=r"quantization fp8 needs dtype bfloat16, .* not float16; add --dtype bfloat16"
    ):
        plan(directory, quantization="fp8", dtype="float16")
    cuda.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"quantization fp8 needs .* 8\.9 or newer, which this one is not"):
        plan(directory, quantization="fp8")


# ------------------------------------------------------------------------------------------------- published in FP8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build("llama", path)
    return path


def test_published_weights_stay_so_where_they_can_be_multiplied(
    llama: Path, tmp_path: Path, cuda: pytest.MonkeyPatch
) -> None:
    left = "model.layers.1.mlp.down_proj"
    path, _ = write_both(llama, tmp_path, FORMATS["fp8-blocks"], skip=(left,))
    kept, on_cpu, in_float16 = plan(path), plan(path, device="cpu"), plan(path, dtype="float16")
    assert (kept.quantization, on_cpu.quantization, in_float16.quantization) == ("fp8", None, None)
    assert kept.in_float8()("model.layers.0.mlp.down_proj.weight") and not kept.in_float8()(f"{left}.weight")
    assert not on_cpu.in_float8()("model.layers.0.mlp.down_proj.weight")
    assert plan(path, quantization="fp8").layout == kept.layout and kept.layout.pairing != on_cpu.layout.pairing
    cuda.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert plan(path).quantization is None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("fp8", "float", "naive"))])
def test_published_codes_are_kept_unless_scales_are_of_blocks(
    llama: Path, tmp_path: Path, name: str, rank: int
) -> None:
    path, floats = write_both(llama, tmp_path, FORMATS[name])
    made = Plan.make(engine_config(path))
    held, plain = (
        Transformer(made.model, Placement(CPU, torch.float32, Group(rank, 2), choose))
        for choose in (lambda name: True, lambda name: False)
    )
    load_weights(made.checkpoint, held.slots(), None)
    load_weights(Plan.make(engine_config(floats)).checkpoint, plain.slots(), None)
    for first, second in zip(held.slots(), plain.slots(), strict=True):
        if isinstance(first.holder, Tensor):
            assert torch.equal(first.target, second.target)
            continue
        assert first.holder.float8 is not None
        mine, wanted = first.holder.float8.rows(first.row, first.row + len(second.target)), second.target
        error = (mine.dequantize() - wanted).abs()
        if name in ("fp8-cut-blocks", "float-block"):  # the others' blocks are as wide as this model
            assert float(error.max()) > 0
            assert bool((error <= torch.maximum(wanted.abs() / 15.9, mine.scales * 2.0**-10)).all())
        else:
            assert float(error.max()) < 1e-6, "another order of the same product"
            stored = load_file(path / "model.safetensors")[first.name].narrow(first.axis, first.start, first.size)
            assert torch.equal(mine.codes.view(torch.uint8), stored.contiguous().view(torch.uint8))
