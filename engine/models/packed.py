"""The same transformer on the CPU kernels: weights in packed form, float32 between them, two C++ calls a layer.

    Transformer (as loaded, PyTorch) ── pack, layer by layer ──► PackedTransformer; each layer's PyTorch weights go

Weights and KV keep the model's dtype and are widened exactly when they are read; products, the residual stream and
attention are float32. So a 16-bit model is computed more precisely than in 16 bits, and moves as few bytes. Weights
that the checkpoint has as codes stay codes; products with codes round activations to 8 bits (cpu/integers.h).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.attention.base import AttentionBackend
from tandem.engine.group import Group
from tandem.engine.kernels import native
from tandem.engine.kernels.native import PANEL, Packed, Team
from tandem.engine.models.layers import Linear, RowLinear
from tandem.engine.models.transformer import Layer, StepInputs, StepOutput, Transformer, all_finite
from tandem.engine.quantization.grouped import GroupedWeight, quantize

logger = logging.getLogger(__name__)

Pack = Callable[[Tensor, Tensor | None], Packed]
Rows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]  # of a weight and a bias
Inputs = Callable[[Tensor], Tensor]


class PackedLayer:
    def __init__(self, layer: Layer, eps: float, bits: int | None) -> None:
        attention, mlp = layer.attention, layer.mlp
        heads = native.Heads(
            attention.heads, attention.kv_heads, attention.head_dim, attention.window or 0, attention.head_dim**-0.5
        )
        self.weights = [
            _packed(attention.qkv, attention.qkv.bias, bits),
            _packed(attention.output, _once(attention.output), bits),
            _packed(mlp.gate_up, mlp.gate_up.bias, bits, rows=interleaved),
            _packed(mlp.down, _once(mlp.down), bits, inputs=_whole_panels),
        ]
        norms = [layer.attention_norm, layer.mlp_norm, *attention.norms]
        self._norms = [norm.weight.float() for norm in norms]
        addresses = [norm.data_ptr() for norm in self._norms] + [None] * (4 - len(norms))
        self.native = native.Layer(*(weight.matrix for weight in self.weights), *addresses, heads, eps)

    @property
    def scratch(self) -> int:
        """Floats that one row needs, in either half."""
        qkv, output, gate_up, _ = (weight.matrix for weight in self.weights)
        return int(max(qkv.inputs + qkv.outputs + output.inputs, gate_up.inputs + gate_up.outputs // 2))


class PackedTransformer:
    """`forward` is Transformer's. Used by one thread at a time."""

    def __init__(self, model: Transformer, team: Team, group: Group, bits: int | None = None) -> None:
        """Takes the weights out of `model`, which is good for nothing afterwards; `bits`: 4 or 8, to quantize them.
        Without, weights that the checkpoint has as codes stay those.

        The output projection gets 8 bits also with 4: it makes the logits, and costs little.
        """
        config = model.config
        self._team, self._group, self._eps = team, group, config.norm_eps
        self.layers: list[PackedLayer] = []
        while model.layers:
            self.layers.append(PackedLayer(model.layers.pop(0), config.norm_eps, bits))
        _log(self.layers)
        self.embedding = model.embedding
        self._head, self._vocab_size = packer(bits and 8)(model.head.weight, None), config.vocab_size
        self._norm, self._rotary = model.norm.weight.float(), model.rotary
        self._rotary.dtype = torch.float32
        self._layers = (native.Layer * config.layers)(*(layer.native for layer in self.layers))
        self._caches: tuple[Sequence[Tensor], ctypes.Array[native.Cache]] = (), (native.Cache * 0)()
        self._scratch = torch.empty(0)

    def forward(
        self,
        inputs: StepInputs,
        attention: AttentionBackend,
        kv: Sequence[Tensor],
        after_layer: Callable[[int], None] | None = None,
    ) -> StepOutput:
        """As Transformer.forward; `attention` is what these kernels are. `after_layer` is for one rank alone."""
        self._team.begin()
        try:
            return self._forward(inputs, kv, after_layer)
        finally:
            self._team.end()

    def _forward(
        self, inputs: StepInputs, kv: Sequence[Tensor], after_layer: Callable[[int], None] | None
    ) -> StepOutput:
        x = self.embedding.embed(inputs.token_ids).float()
        cosines, sines = self._rotary.angles(inputs.positions)
        step, memory = _step(inputs, cosines, sines), self._memory(len(x) * self.layers[0].scratch)
        caches = self._caches_of(kv)
        if self._group.world > 1:
            self._over_ranks(x, memory, step, caches)
        else:
            count, size = len(self.layers), 1 if after_layer else len(self.layers)
            last = count - 1 if self._concludes(inputs) else -1
            for first in range(0, count, size):
                self._team.layers(self._layers, (first, first + size, last), caches, step, (memory, x))
                if after_layer:
                    after_layer(first)
        return StepOutput(self._logits(x[inputs.rows]), all_finite(x, inputs.meta.query_start))

    def _concludes(self, inputs: StepInputs) -> bool:
        """Whether the last layer need be computed only for each sequence's last token, besides keys and values.

        That token saw all of these, so a NaN in any still shows in `finite`; but a window could hide one from it.
        """
        ends = inputs.meta.query_start[1:] - 1
        if len(ends) == len(inputs.token_ids) or self.layers[-1].native.heads.window:
            return False
        return bool(torch.isin(inputs.rows, ends).all())

    def _over_ranks(self, x: Tensor, memory: Tensor, step: native.Step, caches: ctypes.Array[native.Cache]) -> None:
        """Each rank has a part of every half of a layer; all need the sum."""
        y = torch.zeros_like(x)
        for layer, cache in zip(self._layers, caches, strict=True):
            for half in (partial(self._team.attend, layer, step, cache), partial(self._team.think, layer)):
                half((x, memory, y))
                x += self._group.all_reduce(y)
                y.zero_()

    def _logits(self, hidden: Tensor) -> Tensor:
        """(R, hidden) -> (R, vocab) on rank 0, as VocabMatrix.logits."""
        normed = torch.empty_like(hidden)
        self._team.normalize(hidden, self._norm, self._eps, normed)
        logits = hidden.new_empty(len(hidden), self._head.outputs)
        self._team.product(self._head, normed, logits)
        parts = self._group.gather(logits)
        return torch.cat(parts, dim=-1)[:, : self._vocab_size] if len(parts) > 1 else parts[0]

    def _memory(self, floats: int) -> Tensor:
        if len(self._scratch) < floats:
            self._scratch = torch.empty(floats)
        return self._scratch

    def _caches_of(self, kv: Sequence[Tensor]) -> ctypes.Array[native.Cache]:
        """Described once: it is the same cache in every step but the one that measures memory."""
        if self._caches[0] is not kv:
            self._caches = kv, (native.Cache * len(kv))(*map(native.Cache.of, kv))
        return self._caches[1]


