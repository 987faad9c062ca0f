"""How near the CPU kernels come to this machine's limits: products and attention, PyTorch's own beside them.

    python benchmarks/kernels.py --threads 1,2 --rounds 5 --save kernels.json
    python benchmarks/kernels.py --hidden 4096 --inner 14336 --heads 32 --kv-heads 8 --head-dim 128 --kinds bfloat16

The limits are measured first: bytes read from memory per second, by one core and by all, and float32 operations per
second of one core. `share` is the time that the slower of the two limits allows, over the time taken. So many copies
of a weight, or contexts, take turns that none is still in a cache; those of a step come from memory, too.

On a machine that others use as well, only the best of several short runs says what the kernels can do. A round is such
a best, of ours and then of PyTorch's; the figures are medians over rounds, with the lowest and highest. Compare them
within one run, and mind the load that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from limits import Call, Limits, describe, measure_limits

from tandem.engine.attention.base import AttentionMetadata
from tandem.engine.attention.cpu import CpuAttention
from tandem.engine.kernels import native
from tandem.engine.kernels.native import ADD, GATE, STORE, Packed, Team

BLOCK = 16  # tokens
SHORTEST = 0.01  # seconds of one timed run; several make a round
RUNS = 3
LONGEST = 4.0  # seconds; what PyTorch would take longer for is left out
KINDS = ("float32", "bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model; defaults: SmolLM2-135M."""

    hidden: int = 576
    inner: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab: int = 49152

    def products(self) -> dict[str, tuple[int, int, int]]:
        """Outputs, inputs, and what becomes of the product."""
        queries, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (queries + 2 * kv, self.hidden, STORE),
            "output": (self.hidden, queries, ADD),
            "gate_up": (2 * self.inner, self.hidden, GATE),
            "down": (self.hidden, self.inner, ADD),
            "head": (self.vocab, self.hidden, STORE),
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of one call; lowest and highest of the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, rounds: list[float]) -> Measured:
        return cls(statistics.median(rounds), min(rounds), max(rounds))


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    kind: str
    threads: int
    size: str  # rows, or batch and context
    num_bytes: float  # of weights or KV that must be read
    operations: float
    ours: Measured
    torch: Measured | None
    share: float  # of the limit
    load: float  # of the machine, in processes over the last minute


@dataclass(frozen=True, slots=True)
class Run:
    """How to measure."""

    limits: Limits
    rounds: int
    stream: int  # bytes that are more than the caches hold

    def row(self, what: tuple[str, str, str], threads: int, cost: tuple[float, float], calls: Calls) -> Row:
        """`what`: name, kind, size; `cost`: bytes and operations of a call; `calls`: ours, and PyTorch's if any."""
        ours, theirs = alternating(calls, self.rounds)
        share = self.limits.seconds(*cost, threads) / ours.median
        name, kind, size = what
        return Row(name, kind, threads, size, *cost, ours, theirs, share, os.getloadavg()[0])


Calls = tuple[Call, Call | None]


def once(call: Call) -> float:
    """Seconds of a call: the best of RUNS runs, each of as many calls as take SHORTEST."""
    best, count = float("inf"), 1
    for _ in range(RUNS):
        began = time.perf_counter()
        done = 0
        while done < count or time.perf_counter() - began < SHORTEST:
            call()
            done += 1
        best, count = min(best, (time.perf_counter() - began) / done), done
    return best


def alternating(calls: Calls, rounds: int) -> tuple[Measured, Measured | None]:
    ours, theirs = calls
    found = list[tuple[float, float]]()
    for _ in range(rounds):
        found.append((once(ours), once(theirs) if theirs is not None else 0.0))
    first, second = zip(*found, strict=True)
    return Measured.of(list(first)), Measured.of(list(second)) if theirs is not None else None


