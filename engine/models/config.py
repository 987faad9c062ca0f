"""What a model is, in numbers: every family is one `Transformer` with another `ModelConfig`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` says how the base frequencies are stretched (layers.inverse_frequencies)."""

    theta: float
    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: tokens the frequencies were trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp's ends are whole dimensions
    attention_factor: float = 1.0  # multiplies cosine and sine


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int  # tokens
    rope: RopeConfig
    windows: tuple[int | None, ...]  # one for each layer: how many last tokens a token sees; None: all
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False  # the embedding is the output projection, too
    dtype: str | None = None  # what config.json says the weights are
