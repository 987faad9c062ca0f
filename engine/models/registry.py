"""From a Hugging Face `config.json` to a `ModelConfig`; the families Tandem knows are the keys of `FAMILIES`.

A model directory comes from anywhere, so every field is checked here, once, and an error names the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from tandem.common.errors import ModelError
from tandem.engine.models.config import ModelConfig, RopeConfig

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 24  # of any one dimension; larger numbers are a broken file, not a model
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed, range-checked access to one JSON object. A field that is null counts as absent."""

    values: Mapping[str, object]
    path: Path

    def fault(self, text: str) -> ModelError:
        return ModelError(f"{self.path}: {text}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, high: int = MAX_WIDTH, low: int = 1) -> int:
        value = self.values.get(key) if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fault(f"{key!r} must be an integer from {low} to {high}, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number above `low`."""
        value = self.values.get(key) if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise self.fault(f"{key!r} must be a number above {low}, not {value!r:.60}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key) if self.has(key) else default
        if not isinstance(value, bool):
            raise self.fault(f"{key!r} must be true or false, not {value!r:.60}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key) if self.has(key) else default
        if not isinstance(value, str):
            raise self.fault(f"{key!r} must be a string, not {value!r:.60}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty when absent."""
        value = self.values.get(key)
        items = cast(list[object], value) if isinstance(value, list) else []
        texts = [item for item in items if isinstance(item, str)]
        if value is not None and (not isinstance(value, list) or len(texts) != len(items)):
            raise self.fault(f"{key!r} must be a list of strings, not {value!r:.60}")
        return texts

    def section(self, key: str) -> Fields:
        """The object under `key`; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return Fields({}, self.path)
        if not isinstance(value, dict):
            raise self.fault(f"{key!r} must be an object, not {value!r:.60}")
        return Fields(cast(dict[str, object], value), self.path)


def parse_config(values: Mapping[str, object], path: Path) -> ModelConfig:
    """The model that the `config.json` at `path` describes. Raises ModelError naming the file and the field."""
    fields = Fields(values, path)
    named = fields.texts("architectures")
    architecture = next((name for name in named if name in FAMILIES), None)
    if architecture is None:
        raise fields.fault(f"architecture {', '.join(named) or 'missing'} is not supported; supported: {supported()}")
    if (act := fields.text("hidden_act", "silu")) != "silu":
        raise fields.fault(f"hidden_act {act!r} is not supported; supported: silu")
    model = FAMILIES[architecture](fields, _common(fields, architecture))
    return _checked(fields, model)


def supported() -> str:
    return ", ".join(FAMILIES)


def _common(fields: Fields, architecture: str) -> ModelConfig:
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_position = fields.integer("max_position_embeddings", high=1 << 31)
    rope = _rope(fields, max_position)
    if rope.kind == "yarn":  # checkpoints give the length before stretching
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=max(1, hidden // heads)),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_position=max_position,
        rope=rope,
        windows=(None,) * layers,
        tied=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
    )


def _checked(fields: Fields, model: ModelConfig) -> ModelConfig:
    if model.heads % model.kv_heads:
        raise fields.fault(f"{model.heads} attention heads do not share {model.kv_heads} key/value heads evenly")
    if model.head_dim % 2:
        raise fields.fault(f"head_dim {model.head_dim} is odd; rotary embeddings need pairs")
    return model


def _dtype(fields: Fields) -> str | None:
    """`dtype` since transformers 5, `torch_dtype` before; some files say "torch.bfloat16"."""
    name = fields.text("dtype", fields.text("torch_dtype", ""))
    return name.removeprefix("torch.") or None


def _llama(fields: Fields, model: ModelConfig) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return replace(model, qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _mistral(fields: Fields, model: ModelConfig) -> ModelConfig:
    """Every layer has the window. Early files leave the field out and mean 4,096; a null means none."""
    if "sliding_window" in fields.values and not fields.has("sliding_window"):
        return model
    window = fields.integer("sliding_window", default=4096, high=1 << 31)
    return replace(model, windows=(window,) * model.layers)


def _qwen2(fields: Fields, model: ModelConfig) -> ModelConfig:
    return replace(model, qkv_bias=True, windows=_qwen_windows(fields, model.layers))


def _qwen3(fields: Fields, model: ModelConfig) -> ModelConfig:
    bias = fields.flag("attention_bias")
    head_dim = fields.integer("head_dim", default=128)
    windows = _qwen_windows(fields, model.layers)
    return replace(model, qkv_bias=bias, output_bias=bias, qk_norm=True, head_dim=head_dim, windows=windows)


def _qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Windows from the layer `max_window_layers` on, or as `layer_types` says; off unless `use_sliding_window`."""
    if not fields.flag("use_sliding_window"):
        return (None,) * layers
    window = fields.integer("sliding_window", default=4096, high=1 << 31)
    first = fields.integer("max_window_layers", default=28, low=0)
    kinds = fields.texts("layer_types") or [
        "sliding_attention" if index >= first else "full_attention" for index in range(layers)
    ]
    choices: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    if len(kinds) != layers or not set(kinds) <= choices.keys():
        raise fields.fault(f"'layer_types' must name {' or '.join(choices)} for each of {layers} layers")
    return tuple(choices[kind] for kind in kinds)


def _rope(fields: Fields, max_position: int) -> RopeConfig:
    """`rope_parameters` since transformers 5; `rope_theta` beside `rope_scaling` before."""
    section = fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise fields.fault(f"rope type {kind!r:.60} is not supported; supported: {', '.join(ROPE_KINDS)}")
    for place in (section, fields):
        if place.number("partial_rotary_factor", default=1.0) != 1.0:
            raise fields.fault("a 'partial_rotary_factor' other than 1 is not supported")
    theta = section.number("rope_theta", fields.number("rope_theta", default=10_000.0))
    if kind == "default":
        return RopeConfig(theta)
    rope = RopeConfig(theta, kind, section.number("factor"))
    if kind == "linear":
        return rope
    original = section.integer("original_max_position_embeddings", default=max_position, high=1 << 31)
    return (_llama3_rope if kind == "llama3" else _yarn_rope)(section, replace(rope, original_max_position=original))


def _llama3_rope(section: Fields, rope: RopeConfig) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.fault(f"'low_freq_factor' {low} must be below 'high_freq_factor' {high}")
    return replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn_rope(section: Fields, rope: RopeConfig) -> RopeConfig:
    scale, scale_all = (section.number(key, default=1.0) for key in ("mscale", "mscale_all_dim"))
    both = section.has("mscale") and section.has("mscale_all_dim")
    default = _mscale(rope.factor, scale) / _mscale(rope.factor, scale_all) if both else _mscale(rope.factor, 1.0)
    return replace(
        rope,
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        truncate=section.flag("truncate", default=True),
        attention_factor=section.number("attention_factor", default=default),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


FAMILIES: dict[str, Callable[[Fields, ModelConfig], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
