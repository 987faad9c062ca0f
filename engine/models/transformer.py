"""The one decoder-only transformer of all families (pre-norm, rotary, grouped queries, gated SiLU MLP).

    tokens (T,) -> embed (T, hidden) -> layers, reading and writing the paged KV cache -> norm -> logits (R, vocab)

T are the new tokens of all sequences of a step, without padding; R the rows whose next token is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend, AttentionMetadata
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.layers import ColumnLinear, Placement, RMSNorm, Rotary, RowLinear, Slot, VocabMatrix
from tandem.engine.models.ops import StepContext, create_ops


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the model's device."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    rows: Tensor  # (R,) int64: indices into T
    meta: AttentionMetadata


@dataclass(frozen=True, slots=True)
class StepOutput:
    logits: Tensor  # (R, vocab) float32 on rank 0; elsewhere it means nothing
    finite: Tensor  # (S,) bool: whether the last hidden states of all of a sequence's new tokens are


class Model(Protocol):
    """Computes steps: `Transformer` below, or its packed form (packed.py)."""

    def forward(
        self,
        inputs: StepInputs,
        attention: AttentionBackend,
        kv: Sequence[Tensor],
        after_layer: Callable[[int], None] | None = None,
    ) -> StepOutput:
        """Write the KV of all tokens into `kv` (one view a layer); logits of `inputs.rows`.

        `after_layer(index)` is called behind each layer, whose KV of this step is then final.
        """
        ...


class Attention:
    def __init__(self, config: ModelConfig, index: int, place: Placement) -> None:
        world, size = place.group.world, config.head_dim
        name = f"model.layers.{index}.self_attn"
        self.heads, self.kv_heads, self.head_dim = config.heads // world, config.kv_heads // world, size
        self.window = config.windows[index]
        parts = [
            (f"{name}.q_proj", config.heads * size),
            (f"{name}.k_proj", config.kv_heads * size),
            (f"{name}.v_proj", config.kv_heads * size),
        ]
        self.qkv = ColumnLinear(parts, config.hidden_size, config.qkv_bias, place)
        self.output = RowLinear(f"{name}.o_proj", config.heads * size, config.hidden_size, config.output_bias, place)
        self.norms = (
            [RMSNorm(f"{name}.{which}_norm", size, config.norm_eps, place) for which in "qk"] if config.qk_norm else []
        )

    def __call__(self, x: Tensor, kv: Tensor, context: StepContext) -> Tensor:
        """`kv` is this layer's view of the cache: (blocks, 2, kv_heads, block_size, head_dim)."""
        query = context.ops.write(self.qkv(x), self.norms, kv, context)
        seen = context.attention.attend(query, kv, context.meta, self.head_dim**-0.5, self.window)
        return self.output(seen.reshape(len(x), -1))

    def slots(self) -> Iterator[Slot]:
        for layer in (self.qkv, self.output, *self.norms):
            yield from layer.slots()


class MLP:
    def __init__(self, config: ModelConfig, index: int, place: Placement) -> None:
        name, inner = f"model.layers.{index}.mlp", config.intermediate_size
        parts = [(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)]
        self.gate_up = ColumnLinear(parts, config.hidden_size, config.mlp_bias, place)
        self.down = RowLinear(f"{name}.down_proj", inner, config.hidden_size, config.mlp_bias, place)

    def __call__(self, x: Tensor, context: StepContext) -> Tensor:
        return self.down(context.ops.gate(self.gate_up(x)))

    def slots(self) -> Iterator[Slot]:
        yield from self.gate_up.slots()
        yield from self.down.slots()


class Layer:
    def __init__(self, config: ModelConfig, index: int, place: Placement) -> None:
        name, size, eps = f"model.layers.{index}", config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(f"{name}.input_layernorm", size, eps, place)
        self.attention = Attention(config, index, place)
        self.mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", size, eps, place)
        self.mlp = MLP(config, index, place)

    def __call__(self, x: Tensor, y: Tensor | None, kv: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
        """The residual stream is x + y: `y` is what the layer before added last. Returns the next two."""
        x, normed = context.ops.add_norm(x, y, self.attention_norm)
        y = self.attention(normed, kv, context)
        x, normed = context.ops.add_norm(x, y, self.mlp_norm)
        return x, self.mlp(normed, context)

    def slots(self) -> Iterator[Slot]:
        for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            yield from part.slots()


class Transformer:
    """Weights are uninitialised until a loader has filled every slot."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        self.config = config
        self.embedding = VocabMatrix("model.embed_tokens", config.vocab_size, config.hidden_size, place)
        self.layers = [Layer(config, index, place) for index in range(config.layers)]
        self.norm = RMSNorm("model.norm", config.hidden_size, config.norm_eps, place)
        self.head = (
            self.embedding if config.tied else VocabMatrix("lm_head", config.vocab_size, config.hidden_size, place)
        )
        self.rotary = Rotary(config.rope, config.head_dim, place)
        self.ops = create_ops(place.device)

    def forward(
        self,
        inputs: StepInputs,
        attention: AttentionBackend,
        kv: Sequence[Tensor],
        after_layer: Callable[[int], None] | None = None,
    ) -> StepOutput:
        """See Model."""
        context = StepContext(self.ops, attention, inputs.meta, self.rotary.angles(inputs.positions))
        x, y = self.embedding.embed(inputs.token_ids), None
        for index, (layer, layer_kv) in enumerate(zip(self.layers, kv, strict=True)):
            x, y = layer(x, y, layer_kv, context)
            if after_layer is not None:
                after_layer(index)
        x, normed = self.ops.add_norm(x, y, self.norm)
        logits = self.head.logits(normed[inputs.rows]).float()
        return StepOutput(logits, all_finite(x, inputs.meta.query_start))

    def slots(self) -> Iterator[Slot]:
        """Every checkpoint tensor the model wants, each once, in the order of the layers."""
        yield from self.embedding.slots()
        for layer in self.layers:
            yield from layer.slots()
        yield from self.norm.slots()
        if self.head is not self.embedding:
            yield from self.head.slots()


def all_finite(x: Tensor, query_start: Tensor) -> Tensor:
    """(T, hidden), (S + 1,) -> (S,) bool: whether every value of each sequence's rows is finite.

    A NaN in the KV that a token wrote or saw, in any layer, stays in its residual stream, so the last one tells of
    all layers. 0 · inf and 0 · NaN are NaN, and sums of zeros cannot overflow.
    """
    whole = (x * 0).sum(dim=-1) == 0
    if len(x) == len(query_start) - 1:  # a token each
        return whole
    before = F.pad((~whole).cumsum(dim=0), (1, 0))  # (T + 1,) broken rows before each
    return before[query_start[1:]] == before[query_start[:-1]]