def packer(bits: int | None) -> Pack:
    """What packs a weight and its bias: as it is, or in so many bits."""
    if bits is None:
        return native.pack

    def pack(weight: Tensor, bias: Tensor | None) -> Packed:
        grouped = quantize(weight, bits)
        return native.pack_codes(grouped.codes, grouped.scales, grouped.zeros, bits, bias)

    return pack


def _as_they_are(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def _packed(
    linear: Linear,
    bias: Tensor | None,
    bits: int | None,
    rows: Rows = _as_they_are,
    inputs: Inputs = lambda weight: weight,
) -> Packed:
    """`rows` and `inputs` move or add such before packing; inputs that are added must be zero in every step.

    Codes stay codes where the kernels can have them. Added inputs make the last group longer: it must be the only one.
    """
    codes = linear.codes if bits is None else None
    if codes is None or not _packable(codes.outline, inputs):
        return packer(bits)(*rows(inputs(linear.weight), bias))
    weight = codes.read()
    packed, bias = rows(inputs(weight.codes), bias)
    scales, zeros = (rows(of_groups, None)[0] for of_groups in (weight.scales, weight.zeros))
    return native.pack_codes(packed, scales, zeros, weight.bits, bias)


def _packable(outline: GroupedWeight, inputs: Inputs) -> bool:
    columns, groups = inputs(outline.codes).shape[1], outline.scales.shape[1]
    return (groups == 1 or columns == outline.shape[1]) and native.packable(columns, groups, outline.bits)


def interleaved(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gate | up -> one panel of gate, one of up, …; the last panels are filled up with zeros."""

    def mixed(rows: Tensor) -> Tensor:
        parts = rows.view(2, len(rows) // 2, -1)
        parts = F.pad(parts, (0, 0, 0, -parts.shape[1] % PANEL))
        return parts.view(2, -1, PANEL, parts.shape[2]).transpose(0, 1).reshape(-1, parts.shape[2])

    return mixed(weight), None if bias is None else mixed(bias[:, None]).flatten()


def _whole_panels(down: Tensor) -> Tensor:
    """Inputs for what `interleaved` filled up."""
    return F.pad(down, (0, -down.shape[1] % PANEL))


def _log(layers: Sequence[PackedLayer]) -> None:
    held = [weight for layer in layers for weight in layer.weights]
    size = sum(tensor.nbytes for weight in held for tensor in weight.tensors)
    count = sum(int(weight.matrix.outputs * weight.matrix.inputs) for weight in held)
    logger.info("The layers' weights take %.3f GB, %.1f bits each", size / 1e9, 8 * size / count)


def _once(layer: RowLinear) -> Tensor | None:
    """Rank 0 adds the bias, the others do not."""
    return layer.bias if layer.group.rank == 0 else None


def _step(inputs: StepInputs, cosines: Tensor, sines: Tensor) -> native.Step:
    """Addresses only: the tensors must outlive it. `cosines` and `sines` (T, 1, head_dim / 2)."""
    meta = inputs.meta
    tensors = (
        meta.query_start, meta.context_lens, meta.block_tables, meta.slot_blocks, meta.slot_offsets, cosines, sines,
    )  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernels read whole arrays"
    sizes = len(inputs.token_ids), len(meta.query_lens), meta.block_tables.shape[1]
    return native.Step(*sizes, *(tensor.data_ptr() for tensor in tensors))
