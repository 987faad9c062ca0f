"""A broken model directory is one line that names the file and the fault; a sound one is read as safetensors does."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.common.errors import ConfigError, ModelError
from tandem.common.model_dir import resolve_model
from tandem.engine.checkpoint import DTYPES, Checkpoint, mapped, read_header, tensor
from tandem.engine.group import Group
from tandem.engine.models.layers import Placement, RowLinear
from tandem.engine.models.registry import parse_config
from tandem.engine.plan import Plan
from tests.engine.model_zoo import build, engine_config

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file and, in `sharded`, the same model in two."""
    path = tmp_path_factory.mktemp("sound")
    build("llama", path)
    weights = load_file(path / "model.safetensors")
    shutil.copytree(path, path / "sharded")
    (path / "sharded" / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, path / "sharded" / file)
    (path / "sharded" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


# ----------------------------------------------------------------------------------------------- ways to break a model


def edit_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        values = json.loads((directory / file).read_text())
        change(values)
        (directory / file).write_text(json.dumps(values))

    return apply


def config(**changes: object) -> Callable[[Path], None]:
    return edit_json("config.json", lambda values: values.update(changes))


def rope(**changes: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_theta": 1e4, **changes})


def index(**changes: object) -> Callable[[Path], None]:
    return edit_json(INDEX, lambda values: values["weight_map"].update(changes))


def header(change: Callable[[dict[str, Any]], object], file: str = "model.safetensors") -> Callable[[Path], None]:
    """Rewrite a shard's header, keeping its data."""

    def apply(directory: Path) -> None:
        raw = (directory / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        (directory / file).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A well-formed file with other tensors."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def raw(change: Callable[[bytes], bytes], file: str = "model.safetensors") -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / file).write_bytes(change((directory / file).read_bytes()))

    return apply


def remove(file: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).unlink()


def move_entry(values: dict[str, Any], by: int) -> None:
    values[NORM]["data_offsets"] = [offset + by for offset in values[NORM]["data_offsets"]]


def swallow_next(values: dict[str, Any]) -> None:
    """Two tensors claim the same bytes, and each has the right size."""
    values["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = values["model.layers.0.mlp.gate_proj.weight"][
        "data_offsets"
    ]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "config.json: cannot be read: No such file"),
    "config not json": (raw(lambda data: data[:-20], "config.json"), "config.json: not valid JSON"),
    "config not text": (raw(lambda data: b"\xff\xfe" * 9, "config.json"), "config.json: not valid JSON"),
    "config too deep": (raw(lambda data: b"[" * 200_000, "config.json"), "config.json: not valid JSON"),
    "config a list": (raw(lambda data: b"[1]", "config.json"), "config.json: not a JSON object"),
    "unknown architecture": (config(architectures=["GPT2LMHeadModel"]), "config.json: architecture GPT2LMHeadModel"),
    "no architecture": (config(architectures=None), "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausal"),
    "architectures no list": (config(architectures=7), "config.json: 'architectures' must be a list of strings"),
    "quantized": (config(quantization_config={"bits": 4}), "config.json: quantization_config: quant_method 'missing'"),
    "activation": (config(hidden_act="gelu"), "config.json: hidden_act 'gelu' is not supported"),
    "no size": (config(hidden_size=None), "config.json: 'hidden_size' must be an integer"),
    "size a text": (config(hidden_size="64"), "config.json: 'hidden_size' must be an integer"),
    "size a bool": (config(hidden_size=True), "config.json: 'hidden_size' must be an integer"),
    "size negative": (config(vocab_size=-1), "config.json: 'vocab_size' must be an integer"),
    "size absurd": (config(intermediate_size=10**15), "config.json: 'intermediate_size' must be an integer"),
    "layers absurd": (config(num_hidden_layers=10**9), "config.json: 'num_hidden_layers' must be an integer"),
    "zero heads": (config(num_attention_heads=0), "config.json: 'num_attention_heads' must be an integer"),
    "uneven heads": (config(num_key_value_heads=3), "4 attention heads do not share 3"),
    "odd head": (config(head_dim=15), "head_dim 15 is odd"),
    "epsilon nan": (config(rms_norm_eps=float("nan")), "config.json: 'rms_norm_eps' must be a number"),
    "bias a number": (config(attention_bias=1), "config.json: 'attention_bias' must be true or false"),
    "dtype a number": (config(dtype=3), "config.json: 'dtype' must be a string"),
    "rope unknown": (rope(rope_type="longrope"), "rope type 'longrope' is not supported; supported: default, linear"),
    "rope incomplete": (rope(rope_type="llama3", factor=8.0), "config.json: 'low_freq_factor' must be a number"),
    "rope not an object": (config(rope_parameters=[]), "config.json: 'rope_parameters' must be an object"),
    "rope partial": (rope(rope_type="default", partial_rotary_factor=0.5), "'partial_rotary_factor' other than 1"),
    "rope factor zero": (rope(rope_type="linear", factor=0), "config.json: 'factor' must be a number above 0"),
    "no weights": (remove("model.safetensors"), "has neither model.safetensors nor"),
    "empty file": (raw(lambda data: b""), "model.safetensors: its header should have 0 bytes, the file has 0"),
    "truncated data": (raw(lambda data: data[:-1000]), "model.safetensors: its tensors end at byte"),
    "truncated header": (raw(lambda data: data[:100]), "model.safetensors: its header should have"),
    "trailing bytes": (raw(lambda data: data + b"x"), "model.safetensors: its tensors end at byte"),
    "huge header": (raw(lambda data: b"\xff" * 8 + data[8:]), "model.safetensors: its header should have"),
    "header not json": (raw(lambda data: data[:8] + b"!" + data[9:]), "model.safetensors: its header is not valid"),
    "a pickle": (raw(lambda data: b"\x80\x04\x95" + data), "model.safetensors: its header should have"),
    "entry a number": (header(lambda values: values.update({NORM: 3})), f"entry of tensor '{NORM}' is malformed: 3"),
    "entry dtype": (header(lambda values: values[NORM].update(dtype="F4")), f"entry of tensor '{NORM}' is malformed"),
    "entry shape": (header(lambda values: values[NORM].update(shape=[-64])), f"entry of tensor '{NORM}' is malformed"),
    "entry too large": (header(lambda values: values[NORM].update(shape=[65])), f"'{NORM}' F32 [65] does not have 256"),
    "entry reversed": (header(lambda values: values[NORM]["data_offsets"].reverse()), f"'{NORM}' F32 [64] does not"),
    "entry beyond the file": (header(lambda values: move_entry(values, 1 << 40)), "leaves a gap before it"),
    "entries overlap": (header(swallow_next), "overlaps another"),
    "entry moved": (header(lambda values: move_entry(values, -4)), "overlaps another"),
    "tensor missing": (weights(lambda tensors: tensors.pop(NORM)), f"model.safetensors: tensor '{NORM}' is missing"),
    "wrong shape": (
        weights(lambda tensors: tensors.update({NORM: torch.ones(63)})),
        f"tensor '{NORM}' has shape [63], but config.json implies [64]",
    ),
    "wrong rank": (weights(lambda tensors: tensors.update({NORM: torch.ones(64, 1)})), "has shape [64, 1]"),
    "config and weights differ": (config(vocab_size=200), f"tensor '{EMBEDDING}' has shape [199, 64]"),
    "wrong dtype": (
        weights(lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int64)})),
        f"tensor '{NORM}' has dtype I64; supported: F32, F16, BF16",
    ),
}
BROKEN_SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (remove(SHARD), f"{SHARD}: the file is missing"),
    "shard truncated": (raw(lambda data: data[:-5], SHARD), f"{SHARD}: its tensors end at byte"),
    "shard a directory": (lambda path: (remove(SHARD)(path), (path / SHARD).mkdir()), f"{SHARD}: cannot be read"),
    "index not json": (raw(lambda data: b"{", INDEX), f"{INDEX}: not valid JSON"),
    "index empty": (raw(lambda data: b"{}", INDEX), f"{INDEX}: 'weight_map' must be an object"),
    "index escapes": (index(**{NORM: "../../x.safetensors"}), "which is not the name of a safetensors file"),
    "index to a pickle": (index(**{NORM: "pytorch_model.bin"}), "which is not the name of a safetensors file"),
    "index to a number": (index(**{NORM: 5}), "which is not the name of a safetensors file"),
    "index lies": (
        index(**{"lm_head.weight": SHARD}),
        f"{SHARD}: tensor 'lm_head.weight' is missing, though {INDEX} places it there",
    ),
    "index forgets": (
        edit_json(INDEX, lambda values: values["weight_map"].pop(NORM)),
        f"sharded: tensor '{NORM}' is missing",
    ),
}