def pack(kind: str, outputs: int, inputs: int) -> tuple[Packed, float]:
    """A random weight, and its bytes."""
    if kind in ("int8", "int4"):
        bits = int(kind[3:])
        groups = 1 if bits == 8 else -(-inputs // 64)
        codes = torch.randint(2**bits, (outputs, inputs), dtype=torch.uint8)
        scales = torch.full((outputs, groups), 0.01)
        packed = native.pack_codes(codes, scales, torch.full_like(scales, 2.0 ** (bits - 1)), bits)
    else:
        packed = native.pack(torch.randn(outputs, inputs).to(getattr(torch, kind)))
    return packed, float(sum(tensor.nbytes for tensor in packed.tensors))


def product_calls(kind: str, shape: tuple[int, int, int], team: Team, stream: int) -> tuple[float, ProductCalls]:
    """Bytes of a weight, and for a number of rows what to time."""
    outputs, inputs, then = shape
    first, num_bytes = pack(kind, outputs, inputs)
    copies = max(1, int(stream / num_bytes))
    weights = cycle([first] + [pack(kind, outputs, inputs)[0] for _ in range(copies - 1)])
    dtype: torch.dtype = getattr(torch, kind) if kind in KINDS[:3] else torch.bfloat16
    plain = max(1, stream // (outputs * inputs * dtype.itemsize))
    theirs = cycle([torch.randn(outputs, inputs).to(dtype) for _ in range(plain)])

    def calls(rows: int) -> tuple[Call, Call]:
        x, y = torch.randn(rows, inputs), torch.zeros(rows, outputs // 2 if then == GATE else outputs)
        narrow = x.to(dtype)
        return lambda: team.product(next(weights), x, y, then), lambda: F.linear(narrow, next(theirs))

    return num_bytes, calls


ProductCalls = Callable[[int], tuple[Call, Call]]


def products(run: Run, shape: Shape, kinds: list[str], all_rows: list[int], threads: int) -> Iterator[Row]:
    team = Team(threads)
    team.begin()
    for kind in kinds:
        for name, (outputs, inputs, then) in shape.products().items():
            if kind == "int4" and inputs % 64:
                continue
            num_bytes, calls = product_calls(kind, (outputs, inputs, then), team, run.stream)
            pace = 0.0  # seconds that PyTorch took for a row
            for rows in all_rows:
                if name == "head" and rows > 64:  # of the rows that are sampled only
                    continue
                ours, theirs = calls(rows)
                allowed = theirs if pace * rows < LONGEST else None
                cost = num_bytes, 2.0 * rows * outputs * inputs
                row = run.row((name, kind, f"{rows}"), threads, cost, (ours, allowed))
                pace = row.torch.median / rows if row.torch is not None else pace
                yield row
    team.end()


class Contexts:
    """`copies` batches of sequences of equal length in one layer's cache, in blocks of random order."""

    def __init__(self, shape: Shape, kind: str, batch: tuple[int, int, int], stream: int) -> None:
        """`batch`: sequences, tokens of each with the new ones, new ones."""
        self.shape, (self.sequences, self.context, self.new) = shape, batch
        blocks = -(-self.context // BLOCK)
        dtype: torch.dtype = getattr(torch, kind)
        self.num_bytes = 2.0 * self.sequences * self.context * shape.kv_heads * shape.head_dim * dtype.itemsize
        self.copies = max(1, int(stream / self.num_bytes))
        order = random.Random(0).sample(
            range(self.copies * self.sequences * blocks), k=self.copies * self.sequences * blocks
        )
        self._tables = torch.tensor(order, dtype=torch.int32).view(self.copies, self.sequences, blocks)
        self.kv = torch.randn(len(order), 2, shape.kv_heads, BLOCK, shape.head_dim).to(dtype)
        self.query = torch.randn(self.sequences * self.new, shape.heads, shape.head_dim)

    @property
    def operations(self) -> float:
        """Two products of every query with every key in its sight."""
        pairs = self.sequences * sum(range(self.context - self.new + 1, self.context + 1))
        return 4.0 * pairs * self.shape.heads * self.shape.head_dim

    def metadata(self) -> Iterator[AttentionMetadata]:
        lengths, contexts = [self.new] * self.sequences, [self.context] * self.sequences
        start = torch.arange(0, self.sequences * self.new + 1, self.new, dtype=torch.int32)
        nothing = torch.empty(0, dtype=torch.int64)
        for table in self._tables:
            lens = torch.tensor(contexts, dtype=torch.int32)
            yield AttentionMetadata(start, lens, table, nothing, nothing, lengths, contexts)

    def calls(self, team: Team) -> Calls:
        shape, metas = self.shape, list(self.metadata())
        scale = shape.head_dim**-0.5
        heads = native.Heads(shape.heads, shape.kv_heads, shape.head_dim, 0, scale)
        cache, seen, torch_attention = native.Cache.of(self.kv), torch.empty_like(self.query), CpuAttention()
        steps, others, narrow = cycle([self._step(meta) for meta in metas]), cycle(metas), self.query.to(self.kv.dtype)
        return (
            lambda: team.attention(heads, next(steps), cache, self.query, seen),
            lambda: torch_attention.attend(narrow, self.kv, next(others), scale, None),
        )

    def _step(self, meta: AttentionMetadata) -> native.Step:
        addresses = [tensor.data_ptr() for tensor in (meta.query_start, meta.context_lens, meta.block_tables)]
        return native.Step(
            len(self.query), self.sequences, meta.block_tables.shape[1], *addresses, None, None, None, None
        )


DECODES = tuple((batch, context, 1) for context in (512, 4096) for batch in (1, 8, 32))
PREFILLS = ((1, 512, 512), (1, 2048, 2048), (1, 4096, 512))


def attention(run: Run, shape: Shape, kinds: list[str], threads: int) -> Iterator[Row]:
    team = Team(threads)
    team.begin()
    for kind in (kind for kind in kinds if kind in KINDS[:3]):
        for batch in (*DECODES, *PREFILLS):
            contexts = Contexts(shape, kind, batch, run.stream)
            sequences, context, new = batch
            name, size = ("decode", f"{sequences} x {context}") if new == 1 else ("prefill", f"{new} of {context}")
            cost = contexts.num_bytes, contexts.operations
            yield run.row((name, kind, size), threads, cost, contexts.calls(team))
    team.end()


HEADINGS = (
    "what",
    "kind",
    "threads",
    "size",
    "us",
    "rounds",
    "GB/s",
    "GFLOP/s",
    "share",
    "torch us",
    "torch : ours",
    "load",
)


def line(row: Row) -> str:
    ours, theirs = row.ours, row.torch
    cells = [row.what, row.kind, f"{row.threads}", row.size, f"{ours.median * 1e6:.0f}"]
    cells += [f"{ours.least * 1e6:.0f} - {ours.most * 1e6:.0f}", f"{row.num_bytes / ours.median / 1e9:.1f}"]
    cells += [f"{row.operations / ours.median / 1e9:.0f}", f"{row.share:.2f}"]
    cells += [f"{theirs.median * 1e6:.0f}", f"{theirs.median / ours.median:.2f}"] if theirs is not None else ["", ""]
    return f"| {' | '.join([*cells, f'{row.load:.1f}'])} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rows", default="1,2,4,8,16,32,512,2048")
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream-mib", type=int, default=128, help="more than the caches of this machine hold")
    parser.add_argument("--save", type=Path, help="also write limits and rows there, as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})
    kinds, all_rows = arguments.kinds.split(","), [int(rows) for rows in arguments.rows.split(",")]
    all_threads = sorted({int(count) for count in arguments.threads.split(",")})
    limits = measure_limits(all_threads)
    print(f"{describe(limits)}\n\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    run, rows = Run(limits, arguments.rounds, arguments.stream_mib << 20), list[Row]()
    for threads in all_threads:
        torch.set_num_threads(threads)
        for measured in (products(run, shape, kinds, all_rows, threads), attention(run, shape, kinds, threads)):
            for row in measured:
                rows.append(row)
                print(line(row), flush=True)
    if arguments.save:
        result = {"shape": asdict(shape), "limits": asdict(limits), "rows": [asdict(row) for row in rows]}
        arguments.save.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
