"""Python's side of the C++ kernels in `cpu/`: the same structures, weights in their packed form, and the team.

Every function takes contiguous float32 tensors on the host and is given their addresses; shapes are checked here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.kernels.compile import library
from tandem.engine.kernels.cores import CoreTable

logger = logging.getLogger(__name__)

PANEL, WIDTH = 16, 32  # matmul.h: outputs of a panel, of a task
STORE, ADD, GATE = 0, 1, 2  # matmul.h: what becomes of a product
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {8: 3, 4: 4}  # bits
BLOCK = 32  # integers.h: inputs whose activations share a scale
TOLERANCE = 0.02  # of the check at first use; activations rounded to 8 bits or bfloat16 are off by 0.005
HELPER_NICENESS = 14  # more than the worker's own thread; prefill's own yields to decode's by less (cluster/plan.py)


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("group", ctypes.c_int64), ("kind", ctypes.c_int32),
    )  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("block", ctypes.c_int64), ("part", ctypes.c_int64), ("head", ctypes.c_int64),
        ("token", ctypes.c_int64), ("block_size", ctypes.c_int32), ("kind", ctypes.c_int32),
    )  # fmt: skip

    @classmethod
    def of(cls, kv: Tensor) -> Cache:
        """Of one layer's view: (blocks, 2, kv_heads, block_size, head_dim)."""
        assert kv.stride(4) == 1, "a head's elements lie side by side"
        block, part, head, token, _ = kv.stride()
        return cls(kv.data_ptr(), block, part, head, token, kv.shape[3], KINDS[kv.dtype])


class Step(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64), ("sequences", ctypes.c_int64), ("table_width", ctypes.c_int64),
        ("query_start", ctypes.c_void_p), ("context_lens", ctypes.c_void_p), ("tables", ctypes.c_void_p),
        ("slot_blocks", ctypes.c_void_p), ("slot_offsets", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p),
    )  # fmt: skip


class Heads(ctypes.Structure):
    _fields_ = (
        ("heads", ctypes.c_int32), ("kv_heads", ctypes.c_int32), ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix), ("output", Matrix), ("gate_up", Matrix), ("down", Matrix),
        ("attention_norm", ctypes.c_void_p), ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p), ("key_norm", ctypes.c_void_p), ("heads", Heads), ("eps", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as the kernels read it; `matrix` points into the tensors, which live as long as this."""

    matrix: Matrix
    tensors: tuple[Tensor, ...]

    @property
    def outputs(self) -> int:
        return int(self.matrix.outputs)


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """`weight` (outputs, inputs), float32, bfloat16 or float16 -> panels [outputs / 16][inputs][16], padded with 0.

    bfloat16 becomes [outputs / 16][inputs / 2][16][2] where the processor has products of such pairs (dot.h).
    """
    outputs, inputs = weight.shape
    panels = _padded(weight).view(-1, PANEL, inputs).transpose(1, 2)
    if weight.dtype == torch.bfloat16 and _library().tandem_pairs():
        panels = F.pad(panels, (0, 0, 0, inputs % 2)).unflatten(1, (-1, 2)).transpose(2, 3)
    return _packed((outputs, inputs), KINDS[weight.dtype], (panels.contiguous(),), bias)


def packable(inputs: int, groups: int, bits: int) -> bool:
    """Whether `pack_codes` takes such codes. Groups of a multiple of 32 inputs are best: others are filled up to it."""
    return bits in CODES and 0 < groups <= inputs and inputs % groups == 0


def pack_codes(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, bias: Tensor | None = None) -> Packed:
    """Integer codes worth scale · (code - zero), in the layout of integers.h; the products round activations to 8 bits.

    `codes` (outputs, inputs) uint8, 0 … 2^bits - 1; `scales` and `zeros` (outputs, groups), each group of equally many
    inputs. A row's scales are kept as float16 beside a power of two, or as the one float they are; zeros as bfloat16.
    """
    (outputs, inputs), groups = codes.shape, scales.shape[1]
    assert packable(inputs, groups, bits), f"{inputs} inputs in {groups} groups of {bits} bits cannot be packed"
    scales, zeros = _padded(scales.float()), _padded(zeros.float())
    if bits == 8:  # signed ones
        codes, zeros = codes ^ 128, zeros - 128
    size = inputs // groups
    spread = F.pad(_padded(codes).view(-1, groups, size), (0, -size % BLOCK))
    blocks = (_blocks8 if bits == 8 else _blocks4)(spread.view(-1, PANEL, groups, spread.shape[2] // BLOCK, BLOCK))
    row = scales if groups == 1 else _power_of_two(scales.abs().amax(1, keepdim=True))
    row = torch.where(row == 0, 1.0, row)
    heads = torch.cat([_panels((scales / row).half()), _panels(zeros.bfloat16())], dim=2)
    data = torch.cat([heads, blocks], dim=2)
    return _packed((outputs, inputs), CODES[bits], (data, row.flatten().contiguous()), bias, size)


def _blocks8(codes: Tensor) -> Tensor:
    """(panels, 16, groups, blocks, 32) -> (panels, groups, bytes)."""
    quads = codes.view(torch.int32).permute(0, 2, 3, 4, 1)
    return quads.contiguous().view(torch.uint8).flatten(2)


def _blocks4(codes: Tensor) -> Tensor:
    """As `_blocks8`, of the two halves of a block in one byte."""
    low, high = codes.chunk(2, dim=-1)
    return _blocks8(low | (high << 4))


def _power_of_two(values: Tensor) -> Tensor:
    """The exponent alone of each float32."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


def _panels(values: Tensor) -> Tensor:
    """(outputs, groups) of 16 bits -> (panels, groups, bytes)."""
    return values.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def _padded(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % WIDTH))


