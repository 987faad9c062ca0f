"""Published quantized checkpoints compute what their weights, written out as floats, compute.

PyTorch computes with the floats that codes stand for, so every bit must be the same; the CPU kernels with the codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.checkpoint import Checkpoint
from tandem.engine.group import Group
from tandem.engine.loader import check_weights, load_weights
from tandem.engine.models.layers import Placement
from tandem.engine.models.transformer import Transformer
from tandem.engine.plan import Plan
from tandem.engine.quantization import create_reader
from tandem.engine.quantization.grouped import GroupedWeight
from tandem.engine.rank import Rank
from tests.engine.model_zoo import build, engine_config, oracle_logits, sequence, tokens
from tests.engine.quantized_zoo import (
    DOWN,
    FORMATS,
    QUERY,
    Format,
    Written,
    check_near,
    edit_config,
    edit_weights,
    write_both,
)
from tests.engine.test_models import step


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float checkpoints of two families; the second one's projections have biases."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("llama", "qwen2")}
    for name, path in made.items():
        build(name, path)
    return made


def logits(directory: Path, **overrides: Any) -> Tensor:
    rank = Rank.load(Plan.make(engine_config(directory, **overrides)), Group())
    return step(rank, (sequence(tokens(20, 3), [0, 1, 2]), 20))[0]


def check_equal(quantized: Path, floats: Path) -> None:
    found = logits(quantized, attention_backend="cpu")
    assert found.isfinite().all() and found.std() > 0.1
    assert torch.equal(found, logits(floats, attention_backend="cpu"))
    check_near(logits(quantized), found)


@pytest.mark.parametrize("name", FORMATS)
def test_computes_what_its_floats_compute(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    form = FORMATS[name]
    quantized, floats = write_both(plain["llama"], tmp_path, form)
    check_equal(quantized, floats)
    weight = create_reader(Checkpoint.open(quantized)).read(f"{DOWN}.weight", (64, 96))
    assert isinstance(weight, GroupedWeight) == form.grouped
    if isinstance(weight, GroupedWeight):
        assert weight.codes.dtype == torch.uint8 and int(weight.codes.max()) < 2**weight.bits
        assert weight.codes.is_contiguous() and weight.scales.is_contiguous() and weight.zeros.is_contiguous()
        assert weight.scales.shape == weight.zeros.shape == (64, 96 // weight.group_size)


@pytest.mark.parametrize("name", ["pack-4-group", "pack-8-channel", "float-channel"])
def test_transformers_reads_the_same(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    """It reads others, too, but not without a GPU or libraries that are not ours."""
    import transformers

    quantized, _ = write_both(plain["llama"], tmp_path, FORMATS[name])
    oracle = transformers.LlamaForCausalLM.from_pretrained(quantized, dtype=torch.float32).eval()
    found = logits(quantized, attention_backend="cpu")
    assert (found - oracle_logits(oracle, tokens(20, 3))).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gptq-4", "awq", "fp8-cut-blocks", "pack-4-group", "int-channel", "float-tensor"])
def test_with_biases(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    check_equal(*write_both(plain["qwen2"], tmp_path, FORMATS[name]))


@pytest.mark.parametrize("name", ["gptq-4", "awq", "fp8"])
def test_modules_left_as_they_are(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    """These formats' files show by what they hold which modules are quantized."""
    check_equal(*write_both(plain["llama"], tmp_path, FORMATS[name], skip=(DOWN, QUERY)))


@pytest.mark.parametrize("ignore", [(DOWN, QUERY, "lm_head"), ("lm_head", "re:.*layers\\.1\\.mlp\\.down", QUERY)])
def test_ignored_modules(plain: dict[str, Path], tmp_path: Path, ignore: tuple[str, ...]) -> None:
    form = FORMATS["pack-4-group"]
    quantized, floats = write_both(plain["llama"], tmp_path, form, skip=(DOWN, QUERY))
    edit_config(quantized, quantization_config=form.config | {"ignore": list(ignore)})
    check_equal(quantized, floats)