def fault_of(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Plan.make(engine_config(directory))
    assert "\n" not in caught.value.message and str(directory) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_named(sound: Path, tmp_path: Path, name: str) -> None:
    breaking, fault = BROKEN[name]
    for file in ("config.json", "model.safetensors"):
        shutil.copy(sound / file, tmp_path)
    breaking(tmp_path)
    assert fault in fault_of(tmp_path)


@pytest.mark.parametrize("name", BROKEN_SHARDED)
def test_a_broken_sharded_directory_is_named(sound: Path, tmp_path: Path, name: str) -> None:
    breaking, fault = BROKEN_SHARDED[name]
    shutil.copytree(sound / "sharded", tmp_path / "sharded")
    breaking(tmp_path / "sharded")
    assert fault in fault_of(tmp_path / "sharded")


@pytest.mark.parametrize("dtype", ["float64", "int8", "banana"])
def test_a_checkpoint_dtype_nobody_computes_in_is_named(sound: Path, tmp_path: Path, dtype: str) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(sound / file, tmp_path)
    config(dtype=dtype)(tmp_path)
    with pytest.raises(ConfigError, match=f"dtype '{dtype}' is not supported; supported: float32, bfloat16, float16"):
        Plan.make(engine_config(tmp_path))


def test_every_byte_of_a_header_may_be_wrong(sound: Path, tmp_path: Path) -> None:
    """Whatever the damage, the answer is a ModelError or a set of tensors that lie inside the file."""
    data = (sound / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    refused = 0
    for position in range(0, 600, 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        try:
            assert all(8 <= entry.begin <= entry.end <= len(data) for entry in read_header(path).values())
        except ModelError as exc:
            refused += str(path) in exc.message
    assert refused > 40


class TestReading:
    def test_agrees_with_safetensors(self, sound: Path) -> None:
        wanted = load_file(sound / "model.safetensors")
        for directory in (sound, sound / "sharded"):
            checkpoint = Checkpoint.open(directory)
            assert checkpoint.entries.keys() == wanted.keys()
            for name, entry in checkpoint.entries.items():
                with mapped(entry.file) as data:
                    found = tensor(data, entry)
                assert torch.equal(found, wanted[name]) and found.dtype == wanted[name].dtype

    @pytest.mark.parametrize("kind", DTYPES)
    @pytest.mark.parametrize("padding", [0, 1, 2, 3])
    def test_headers_of_any_length(self, tmp_path: Path, kind: str, padding: int) -> None:
        """Old writers do not align the data."""
        path, values = tmp_path / "x.safetensors", torch.arange(6).to(DTYPES[kind])
        save_file({"a": values, "b": values[:0]}, path)
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = data[8 : 8 + length].rstrip() + b" " * padding
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        entries = read_header(path)
        with mapped(path) as file:
            assert torch.equal(tensor(file, entries["a"]), values)
            assert tensor(file, entries["b"]).shape == (0,)


def test_a_weight_for_which_there_is_no_memory() -> None:
    linear = RowLinear("model.x", 1 << 30, 1 << 30, False, Placement(torch.device("cpu"), torch.float32, Group()))
    with pytest.raises(ConfigError, match=r"model\.x: the weight does not fit into memory: "):
        _ = linear.weight


class TestRevision:
    def test_is_the_same_for_a_copy(self, sound: Path, tmp_path: Path) -> None:
        shutil.copytree(sound / "sharded", tmp_path / "copy")
        assert Checkpoint.open(tmp_path / "copy").revision() == Checkpoint.open(sound / "sharded").revision()

    @pytest.mark.parametrize(
        "change",
        [
            config(rope_theta=1.0),
            raw(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
            weights(lambda tensors: [tensor.mul_(1.001) for tensor in tensors.values()]),
            weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING] + 0.001})),
            header(lambda values: values.update(__metadata__={"a": "b"})),
        ],
    )
    def test_tells_models_apart(self, sound: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
        for file in ("config.json", "model.safetensors"):
            shutil.copy(sound / file, tmp_path)
        change(tmp_path)
        assert Checkpoint.open(tmp_path).revision() != Checkpoint.open(sound).revision()


class TestNames:
    @pytest.mark.parametrize("name", ["", "nowhere", "/no/such/directory", "../up/and/away", "a b/c"])
    def test_that_are_neither_a_directory_nor_a_hub_id(self, name: str) -> None:
        with pytest.raises(ModelError, match="is not a directory"):
            resolve_model(name)

    def test_hub_ids_without_a_network(self) -> None:
        with pytest.raises(ModelError, match="'nobody/nothing' is not a directory, and cannot be fetched") as caught:
            resolve_model("nobody/nothing")
        assert "\n" not in caught.value.message

    def test_a_directory(self, sound: Path) -> None:
        assert resolve_model(str(sound)) == sound


class TestConfigs:
    """What published config.json files say in the fields that transformers 5 writes differently."""

    BASE: dict[str, object] = {  # noqa: RUF012
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    }

    def parse(self, architecture: str, **values: object) -> Any:
        return parse_config({"architectures": [architecture], **self.BASE, **values}, Path("config.json"))

    def test_llama_3_1(self) -> None:
        scaling = {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
        model = self.parse(
            "LlamaForCausalLM", rope_theta=500000.0, rope_scaling=scaling, torch_dtype="bfloat16", head_dim=128
        )
        assert (model.rope.theta, model.rope.kind, model.rope.original_max_position) == (500000.0, "llama3", 8192)
        assert (model.dtype, model.max_position, model.tied) == ("bfloat16", 32768, False)

    def test_qwen_2_5_with_yarn(self) -> None:
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        model = self.parse(
            "Qwen2ForCausalLM", rope_scaling=scaling, use_sliding_window=False, sliding_window=32768, rope_theta=1e6
        )
        assert model.qkv_bias and not model.output_bias and model.windows == (None,) * 3
        assert model.max_position == 131072
        assert model.rope.attention_factor == pytest.approx(1.138629)

    def test_qwen_3(self) -> None:
        model = self.parse("Qwen3ForCausalLM", hidden_size=1024, num_attention_heads=16, rope_scaling=None)
        assert model.qk_norm and model.head_dim == 128

    def test_mistral_windows(self) -> None:
        assert self.parse("MistralForCausalLM", sliding_window=None).windows == (None,) * 3
        assert self.parse("MistralForCausalLM").windows == (4096,) * 3

    def test_layer_types(self) -> None:
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        flags = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}
        assert self.parse("Qwen3ForCausalLM", layer_types=kinds, **flags).windows == (None, 128, None)
        assert self.parse("Qwen3ForCausalLM", **flags).windows == (128,) * 3
        with pytest.raises(ModelError, match="layer_types"):
            self.parse("Qwen3ForCausalLM", layer_types=["linear_attention"] * 3, **flags)