def _packed(
    shape: tuple[int, int], kind: int, tensors: tuple[Tensor, ...], bias: Tensor | None, group: int = 0
) -> Packed:
    """`tensors`: data, then the rows' scales if they have any."""
    if bias is not None:
        bias = F.pad(bias.float(), (0, -len(bias) % WIDTH))
    addresses = [tensor.data_ptr() for tensor in tensors] + [None]
    matrix = Matrix(*addresses[:2], None if bias is None else bias.data_ptr(), *shape, group, kind)
    return Packed(matrix, (*tensors, bias) if bias is not None else tensors)


class Team:
    """The threads of one engine's kernels; helpers of its own, which end with it."""

    def __init__(self, threads: int, table: CoreTable | None = None) -> None:
        """`threads` at most; with a `table`, those of its cores that no other worker uses (team.h)."""
        found = _library()
        self._library, self._table, self.threads = found, table, threads
        own, address, lines, mine = (table.own, table.address, table.lines, table.mine) if table else (0, None, 0, 0)
        found.tandem_team.restype = ctypes.c_void_p
        team = found.tandem_team(
            _int(threads), _int(own), _int(HELPER_NICENESS), ctypes.c_void_p(address), _int(lines), _int(mine)
        )
        self._team = ctypes.c_void_p(team)

    def begin(self) -> None:
        """A step begins: helpers wake."""
        self._library.tandem_begin(self._team)

    def end(self) -> None:
        self._library.tandem_end(self._team)

    def product(self, weight: Packed, x: Tensor, y: Tensor, then: int = STORE) -> None:
        """y (rows, outputs) = or += x (rows, inputs) · weightᵀ + bias; with GATE, y (rows, outputs / 2)."""
        assert then != GATE or weight.outputs % WIDTH == 0, f"{weight.outputs} outputs are no pairs of panels"
        columns = weight.outputs // 2 if then == GATE else weight.outputs
        assert x.shape == (len(y), weight.matrix.inputs) and y.shape[1] == columns, f"{x.shape} to {y.shape}"
        self._call("tandem_product", ctypes.byref(weight.matrix), _floats(x), _long(len(x)), _int(then), _floats(y))

    def normalize(self, x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None:
        """RMSNorm of the rows of `x` (rows, size) into `y`."""
        rows, size = x.shape
        self._call(
            "tandem_normalize", _floats(x), _floats(weight), _long(rows), _long(size), ctypes.c_float(eps), _floats(y)
        )

    def attention(self, heads: Heads, step: Step, cache: Cache, query: Tensor, seen: Tensor) -> None:
        """`query`, `seen` (T, heads, head_dim)."""
        references = (ctypes.byref(part) for part in (heads, step, cache))
        self._call("tandem_attention", *references, _floats(query), _floats(seen))

    def attend(self, layer: Layer, step: Step, cache: Cache, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        """The attention half of a layer: of x (T, hidden), with scratch memory, added to y (T, hidden)."""
        references = (ctypes.byref(part) for part in (layer, step, cache))
        self._call("tandem_attend", *references, *map(_floats, tensors))

    def think(self, layer: Layer, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        """The MLP half: of x (T, hidden), with scratch memory, added to y (T, hidden)."""
        rows = len(tensors[0])
        self._call("tandem_think", ctypes.byref(layer), _long(rows), *map(_floats, tensors))

    def layers(
        self,
        layers: ctypes.Array[Layer],
        part: tuple[int, int, int],
        caches: ctypes.Array[Cache],
        step: Step,
        tensors: tuple[Tensor, Tensor],
    ) -> None:
        """x (T, hidden) through layers, in place, with scratch memory: `tensors` are memory and x.

        `part`: the first layer, the one behind the last, and the one through which only each sequence's last token
        goes, or -1. As many layers as caches.
        """
        bounds = map(_long, part)
        self._call("tandem_layers", layers, caches, *bounds, ctypes.byref(step), *map(_floats, tensors))

    def __del__(self) -> None:
        if team := getattr(self, "_team", None):
            self._library.tandem_disband(team)

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(self._library, name)(self._team, *arguments)


@functools.cache
def available() -> bool:
    """Whether the kernels are there and compute what PyTorch does; if not, one warning has said why.

    They are compiled for processors that nobody may have tried them on.
    """
    if library() is None:
        return False
    errors = [_error(kind, rows) for kind in (*KINDS, *CODES) for rows in (1, 3, 40)]
    wrong = [error for error in errors if not error < TOLERANCE]  # NaN too
    if wrong:
        logger.warning(
            "Tandem's CPU kernels compute wrongly on this processor (off by %.2g); PyTorch is used instead", wrong[0]
        )
    return not wrong


def _error(kind: torch.dtype | int, rows: int) -> float:
    """The largest error of a product, relative to the size of its results; `kind`: of weights, or bits of codes."""
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(count, 72, generator=generator) for count in (50, rows))
    if isinstance(kind, int):
        codes, zero = torch.randint(2**kind, weight.shape, generator=generator), 2.0 ** (kind - 1)
        packed = pack_codes(codes.to(torch.uint8), torch.ones(50, 1), torch.full((50, 1), zero), kind)
        weight = codes - zero
    else:
        weight = weight.to(kind)
        packed = pack(weight)
    y, team = torch.empty(rows, 50), Team(1)
    team.begin()
    team.product(packed, x, y)
    team.end()
    wanted = x @ weight.float().t()
    return float((y - wanted).abs().max() / wanted.abs().max())


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked for kernels that cannot be had: see available()"
    return found


def _floats(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.dtype == torch.float32 and tensor.is_contiguous(), f"{tensor.dtype} of strides {tensor.stride()}"
    return ctypes.c_void_p(tensor.data_ptr())


_long, _int = ctypes.c_int64, ctypes.c_int32
