"""On the CPU kernels the weights of quantized checkpoints stay the codes that were published; see
test_quantization_checkpoints.py for what they compute."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tandem.engine.batch import Scheduled
from tandem.engine.checkpoint import Checkpoint
from tandem.engine.engine import Engine
from tandem.engine.group import Group
from tandem.engine.kernels import native
from tandem.engine.loader import load_weights
from tandem.engine.models.layers import Placement
from tandem.engine.models.packed import PackedTransformer
from tandem.engine.models.transformer import Transformer
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tests.engine.model_zoo import Greedy, build, engine_config, tokens
from tests.engine.quantized_zoo import (
    FORMATS,
    Format,
    check_near,
    compressed,
    gptq,
    gptq_config,
    groups,
    shuffled_pack,
    write_both,
)
from tests.engine.test_native_model import in_chunks, prompt
from tests.engine.test_quantization_checkpoints import logits

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")

WEIGHTS = ("qkv", "output", "gate_up", "down")
Write = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A small Llama with the projections of a format, and as floats."""

    def make(form: Format, **sizes: int) -> tuple[Path, Path]:
        (tmp_path / "plain").mkdir()
        build("llama", tmp_path / "plain", **sizes)
        return write_both(tmp_path / "plain", tmp_path, form)

    return make


def packed(directory: Path) -> list[dict[str, native.Packed]]:
    """Each layer's WEIGHTS."""
    model = Rank.load(Plan.make(engine_config(directory)), Group()).runner._model
    assert isinstance(model, PackedTransformer)
    return [dict(zip(WEIGHTS, layer.weights, strict=True)) for layer in model.layers]


def with_codes(layer: dict[str, native.Packed]) -> set[str]:
    return {name for name, weight in layer.items() if weight.matrix.kind in native.CODES.values()}


def test_four_bits_take_little_more_memory(write: Write) -> None:
    """Half a byte, and eight bytes for scale and zero of each 64."""
    path, floats = write(Format(gptq_config(4, 64), gptq(4, 64)), intermediate_size=128)
    for layer in packed(path):
        for name, weight in layer.items():
            size = sum(tensor.nbytes for tensor in weight.tensors) / (weight.matrix.outputs * weight.matrix.inputs)
            assert 0.5 < size <= 0.65, name
    check_near(logits(path), logits(floats))


@pytest.mark.parametrize("name", FORMATS)
def test_what_has_codes_keeps_them(write: Write, name: str) -> None:
    form = FORMATS[name]
    path, _ = write(form)
    for layer in packed(path):
        assert with_codes(layer) == (set(WEIGHTS) if form.grouped else set())


def test_loading_allocates_no_floats_for_codes(write: Write) -> None:
    path, _ = write(FORMATS["gptq-4"])
    model = Transformer(Plan.make(engine_config(path)).model, Placement(torch.device("cpu"), torch.float32, Group()))
    load_weights(Checkpoint.open(path), model.slots(), None)
    for layer in model.layers:
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
            assert linear.codes is not None and "weight" not in vars(linear)


def test_floats_made_of_codes_go_with_their_layer(write: Write) -> None:
    """At once: a cycle of references kept those of all layers until the last was quantized."""
    path, _ = write(FORMATS["gptq-4"])
    model = Transformer(Plan.make(engine_config(path)).model, Placement(torch.device("cpu"), torch.float32, Group()))
    load_weights(Checkpoint.open(path), model.slots(), None)
    gc.disable()
    try:
        floats = [weakref.ref(linear.weight) for linear in (model.layers[0].mlp.down, model.layers[0].attention.qkv)]
        model.layers.pop(0)
        assert [reference() for reference in floats] == [None, None]
    finally:
        gc.enable()


def test_parts_that_are_not_alike_become_floats(write: Write) -> None:
    """Keys in smaller groups than queries and values, and an output projection in activation order."""
    config = groups("pack-quantized", strategy="group", num_bits=4, group_size=32)
    weights = config["config_groups"]["group_0"]["weights"]
    for kind, changes in (("k", {"group_size": 16}), ("o", {"actorder": "group"})):
        group = {"targets": [f"re:.*{kind}_proj$"], "weights": weights | changes}
        config["config_groups"][kind] = group
    usual = FORMATS["pack-4-group"].write
    kinds = {"k": compressed("pack-quantized", "group", num_bits=4, group_size=16), "o": shuffled_pack(32)}
    names = iter(["down", "gate", "up", "k", "o", "q", "v"] * 2)  # as they lie in the file
    path, floats = write(Format(config, lambda *shape: kinds.get(next(names), usual)(*shape)))
    for layer in packed(path):
        assert with_codes(layer) == {"gate_up", "down"}
    check_near(logits(path), logits(floats))


@pytest.mark.parametrize(("inner", "size", "down_has_codes"), [(40, -1, True), (40, 8, False), (8, 4, False)])
def test_an_mlp_that_does_not_fill_its_panels(write: Write, inner: int, size: int, down_has_codes: bool) -> None:
    """Inputs are filled up to 48 or 16: one group can grow, of several the last would be longer than the others."""
    path, floats = write(Format(gptq_config(4, size), gptq(4, size)), intermediate_size=inner)
    for layer in packed(path):
        assert ("gate_up" in with_codes(layer), "down" in with_codes(layer)) == (True, down_has_codes)
    check_near(logits(path), logits(floats))


def test_quantization_is_that_of_the_floats(write: Write) -> None:
    quantized, floats = write(FORMATS["gptq-4"])
    assert torch.equal(logits(quantized, quantization="int8"), logits(floats, quantization="int8"))


def test_logits_have_the_same_bits_however_a_prompt_is_cut(write: Write) -> None:
    path, _ = write(FORMATS["pack-4-asymmetric"])
    rank = Rank.load(Plan.make(engine_config(path)), Group())
    whole = in_chunks(rank, prompt(rank, 1), [70])
    assert torch.equal(in_chunks(rank, prompt(rank, 1), [33, 1]), whole)


def test_two_ranks_compute_what_one_computes(write: Write) -> None:
    """The KV of the second layer comes from all four products of the first."""
    path, _ = write(FORMATS["gptq-4-v2"])  # groups of 16
    threads, found = torch.get_num_threads(), []
    for world in (1, 2):
        engine = Engine.load(engine_config(path, tensor_parallel_size=world))
        try:
            made = Greedy(engine).add(tokens(30, 5), 1)
            engine.forward([Scheduled(made, 30)])
            found.append(engine.store.read(made.blocks[:3]).view(torch.float32))
        finally:
            engine.close()
            torch.set_num_threads(threads)
    check_near(found[1], found[0])