def test_a_name_is_a_stronger_target_than_a_pattern_than_a_class(plain: dict[str, Path], tmp_path: Path) -> None:
    """Three schemes in one file: 4 bits for all, 8 for what a pattern meets, FP8 for one module."""
    four, eight, float8 = (FORMATS[name] for name in ("pack-4-group", "pack-8-channel", "float-channel"))
    config = four.config | {"format": "mixed-precision", "config_groups": {}}
    for name, form, target in (("a", four, "Linear"), ("b", eight, r"re:.*\.(q|down)_proj$"), ("c", float8, DOWN)):
        group = form.config["config_groups"]["group_0"] | {"targets": [target], "format": form.config["format"]}
        config["config_groups"][name] = group
    count = 0

    def write(outputs: int, inputs: int, random: torch.Generator) -> Written:
        nonlocal count
        form = (float8 if order[count] == DOWN else eight) if order[count].endswith(("q_proj", "down_proj")) else four
        count += 1
        return form.write(outputs, inputs, random)

    names = load_file(plain["llama"] / "model.safetensors")
    order = [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]
    check_equal(*write_both(plain["llama"], tmp_path, Format(config, write)))


@pytest.mark.parametrize("name", ["gptq-4", "awq", "pack-8-channel"])
def test_two_files(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A weight's tensors may lie in different shards."""
    quantized, floats = write_both(plain["llama"], tmp_path, FORMATS[name])
    tensors = load_file(quantized / "model.safetensors")
    places = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == file}, quantized / file)
    (quantized / "model.safetensors").unlink()
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check_equal(quantized, floats)


@pytest.mark.parametrize("name", ["gptq-4-v2", "gptq-4-g-idx", "fp8-cut-blocks", "int-channel", "pack-4-channel"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_takes_its_slice(plain: dict[str, Path], tmp_path: Path, name: str, rank: int) -> None:
    paths = write_both(plain["llama"], tmp_path, FORMATS[name])
    models = []
    for path in paths:
        place = Placement(torch.device("cpu"), torch.float32, Group(rank, 2))
        models.append(Transformer(Plan.make(engine_config(path)).model, place))
        load_weights(Checkpoint.open(path), models[-1].slots(), None)
    for first, second in zip(*(model.slots() for model in models), strict=True):
        assert torch.equal(first.target, second.target), first.name


def test_a_rank_cannot_have_half_a_group(plain: dict[str, Path], tmp_path: Path) -> None:
    """The shapes show it, before anything is allocated."""
    path, _ = write_both(plain["llama"], tmp_path, FORMATS["awq"])  # down_proj: 3 groups of 32 on 2 ranks
    config, fault = Plan.make(engine_config(path)).model, "down_proj.weight: inputs 48 to 96 cut through the quantizati"
    on_disk, group = Checkpoint.open(path), Group(1, 2)
    with pytest.raises(ConfigError, match=fault):
        check_weights(on_disk, Transformer(config, Placement(torch.device("meta"), torch.float32, group)).slots())
    with pytest.raises(ConfigError, match=fault):
        load_weights(on_disk, Transformer(config, Placement(torch.device("cpu"), torch.float32, group)).slots(), None)


@pytest.mark.parametrize("name", ["gptq-4", "gptq-4-g-idx"])
def test_progress_counts_the_packed_bytes(plain: dict[str, Path], tmp_path: Path, name: str) -> None:
    path, _ = write_both(plain["llama"], tmp_path, FORMATS[name])
    seen: list[tuple[int, int]] = []
    Rank.load(Plan.make(engine_config(path)), Group(), lambda done, total: seen.append((done, total)))
    size = sum(value.numel() * value.itemsize for value in load_file(path / "model.safetensors").values())
    assert seen[-1] == (size, size) and seen == sorted(seen)


def test_what_is_ignored_is_logged(plain: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    form = FORMATS["float-tensor"]
    quantized, floats = write_both(plain["llama"], tmp_path, form)
    group = form.config["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8, "dynamic": True}}
    edit_config(quantized, quantization_config=form.config | {"config_groups": {"group_0": group}})
    edit_weights(quantized, lambda tensors: tensors.update({f"{QUERY[:-7]}.k_scale": torch.ones(1)}))
    with caplog.at_level("INFO"):
        check_equal(quantized, floats)
    assert "ignoring the checkpoint's quantization of activations" in caplog.text
    assert "ignoring the checkpoint's scales of a quantized KV cache" in caplog.text


def test_the_older_name_of_the_section(plain: dict[str, Path], tmp_path: Path) -> None:
    form = FORMATS["pack-4-group"]
    quantized, floats = write_both(plain["llama"], tmp_path, form)
    edit_config(quantized, quantization_config=None, compression_config=form.config)
    check_equal(quantized, floats)
